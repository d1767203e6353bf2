"""One of the four ranks of `test_layouts.py`. Arguments: a directory with models, and where to write what was found."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers.utils.logging import disable_progress_bar

from palestra.config.schema import Train
from palestra.model.mesh import Meshes
from palestra.train import ranks as trainer_ranks
from palestra.train.ranks import Ranks
from tests.dist.layouts import (
    ADAPTED,
    DTYPES,
    FAULTS,
    LAYOUTS,
    SHARDED,
    Layout,
    faults_of,
    in_parts,
    kind_of,
    make_policy,
    measure,
    planted,
)


def main(models: Path, out: Path) -> None:
    disable_progress_bar()
    trainer_ranks.join(Train(shard=4), deadline_s=120)
    meshes = {layout.name: layout.meshes() for layout in LAYOUTS}
    for model in sorted(models.iterdir()):
        for layout in LAYOUTS:
            if dist.get_rank() < layout.num_ranks:
                for kind in layout.kinds(model.name):
                    _run(model, layout, kind, meshes[layout.name], out)
            dist.barrier()
    trainer_ranks.leave()


def _run(model: Path, layout: Layout, kind: str, meshes: Meshes, out: Path) -> None:
    rank, is_adapted = dist.get_rank(), kind == ADAPTED
    ranks = Ranks(rank=rank, num=meshes.ranks.size(), device=torch.device("cpu"), meshes=meshes)
    policy = make_policy(
        *(model, DTYPES[kind], meshes, layout.activations),
        adapted=is_adapted,
        is_known=layout.is_known,
        is_given=layout.is_given,
    )
    counters.clear()
    found = measure(policy, meshes, ranks, layout.optimizer, layout.reshard_after)
    found["graphs"] = counters["stats"]["unique_graphs"]  # that were compiled
    found["fallbacks"] = policy.fallbacks
    if kind == "float64" and model.name in SHARDED and layout.num_ranks == 4:  # the others: `test_ranks.py`
        found["in_parts"] = in_parts(policy, ranks)
    if rank == 0:
        torch.save(found, out / f"{model.name}-{layout.name}-{kind}.pt")
    for fault in faults_of(model.name):
        if FAULTS[fault][0] != layout.name or kind_of(fault) != kind:
            continue
        policy = make_policy(model, DTYPES[kind], meshes, adapted=is_adapted)
        with planted(fault, policy, meshes):
            found = measure(policy, meshes, ranks, layout.optimizer, layout.reshard_after)
        if rank == 0:
            torch.save(found, out / f"{model.name}-{fault}.pt")
