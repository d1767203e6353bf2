"""How the trainer's ranks are laid out, and the process groups that follow from it.

Ranks are numbered replicate, shard, context, tensor, from the outside in. Ranks that differ in `tensor` only have the
same tokens and parts of the same matrices; those that differ in `context` only hold parts of the same packs. Weights of
dense layers are sharded over `fsdp`, which is shard x context; embeddings and head over `fsdp` x `tensor`, and so are
those of experts, seen as efsdp x ep: each ep rank owns whole experts, and shares them with the ranks of its efsdp.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from palestra.model.context import Context, Ring, Ulysses
from palestra.model.tensor import ALONE, Axis, TensorRanks

CONTEXTS = {"ulysses": Ulysses, "ring": Ring}


@dataclass(frozen=True)
class Meshes:
    """`ranks` is replicate x fsdp x tensor, `dense` the first two of it; `root` is replicate x (fsdp x tensor) and
    `experts` replicate x efsdp x ep. `data` has the ranks with other packs than this one's; this is number `data_rank`
    of them. `tokens` has those with other tokens, whether of other packs or not. `everyone` has all ranks of the
    layout, and so has `beside`, on CPUs, for what goes on in another thread than the steps' collectives."""

    ranks: DeviceMesh
    root: DeviceMesh
    experts: DeviceMesh
    tokens: dist.ProcessGroup
    everyone: dist.ProcessGroup
    beside: dist.ProcessGroup
    data: dist.ProcessGroup
    context: Context
    tensor: Axis

    @property
    def dense(self) -> DeviceMesh:
        return self.ranks["replicate", "fsdp"]

    @property
    def data_rank(self) -> int:
        return dist.get_rank(self.data)

    @property
    def num_data(self) -> int:
        return dist.get_world_size(self.data)

    @property
    def num_shards(self) -> int:
        """Ranks that share one copy of the weights that are whole on no axis."""
        return self.root["fsdp"].size()


def make_meshes(
    device_type: str,
    *,
    replicate: int = 1,
    shard: int = 1,
    context: int = 1,
    context_kind: str = "ulysses",
    tensor: int = 1,
    experts: int = 1,
    kernels: tuple[str, ...] = ("padded",),
    ranks: Sequence[int] | None = None,
) -> Meshes:
    """A collective of all ranks. `ranks` are those of the layout, by default all; `kernels` what attends over
    packs.

    Errors: ValueError, if `experts` does not divide shard x context x tensor, or the ranks are not as many as the
    layout has.
    """
    members = torch.tensor(list(range(dist.get_world_size()) if ranks is None else ranks))
    sharing = shard * context * tensor
    if sharing % experts or len(members) != replicate * sharing:
        raise ValueError(
            f"{len(members)} ranks cannot be {replicate} x {shard} x {context} x {tensor} with {experts} in ep"
        )
    parts_DCT = members.view(replicate * shard, context, tensor)

    def mesh_of(**sizes: int) -> DeviceMesh:
        ranks = members.view(replicate, *sizes.values())
        names = ("replicate", *sizes)
        groups = [
            _group_of(ranks.movedim(index, -1).flatten(0, -2), name if name in BESIDE_SHARDS else "shards")
            for index, name in enumerate(names)
        ]
        return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)

    contexts = _group_of(parts_DCT.transpose(1, 2).reshape(-1, context), "context")
    return Meshes(
        ranks=mesh_of(fsdp=shard * context, tensor=tensor),
        root=mesh_of(fsdp=sharing),
        experts=mesh_of(efsdp=sharing // experts, ep=experts),
        tokens=_group_of(parts_DCT.view(-1, tensor).T),
        everyone=_group_of(members.view(1, -1)),
        beside=_group_of(members.view(1, -1), "beside", backend="gloo"),
        data=_group_of(parts_DCT.flatten(1).T),
        context=Context(kernels) if context == 1 else CONTEXTS[context_kind](contexts, kernels),
        tensor=ALONE if tensor == 1 else TensorRanks(_group_of(parts_DCT.view(-1, tensor), "tensor")),
    )


BESIDE_SHARDS = ("ep", "tensor")  # axes whose collectives go on while weights are gathered: in groups of their own
_MADE: dict[tuple[Any, ...], Any] = {}  # by the world that they are of, what they are for, and their ranks


def _group_of(rows: torch.Tensor, purpose: str = "shards", backend: str | None = None) -> dist.ProcessGroup:
    """That of this rank's row; of all ranks on one that is in none. Every rank makes all of them, once: gloo's have
    threads that wake a hundred times a second."""
    mine: Any = dist.group.WORLD
    for row in rows.tolist():
        key = dist.group.WORLD, purpose, tuple(row)
        if key not in _MADE:
            _MADE[key] = dist.new_group(row, backend=backend, timeout=_deadline())
        if dist.get_rank() in row:
            mine = _MADE[key]
    return mine


def group_among(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Theirs: the one that was made, as torch waits for ever for another of the same ranks; else a new one, which only
    they have to ask for."""
    whole, alone = ((dist.group.WORLD, purpose, tuple(ranks)) for purpose in ("shards", "among"))
    if whole not in _MADE and alone not in _MADE:
        _MADE[alone] = dist.new_group(list(ranks), use_local_synchronization=True, timeout=_deadline())
    return _MADE[whole if whole in _MADE else alone]


def _deadline() -> timedelta:
    """That of the world, which torch does not hand on: its own for other groups is ten minutes, or thirty."""
    world: Any = dist.group.WORLD
    return world._get_backend(torch.device("cpu")).options._timeout
