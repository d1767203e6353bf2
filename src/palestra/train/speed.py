"""Measure the trainer itself on random tokens: `python -m palestra.train.speed JOB_FILE`, or as ranks of torchrun.

Does: loads the model as a run does, takes the job's steps, says a `Speed` as JSON. `build CONFIG_JSON DIR` makes a
model of random weights from the fields of its config.json.
"""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from palestra.config import RunConfig
from palestra.core.errors import UserError
from palestra.core.ledger import Ledger
from palestra.core.metrics import Metrics
from palestra.core.process import exit_with
from palestra.train import ranks as trainer_ranks
from palestra.train.job import Job, Speed
from palestra.train.probe import Memory, Watch, product_flops
from palestra.train.ranks import Ranks
from palestra.train.trainer import DTYPES, Trainer
from palestra.wire.batches import Batch

_DEADLINE_S = 600.0


def synthetic_batch(job: Job, *, step: int, vocab_size: int) -> Batch:
    """Random tokens and streams; equal for equal arguments."""
    rng = np.random.default_rng(step)
    lengths = np.asarray(job.lengths)
    num = int(lengths.sum())
    trained = np.concatenate([np.arange(length) >= job.prompt_of(length) for length in lengths]).astype(np.float32)
    nothing = np.zeros(num, np.float32)
    return Batch(
        step=step,
        attempt=1,
        num_packs=len(job.packs),
        max_pack_tokens=max(map(sum, job.packs)),
        token_ids=rng.integers(0, vocab_size, num),
        engine_logprobs=np.float32(-np.log(vocab_size)) * trained,
        advantage=np.repeat(rng.standard_normal(len(lengths)), lengths).astype(np.float32),
        rl_weight=trained if job.kind == "rl" else nothing,
        ce_weight=trained if job.kind == "sft" else nothing,
        ref_weight=nothing,
        reference_logprobs=nothing,
        lengths=lengths,
        rollout=np.arange(len(lengths)),
        temperature=np.ones(len(lengths), np.float32),
        pack=np.repeat(np.arange(len(job.packs)), [len(pack) for pack in job.packs]),
        version=np.full(len(lengths), step),
    )


def measure(job: Job) -> Speed | None:
    """None on all ranks but the first."""
    config = RunConfig.model_validate(job.config)
    ranks = trainer_ranks.join(config.train, deadline_s=_DEADLINE_S)
    try:
        speed = _measure(job, config, ranks)
    finally:
        trainer_ranks.leave()
    return speed if ranks.is_first else None


def _measure(job: Job, config: RunConfig, ranks: Ranks) -> Speed:
    from palestra.model.dissect import dissect
    from palestra.model.load import read_config

    memory = Memory(ranks.device)
    before = memory.now()
    trainer = Trainer(config, ranks, Ledger("trainer"))
    loaded = memory.now()
    memory.forget_peak()
    ledger = Ledger("trainer")
    watch, metrics = _steps(trainer, job, ledger)
    peak = memory.peak()
    parts = ledger.close().parts_s
    if job.profile:
        _profile(trainer, job)
    dtype = DTYPES[config.model.dtype]
    anatomy = dissect(read_config(config.model_dir), dtype, config.model.lora)
    return Speed(
        who="palestra",
        device=torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        attention=sorted(trainer.policy.attention_kernels),
        ranks=ranks.num,
        steps_s=watch.wall_s[job.warmup_steps :],
        cpu_s=watch.cpu_s[job.warmup_steps :],
        parts_s={name: seconds / job.steps for name, seconds in parts.items() if name in _PARTS},
        bytes_before=before,
        bytes_loaded=loaded,
        bytes_peak=peak,
        flops=anatomy.train_flops(job.lengths, num_scored=job.num_scored),
        product_flops=product_flops(ranks.device, dtype),
        loss=metrics[f"train/{'rl' if job.kind == 'rl' else 'ce'}/loss"].value,
        parameters=anatomy.parameters,
    )


_PARTS = ("plan", "forward_backward", "optimizer")


def _steps(trainer: Trainer, job: Job, ledger: Ledger) -> tuple[Watch, Metrics]:
    """The ledger has the parts of the steps after the warm-up alone."""
    watch, metrics = Watch(trainer.ranks.device), Metrics()
    for step in range(job.warmup_steps + job.steps):
        if step == job.warmup_steps:
            ledger.close()
        batch = synthetic_batch(job, step=step, vocab_size=trainer.policy.vocab_size)
        watch.start()
        metrics = trainer.train(batch, ledger)
        watch.stop()
    return watch, metrics


def _profile(trainer: Trainer, job: Job) -> None:
    """One more step, and a table of its operations by the time of the device: of the first rank."""
    from torch.autograd.profiler_util import EventList
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if trainer.ranks.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    batch = synthetic_batch(job, step=trainer.version, vocab_size=trainer.policy.vocab_size)
    with profile(activities=kinds) as seen:
        trainer.train(batch, Ledger("trainer"))
    if trainer.ranks.is_first:
        events: EventList = seen.key_averages()
        by = "self_device_time_total" if len(kinds) > 1 else "self_cpu_time_total"
        table = events.table(sort_by=by, row_limit=60, max_name_column_width=100, max_src_column_width=0)
        Path(job.profile).write_text(table)


def build(fields: dict[str, Any], directory: Path) -> None:
    """A model of random weights in bfloat16, made on a GPU if there is one. Errors: UserError for unknown fields."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the config.json is refused by transformers: {error}") from error
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)


def main(*words: str) -> int:
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if words[0] == "build":
        build(json.loads(words[1]), Path(words[2]))
        return 0
    speed = measure(msgspec.json.decode(Path(words[0]).read_bytes(), type=Job))
    if speed is not None:
        print(msgspec.json.encode(speed).decode(), flush=True)
    return 0


if __name__ == "__main__":
    exit_with(main)
