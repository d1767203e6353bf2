"""What `test_ranks.py` runs on every mesh: gradients, steps and checkpoints. As a program, one of two ranks.

Arguments of the program: a directory with models, and where to write what the first rank found.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from palestra.algo.losses import policy_loss
from palestra.config.schema import Log, Lora, Model, RunConfig, Train
from palestra.core.ledger import Ledger
from palestra.core.metrics import values
from palestra.model.export import iterate_weights
from palestra.model.load import load_policy, passes
from palestra.model.mesh import make_meshes
from palestra.train import ranks as trainer_ranks
from palestra.train.packs import plan_step
from palestra.train.step import Readings, pack_loss
from palestra.train.trainer import Trainer
from tests.unit.train.batches import make_batch

LENGTHS = [9, 4, 17, 5, 12, 6, 4, 8]
PACKS = [0, 0, 1, 1, 2, 2, 3, 3]
AGES = [0, 2, 0, 1, 9, 0, 2, 0]
STEPS = 4
SAVED_AT = 2
MESHES_SENT = {
    "1x2": {"shard": 2},
    "2x1": {"replicate": 2},
    "ep2": {"shard": 2, "experts": 2},
    "tensor2": {"tensor": 2},
}
ADAPTED = "-adapted"  # ends the name of a model's directory


def main(models: Path, out: Path) -> None:
    disable_progress_bar()
    joined = trainer_ranks.join(Train(shard=2), deadline_s=120)
    for model in sorted(models.iterdir()):
        for replicate, shard in ((1, 2), (2, 1)):
            name = f"{model.name}-{replicate}x{shard}"
            ranks = dataclasses.replace(joined, meshes=make_meshes("cpu", replicate=replicate, shard=shard))
            found = measure(model, out / name, ranks)
            again = measure(model, out / name, ranks, resume_from=SAVED_AT)
            if ranks.is_first:
                torch.save({"straight": found, "resumed": again}, out / f"{name}.pt")
        if not model.name.endswith(ADAPTED):
            _send(model, joined, out)
    trainer_ranks.leave()


def _send(model: Path, joined: trainer_ranks.Ranks, out: Path) -> None:
    from tests.dist.sending import send  # vLLM: seconds

    for name, axes in MESHES_SENT.items():
        if "experts" in axes and "Moe" not in model.name:
            continue
        ranks = dataclasses.replace(joined, meshes=make_meshes("cpu", **axes))
        policy = load_policy(
            str(model),
            dtype=torch.float32,
            experts="grouped_mm",
            head_chunk_tokens=16,
            meshes=ranks.meshes,
            device=ranks.device,
        )
        found = send(policy, ranks)
        if ranks.is_first:
            torch.save(found, out / f"{model.name}-{name}-sent.pt")


def measure(model: Path, out: Path, ranks: trainer_ranks.Ranks, resume_from: int | None = None) -> dict[str, Any]:
    """Gradients at version 0, the metrics of every step, and the weights at the end; a checkpoint on the way."""
    config = RunConfig(
        log=Log(name="run", outputs=out),
        model=Model(path=str(model), dtype="float32", lora=Lora(rank=4) if model.name.endswith(ADAPTED) else None),
        train=Train(steps=STEPS, lr=1e-3, lr_ess_power=0.5),
    )
    trainer = Trainer(config, ranks, Ledger("test"))
    found: dict[str, Any] = {"metrics": []}
    if resume_from is None:
        found["gradients"] = _gradients(trainer, ranks)
    else:
        trainer.resume(resume_from, Ledger("test"))
    while trainer.version < STEPS:
        step = trainer.version
        batch = make_batch(LENGTHS, packs=PACKS, step=step, seed=step, ages=AGES)
        metrics = trainer.train(batch, Ledger("test"))
        found["metrics"].append(values(metrics))
        if trainer.version == SAVED_AT and resume_from is None:
            trainer.save(Ledger("test"))  # its files are written while the next steps are trained
    trainer.finish_save(Ledger("test"))
    found["weights"] = {name: whole.clone() for name, whole in iterate_weights(trainer.policy, dtype=torch.float32)}
    return found


def _gradients(trainer: Trainer, ranks: trainer_ranks.Ranks) -> dict[str, torch.Tensor]:
    plan = plan_step(make_batch(LENGTHS, packs=PACKS, supervised=[3]), rank=ranks.rank, num_ranks=ranks.num)
    loss = policy_loss("mis", {"low": 1e-9, "high": 1e9})
    for pack in passes(trainer.policy, plan.packs):
        pack_loss(trainer.policy, pack, plan.counts, loss, Readings()).backward()
    gradients = {
        name: parameter.grad.full_tensor()
        for name, parameter in trainer.policy.named_parameters()
        if parameter.requires_grad
    }
    trainer.policy.zero_grad()
    return gradients
