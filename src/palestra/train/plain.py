"""The step that palestra's is compared with: transformers' own model, whole logits, autograd, torch's AdamW.

`python -m palestra.train.plain JOB_FILE WAY`. The same batch, objective, clipping and optimizer, two ways:
`padded`: the documents of a pack as rows of a batch, padded to the longest, with `sdpa` and a mask of padding;
`masked`: the pack as one row, with `sdpa` and a mask in which documents do not see each other.
In bfloat16 the weights are float32 under autocast.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from palestra.algo.losses import cross_entropy, policy_loss
from palestra.config import RunConfig
from palestra.core.process import exit_with
from palestra.model.dissect import dissect
from palestra.train.job import Job, Speed
from palestra.train.packs import Pack, plan_step
from palestra.train.probe import Memory, Watch, product_flops
from palestra.train.speed import synthetic_batch
from palestra.train.trainer import DTYPES

WAYS = ("padded", "masked")


def measure(job: Job, way: str) -> Speed:
    config = RunConfig.model_validate(job.config)
    train, dtype = config.train, DTYPES[config.model.dtype]
    torch.set_num_threads(train.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = Memory(device)
    before = memory.now()
    model: Any = AutoModelForCausalLM.from_pretrained(config.model_dir, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.betas, weight_decay=0.0, fused=True)
    loaded = memory.now()
    memory.forget_peak()
    watch, loss = Watch(device), 0.0
    for step in range(job.warmup_steps + job.steps):
        batch = synthetic_batch(job, step=step, vocab_size=model.config.vocab_size)
        watch.start()
        plan = plan_step(batch, rank=0, num_ranks=1, device=device)
        loss = 0.0
        for pack in plan.packs:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                total = _loss(model, pack, plan.counts, config, way)
            total.backward()
            loss += float(total.detach())
        clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        watch.stop()
    return Speed(
        who=f"transformers, {way}",
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        attention=["sdpa"],
        ranks=1,
        steps_s=watch.wall_s[job.warmup_steps :],
        cpu_s=watch.cpu_s[job.warmup_steps :],
        parts_s={},
        bytes_before=before,
        bytes_loaded=loaded,
        bytes_peak=memory.peak(),
        flops=dissect(model.config, dtype).train_flops(job.lengths, num_scored=job.num_scored),
        product_flops=product_flops(device, dtype),
        loss=loss,
        parameters=model.num_parameters(),
    )


def _loss(model: Any, pack: Pack, counts: dict[str, int], config: RunConfig, way: str) -> Tensor:
    logits_TV = {"padded": _padded, "masked": _masked}[way](model, pack)
    logp_K = torch.log_softmax(logits_TV[pack.scored - 1].float(), -1)
    logp_K = logp_K.gather(1, pack.token_ids[pack.scored, None])[:, 0]
    if counts["ce"]:
        return cross_entropy(logp_K, pack.weights["ce"]).loss_T.sum() / counts["ce"]
    loss = policy_loss(config.algo.loss, config.algo.loss_args)
    term = loss(logp_K, pack.engine_logp, pack.advantage, pack.weights["rl"], pack.rollout)
    return term.loss_T.sum() / counts["rl"]


def _padded(model: Any, pack: Pack) -> Tensor:
    documents = pack.token_ids.split(list(pack.documents.lengths))
    ids_NL = pad_sequence(list(documents), batch_first=True)
    lengths_N1 = torch.tensor(pack.documents.lengths, device=ids_NL.device)[:, None]
    mask_NL = torch.arange(ids_NL.shape[1], device=ids_NL.device) < lengths_N1
    return model(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False).logits[mask_NL]


def _masked(model: Any, pack: Pack) -> Tensor:
    lengths_N = torch.tensor(pack.documents.lengths, device=pack.token_ids.device)
    document_T = torch.arange(len(lengths_N), device=lengths_N.device).repeat_interleave(lengths_N)
    mask_TT = (document_T[:, None] == document_T) & torch.ones(
        len(document_T), len(document_T), dtype=torch.bool, device=document_T.device
    ).tril()
    positions = pack.documents.positions
    ids = pack.token_ids.unsqueeze(0)
    return model(input_ids=ids, attention_mask=mask_TT[None, None], position_ids=positions, use_cache=False).logits[0]


def main(job_file: str, way: str) -> int:
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    print(msgspec.json.encode(measure(msgspec.json.decode(Path(job_file).read_bytes(), type=Job), way)).decode())
    return 0


if __name__ == "__main__":
    exit_with(main)
