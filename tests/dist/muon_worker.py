"""What `test_muon.py` runs: parameters of every layout, three steps of one optimizer. As a program, four ranks.

Then eight of them train a model whose matrices are split by tensor parallelism too. Arguments of the program: where to
write what was found, and the model.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.multiprocessing import start_processes

from palestra.model.places import share
from palestra.train import muon
from palestra.train.exchange import Exchange
from palestra.train.moments import local
from palestra.train.muon import Stored
from palestra.train.optimizer import Optimizer, set_lr
from palestra.train.ranks import Ranks
from palestra.train.step import clip_gradients
from tests.dist.layouts import Layout, make_policy, measure

STEPS, SAVED_AT, LR, MAX_NORM = 3, 2, 0.05, 1.5
ONE, PAIR, TURNS = Stored(), Stored(num=2), Stored(num=2, interleaved=True, transposed=True)
COLUMNS, BOTH = [Shard(1)], [Shard(1), Shard(0)]
STRIDED: list[Placement] = [_StridedShard(0, split_factor=2), Shard(0)]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: list[Placement]
    stored: Stored | None = ONE  # None: AdamW's


CASES = {
    "rows": Case((8, 6), (4,), [Shard(0)]),
    "uneven": Case((10, 6), (4,), [Shard(0)]),
    "fewer_rows_than_ranks": Case((3, 8), (4,), [Shard(0)]),
    "columns": Case((6, 10), (4,), COLUMNS),
    "replicas": Case((9, 12), (2, 2), [Replicate(), Shard(0)]),
    "only_replicas": Case((6, 8), (4,), [Replicate()]),
    "one_replica": Case((8, 4), (1, 4), [Replicate(), Shard(0)]),
    "rectangles": Case((7, 9), (2, 2), BOTH),
    "strided": Case((8, 5), (2, 2), STRIDED),
    "experts": Case((8, 6, 4), (4,), [Shard(0)], PAIR),
    "few_experts": Case((3, 4, 6), (4,), [Shard(0)]),
    "replicated_experts": Case((4, 6, 4), (2, 2), [Replicate(), Shard(0)], PAIR),
    "cut_experts": Case((3, 8, 5), (4,), COLUMNS, PAIR),
    "cut_experts_in_turns": Case((3, 5, 12), (4,), [Shard(2)], TURNS),
    "experts_on_a_mesh_of_their_own": Case((4, 10, 3), (2, 2), BOTH, PAIR),
    "norm": Case((6,), (4,), [Shard(0)], None),
    "embedding": Case((10, 4), (2, 2), [Replicate(), Shard(0)], None),
    "expert_bias": Case((4, 6), (2, 2), BOTH, None),
}
FSDP_EXPERTS = Case((8, 6, 4), (2, 2), STRIDED, PAIR)  # made by FSDP2 itself, of experts that are sharded already
FSDP_TENSOR = Case((14, 6), (2, 2), STRIDED)  # and of a tensor axis' 7 rows each, which do not divide
EIGHT = Layout("tp2-ulysses2-ep4-fsdp2", 8, {"tensor": 2, "context": 2, "shard": 2, "experts": 4})


class Model(nn.Module):
    """A parameter of each case; whole without meshes."""

    def __init__(self, meshes: dict[tuple[int, ...], DeviceMesh] | None = None):
        super().__init__()
        self.cases = nn.ParameterDict()
        for name, case in CASES.items():
            whole = values(f"cases.{name}", case.shape)
            self.cases[name] = nn.Parameter(
                whole if meshes is None else distribute_tensor(whole, meshes[case.mesh], case.placements)
            )
        self.split = nn.ParameterDict()
        for name, case in (("experts", FSDP_EXPERTS), ("tensor", FSDP_TENSOR)):
            whole = values(f"split.{name}", case.shape)
            if meshes is not None:
                whole = distribute_tensor(whole, meshes[2, 2]["shard"], [Shard(0)])
            self.split[name] = nn.Parameter(whole)
        if meshes is not None:
            fully_shard(self.split, mesh=meshes[2, 2]["replicate"])

    def stored(self) -> dict[str, Stored | None]:
        cases = {f"cases.{name}": case.stored for name, case in CASES.items()}
        return {"split.experts": PAIR, "split.tensor": ONE, **cases}

    def set_gradients(self, step: int) -> None:
        for name, parameter in self.named_parameters():
            gradient = values(f"{name}.grad{step}", parameter.shape)
            if isinstance(parameter, DTensor) and name.startswith("split."):  # torch cuts no uneven strided shards
                where, part = parameter.device_mesh, share(gradient, parameter).contiguous()
                like = {"shape": gradient.shape, "stride": gradient.stride()}
                gradient = DTensor.from_local(part, where, parameter.placements, run_check=False, **like)
            elif isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient

    def optimizer(self, *, offload: bool = False, in_pieces: bool = False) -> Optimizer:
        stored = self.stored()
        matrices = {p: how for name, p in self.named_parameters() if (how := stored[name]) is not None}
        if in_pieces:
            matrices |= {p: Stored(num=2) for name, p in self.named_parameters() if name == "cases.rows"}
        settings = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "scale": "match_adamw", "lr_ratio": 1.0}
        others = [p for p in self.parameters() if p not in matrices]
        groups = [
            {"params": list(matrices), "algorithm": "muon", "weight_decay": 0.1, **settings},
            {"params": others, "algorithm": "adamw", "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8},
        ]
        optimizer = Optimizer(groups, matrices=matrices, offload=offload)
        set_lr(optimizer, LR)
        return optimizer

    def whole(self) -> dict[str, Tensor]:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in self.named_parameters()
        }


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same for a name in every process."""
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-7:], "big"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def train(model: Model, optimizer: Optimizer, steps: range) -> dict[str, Tensor]:
    for step in steps:
        model.set_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
    return model.whole()


