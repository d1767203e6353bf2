"""One of the four ranks of `test_checkpoints.py`. Arguments: a model, and where to write what was found.

What is found of each layout and of what it resumed: weights and persistent buffers after the steps named in the file.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from palestra.config.schema import Balance, Log, Lora, Model, RunConfig, Train
from palestra.core.ledger import Ledger
from palestra.model.export import iterate_weights
from palestra.model.lora import iterate_adapter
from palestra.train import ranks as trainer_ranks
from palestra.train.publish import Publisher
from palestra.train.ranks import Ranks
from palestra.train.trainer import Trainer
from tests.dist.layouts import LENGTHS, PACKS, Layout
from tests.unit.train.batches import make_batch

LAYOUTS = [
    Layout("fsdp4", 4, {"shard": 4}),
    Layout("replicate2-shard2", 4, {"replicate": 2, "shard": 2}),
    Layout("ep2-ring2-fsdp2", 4, {"shard": 2, "context": 2, "context_kind": "ring", "experts": 2}),
    Layout("tp2-fsdp2", 4, {"tensor": 2, "shard": 2}),
    Layout("fsdp2", 2, {"shard": 2}),
    Layout("1", 1),
]
SAVED, LATER = 2, 3  # versions
RESUMED = {
    "fsdp4": ("fsdp4", "fsdp2"),
    "replicate2-shard2": ("fsdp2",),
    "ep2-ring2-fsdp2": ("ep2-ring2-fsdp2", "1"),
    "tp2-fsdp2": ("tp2-fsdp2", "1"),
    "adapted": ("tp2-fsdp2", "1"),  # adapters alone, saved and published where experts, packs and weights are split
}


def main(model: Path, out: Path) -> None:
    disable_progress_bar()
    trainer_ranks.join(Train(shard=4), deadline_s=120)
    everyone = {layout.name: (layout, layout.meshes()) for layout in LAYOUTS}
    layouts = {
        layout.name: Ranks(rank=dist.get_rank(), num=layout.num_ranks, device=torch.device("cpu"), meshes=meshes)
        for layout, meshes in everyone.values()
        if dist.get_rank() < layout.num_ranks
    }
    for saver, readers in RESUMED.items():
        run = out / saver
        if (ranks := layouts.get("ep2-ring2-fsdp2" if saver == "adapted" else saver)) is not None:
            save(model, run, ranks)
        for reader in readers:
            dist.barrier()
            if reader in layouts:
                resume(model, run, layouts[reader], reader)
    dist.barrier()
    if "1" in layouts:
        resume(model, out / "fsdp4", layouts["1"], "fsdp2-1", version=LATER)
        resume(model, out / "fsdp4", layouts["1"], "forgetful", forgets=True)
    dist.barrier()
    trainer_ranks.leave()


def save(model: Path, run: Path, ranks: Ranks) -> None:
    """At version 2; its files are written while step 2 is trained."""
    trainer = _trainer(model, run, ranks)
    _train(trainer, SAVED)
    trainer.save(Ledger("test"))
    for version in (LATER, LATER + 1):
        _train(trainer, version)
        _note(trainer, run / f"straight-{version}.pt")
    trainer.finish_save(Ledger("test"))
    if trainer.policy.adapter is not None:
        _publish(trainer, run / "staged")


def resume(model: Path, run: Path, ranks: Ranks, name: str, *, version: int = SAVED, forgets: bool = False) -> None:
    """The next step; two ranks save after it for one. Who `forgets` has no biases of routers."""
    trainer = _trainer(model, run, ranks)
    trainer.resume(version, Ledger("test"))
    if forgets:
        for bias_E in trainer.policy.routers.biases:
            bias_E.zero_()
    _train(trainer, version + 1)
    if ranks.num == 2:
        trainer.save(Ledger("test"))
        trainer.finish_save(Ledger("test"))
    _note(trainer, run / f"{name}-{version + 1}.pt")


def _trainer(model: Path, run: Path, ranks: Ranks) -> Trainer:
    lora = Lora(rank=8, targets=("q_proj", "o_proj", "down_proj", "experts")) if run.name == "adapted" else None
    config = RunConfig(
        log=Log(name="run", outputs=run),
        model=Model(path=str(model), dtype="float32", lora=lora),
        train=Train(steps=8, lr=1e-3, balance=Balance(bias_rate=0.0 if lora else 0.01)),
    )
    return Trainer(config, ranks, Ledger("test"))


def _train(trainer: Trainer, version: int) -> None:
    while (step := trainer.version) < version:
        trainer.train(make_batch(LENGTHS, packs=PACKS, step=step, seed=step), Ledger("test"))


def _publish(trainer: Trainer, directory: Path) -> None:
    publisher = Publisher(
        trainer.policy,
        ranks=trainer.ranks,
        directory=directory,
        attempt=0,
        dtype=torch.float32,
        probe_tokens=8,
        seed=0,
    )
    publisher.stage(trainer.version, Ledger("test"))


def _note(trainer: Trainer, path: Path) -> None:
    """Weights as they are exported, adapters inside; and those alone, as they are published."""
    found: dict[str, Tensor] = {
        name: whole.clone()
        for tensors in (
            iterate_weights(trainer.policy, dtype=torch.float32),
            iterate_adapter(trainer.policy.model, dtype=torch.float32),
        )
        for name, whole in tensors
    }
    if trainer.ranks.is_first:
        torch.save(found, path)
