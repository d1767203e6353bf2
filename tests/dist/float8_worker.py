"""One of the two ranks of `test_float8.py`. Arguments: a directory with models, and where to write what was found."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from palestra.config.schema import Lora, Train
from palestra.model import load
from palestra.model.float8 import use_float8
from palestra.model.mesh import Meshes
from palestra.train import ranks as trainer_ranks
from tests.dist.layouts import gradients, move_adapter

WAYS = {"all": None, "adapted": Lora(rank=8)}
"""What is trained."""


def main(models: Path, out: Path) -> None:
    disable_progress_bar()
    ranks = trainer_ranks.join(Train(shard=2), deadline_s=120)
    for path in sorted(models.iterdir()):
        for way in WAYS:
            found = gradients_in_float8(path, way, ranks.meshes)
            if ranks.is_first:
                torch.save(found, out / f"{path.name}-{way}.pt")
    trainer_ranks.leave()


def gradients_in_float8(path: Path, way: str, meshes: Meshes, *, is_rounded: bool = True) -> dict[str, Tensor]:
    """Emulated, so that a CPU can; or not rounded at all. A collective."""
    emulated = partial(use_float8, emulate=True)
    with patch.object(load, "require_float8", lambda device: None), patch.object(load, "use_float8", emulated):
        policy = load.load_policy(
            str(path),
            dtype=torch.bfloat16,
            experts="grouped_mm",
            head_chunk_tokens=5,
            meshes=meshes,
            device=torch.device("cpu"),
            lora=WAYS[way],
            float8=is_rounded,
        )
    move_adapter(policy)
    return gradients(policy, meshes)