@contextmanager
def rows_in_the_wrong_order() -> Iterator[None]:
    """The planted fault: shards are put together a row late."""
    run = Exchange.run

    def late(self, read, transform, write):
        run(self, read, lambda stack: transform(stack.roll(1, dims=-2)), write)

    with patch.object(muon.Exchange, "run", late):
        yield


def main(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=4)
    meshes = {
        (4,): init_device_mesh("cpu", (4,)),
        (2, 2): init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
        (1, 4): init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard")),
    }
    found: dict[str, object] = {}
    model = Model(meshes)
    found["placements"] = {name: str(p.placements) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    optimizer = model.optimizer()
    train(model, optimizer, range(SAVED_AT))
    weights, moments = get_state_dict(model, optimizer)
    save({"policy": weights, "optimizer": moments}, checkpoint_id=out / "checkpoint")
    found["straight"] = train(model, optimizer, range(SAVED_AT, STEPS))
    found["replicas_agree"] = _agree(model, optimizer)

    resumed = Model(meshes)
    optimizer = resumed.optimizer()
    resume(resumed, optimizer, out / "checkpoint")
    found["resumed"] = train(resumed, optimizer, range(SAVED_AT, STEPS))

    offloaded = Model(meshes)
    found["offloaded"] = train(offloaded, offloaded.optimizer(offload=True), range(STEPS))
    faulty = Model(meshes)
    with rows_in_the_wrong_order():
        found["faulty"] = train(faulty, faulty.optimizer(), range(STEPS))

    model.set_gradients(0)
    found["norm"] = clip_gradients(model, MAX_NORM)
    found["clipped"] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(found, out / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def policy_on_eight(rank: int, out: Path, model: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'store-of-eight'}", rank=rank, world_size=8)
    meshes = EIGHT.meshes()
    ranks = Ranks(rank=rank, num=8, device=torch.device("cpu"), meshes=meshes)
    found = measure(make_policy(model, torch.float64, meshes), meshes, ranks, EIGHT.optimizer)
    if rank == 0:
        torch.save(found, out / "eight.pt")
    dist.barrier()
    dist.destroy_process_group()


def resume(model: Model, optimizer: Optimizer, directory: Path) -> None:
    weights, moments = get_state_dict(model, optimizer)
    load({"policy": weights, "optimizer": moments}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def _agree(model: Model, optimizer: Optimizer) -> dict[str, bool]:
    """Whether ranks with the same shard of a parameter have the same bits of it and of its moments."""
    agree = {}
    for name, parameter in model.named_parameters():
        held = [local(one.detach()) for one in (parameter, *optimizer.state[parameter].values())]
        of_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (_shard_key(parameter), held))
        agree[name] = all(
            all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
            for key, one in of_ranks
            for other_key, other in of_ranks
            if key == other_key
        )
    return agree


def _shard_key(parameter: Tensor) -> tuple[int, ...]:
    assert isinstance(parameter, DTensor)
    coordinate = parameter.device_mesh.get_coordinate()
    return tuple(index for index, where in zip(coordinate, parameter.placements, strict=True) if where != Replicate())


if __name__ == "__main__":
    arguments = tuple(map(Path, sys.argv[1:]))
    start_processes(main, arguments[:1], nprocs=4, start_method="fork")  # what is imported is imported once
    start_processes(policy_on_eight, arguments, nprocs=8, start_method="fork")
