"""The ranks of the trainer: one process each, laid out as `model/mesh.py` says."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from palestra.config.schema import Train
from palestra.core.errors import UserError
from palestra.model.kernels import known_kernels
from palestra.model.mesh import Meshes, make_meshes

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank's place among all. Without torchrun there is one rank, and the same code runs."""

    rank: int
    num: int
    device: torch.device
    meshes: Meshes

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """In place over the ranks with other packs: those of one context or tensor axis have the same readings."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.meshes.data)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.meshes.data)
        return tensor

    def from_first(self, thing: T) -> T:
        """What the first rank has, on every rank."""
        if self.num == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def to_first(self, thing: T) -> list[T]:
        """What every rank has, in the order of ranks, on the first one; what this rank has on the others."""
        if self.num == 1:
            return [thing]
        things: list[Any] | None = [None] * self.num if self.is_first else None
        dist.gather_object(thing, things, dst=0)
        return [thing] if things is None else things

    def settle(self) -> None:
        """Wait until the device has done what it was given: what it takes is told where it is spent."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        dist.barrier()


def join(train: Train, *, deadline_s: float) -> Ranks:
    """Meet the other ranks that torchrun started. No collective may take longer than `deadline_s`.

    Errors: UserError, if they are not as many as the layout asks for, or attention is asked for that does not work.
    """
    torch.set_num_threads(train.threads)
    num = int(os.environ.get("WORLD_SIZE", "1"))
    if num != train.num_ranks:
        raise UserError(
            f"train.replicate={train.replicate} x train.shard={train.shard} x train.context_parallel="
            f"{train.context_parallel} x train.tensor_parallel={train.tensor_parallel} needs {train.num_ranks} ranks, "
            f"but {num} were started; start with torchrun --nproc-per-node={train.num_ranks}, or change them"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = {} if "WORLD_SIZE" in os.environ else {"store": _own_store(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(seconds=deadline_s), **store)
    kernels = known_kernels(device, train.attention)
    meshes = make_meshes(
        device.type,
        replicate=train.replicate,
        shard=train.shard,
        context=train.context_parallel,
        context_kind=train.context_kind,
        tensor=train.tensor_parallel,
        experts=train.expert_parallel,
        kernels=kernels,
    )
    return Ranks(rank=dist.get_rank(), num=num, device=device, meshes=meshes)


def _own_store() -> Any:
    """For one rank: no port, no file."""
    return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def leave() -> None:
    dist.destroy_process_group()
