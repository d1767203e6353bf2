"""How the trainer's ranks are laid out, and the process groups that follow from it.

Ranks are numbered replicate, shard, context, from the outside in. Weights of dense layers are sharded over `fsdp`,
which is shard x context; those of experts over the same ranks seen as efsdp x ep: each ep rank owns whole experts, and
shares them with the ranks of its efsdp. Ranks that differ in `context` only hold parts of the same packs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from palestra.model.context import Context, Ring, Ulysses

CONTEXTS = {"ulysses": Ulysses, "ring": Ring}


@dataclass(frozen=True)
class Meshes:
    """`dense` is replicate x fsdp, `experts` replicate x efsdp x ep. `data` has the ranks with other packs than this
    one's; this is number `data_rank` of them. `everyone` has all ranks of the layout, and so has `beside`, on CPUs, for
    what goes on in another thread than the steps' collectives."""

    dense: DeviceMesh
    experts: DeviceMesh
    everyone: dist.ProcessGroup
    beside: dist.ProcessGroup
    data: dist.ProcessGroup
    context: Context

    @property
    def data_rank(self) -> int:
        return dist.get_rank(self.data)

    @property
    def num_data(self) -> int:
        return dist.get_world_size(self.data)

    @property
    def num_shards(self) -> int:
        """Ranks that share one copy of the dense weights."""
        return self.dense["fsdp"].size()


def make_meshes(
    device_type: str,
    *,
    replicate: int = 1,
    shard: int = 1,
    context: int = 1,
    context_kind: str = "ulysses",
    experts: int = 1,
    kernels: tuple[str, ...] = ("padded",),
    ranks: Sequence[int] | None = None,
) -> Meshes:
    """A collective of all ranks. `ranks` are those of the layout, by default all; `kernels` what attends over
    packs.

    Errors: ValueError, if `experts` does not divide shard x context, or the ranks are not as many as the layout has.
    """
    members = torch.tensor(list(range(dist.get_world_size()) if ranks is None else ranks))
    fsdp = shard * context
    if fsdp % experts or len(members) != replicate * fsdp:
        raise ValueError(f"{len(members)} ranks cannot be {replicate} x {shard} x {context} with {experts} in ep")
    parts_DC = members.view(replicate * shard, context)
    contexts = _group_of(parts_DC)
    return Meshes(
        dense=DeviceMesh(device_type, members.view(replicate, fsdp), mesh_dim_names=("replicate", "fsdp")),
        experts=DeviceMesh(
            device_type,
            members.view(replicate, fsdp // experts, experts),
            mesh_dim_names=("replicate", "efsdp", "ep"),
        ),
        everyone=_group_of(members.view(1, -1)),
        beside=_group_of(members.view(1, -1), backend="gloo"),
        data=_group_of(parts_DC.T),
        context=Context(kernels) if context == 1 else CONTEXTS[context_kind](contexts, kernels),
    )


def _group_of(rows: torch.Tensor, backend: str | None = None) -> dist.ProcessGroup:
    """That of this rank's row; of the last row on a rank that is in none. Every rank makes all of them."""
    found: list[tuple[list[int], Any]] = [(row.tolist(), dist.new_group(row.tolist(), backend=backend)) for row in rows]
    mine = [group for row, group in found if dist.get_rank() in row]
    return mine[0] if mine else found[-1][1]
