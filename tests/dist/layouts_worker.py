"""One of the four ranks of `test_layouts.py`. Arguments: a directory with models, and where to write what was found."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from palestra.config.schema import Train
from palestra.model.mesh import Meshes
from palestra.train import ranks as trainer_ranks
from palestra.train.ranks import Ranks
from tests.dist.layouts import FAULTS, LAYOUTS, Layout, faults_of, make_policy, measure, planted

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def main(models: Path, out: Path) -> None:
    disable_progress_bar()
    trainer_ranks.join(Train(shard=4), deadline_s=120)
    meshes = {layout.name: layout.meshes() for layout in LAYOUTS}
    for model in sorted(models.iterdir()):
        for layout in LAYOUTS:
            if dist.get_rank() < layout.num_ranks and layout.suits(model.name):
                for precision in layout.precisions:
                    _run(model, layout, precision, meshes[layout.name], out)
            dist.barrier()
    trainer_ranks.leave()


def _run(model: Path, layout: Layout, name: str, meshes: Meshes, out: Path) -> None:
    rank, dtype = dist.get_rank(), DTYPES[name]
    ranks = Ranks(rank=rank, num=meshes.ranks.size(), device=torch.device("cpu"), meshes=meshes)
    policy = make_policy(model, dtype, meshes, layout.activations)
    found = measure(policy, meshes, ranks, layout.optimizer)
    if rank == 0:
        torch.save(found, out / f"{model.name}-{layout.name}-{name}.pt")
    for fault in [fault for fault in faults_of(model.name) if FAULTS[fault][0] == layout.name]:
        policy = make_policy(model, dtype, meshes)
        with planted(fault, policy, meshes):
            found = measure(policy, meshes, ranks, layout.optimizer)
        if rank == 0:
            torch.save(found, out / f"{model.name}-{fault}-{name}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
