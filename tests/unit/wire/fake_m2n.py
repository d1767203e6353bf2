"""NVIDIA's M2N without a GPU: what its documentation says that `reshard` does, in memory, for vLLM's classes to call.

A rank of a mesh has coordinates, row by row from `start_rank` on; along an axis that shards a dimension it has the
part of its coordinate, of equal ones. Every destination gets its part of what the sources' parts make up.
"""

import itertools
import queue
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer import m2n_engine, m2n_trainer

CPU = torch.device("cpu")
TAKE_S = 60


@dataclass(frozen=True)
class Mesh:
    dims: tuple[int, int]
    start_rank: int

    @property
    def ranks(self) -> range:
        return range(self.start_rank, self.start_rank + self.dims[0] * self.dims[1])

    def coordinate(self, rank: int) -> tuple[int, int]:
        return divmod(rank - self.start_rank, self.dims[1])


@dataclass(frozen=True)
class Shard:
    dim: int


@dataclass(frozen=True)
class Replicate:
    pass


Placements = list[Shard | Replicate]


def part(shape: tuple[int, ...], mesh: Mesh, placements: Placements, rank: int) -> tuple[slice, ...]:
    """That a rank has of a tensor."""
    found = [slice(0, size) for size in shape]
    for placement, num, index in zip(placements, mesh.dims, mesh.coordinate(rank), strict=True):
        if isinstance(placement, Shard):
            length, rest = divmod(shape[placement.dim], num)
            assert rest == 0, "parts are equal"
            found[placement.dim] = slice(index * length, (index + 1) * length)
    return tuple(found)


def num_parts(mesh: Mesh, placements: Placements) -> int:
    return next(num for num, placement in zip(mesh.dims, placements, strict=True) if isinstance(placement, Shard))


def put_together(parts: dict[int, Tensor], mesh: Mesh, placements: Placements) -> Tensor:
    """Copies must be equal to the bit."""
    shape = list(parts[mesh.start_rank].shape)
    for placement, num in zip(placements, mesh.dims, strict=True):
        if isinstance(placement, Shard):
            shape[placement.dim] *= num
    whole = torch.empty(shape, dtype=parts[mesh.start_rank].dtype)
    is_there = torch.zeros(shape, dtype=torch.bool)
    for rank, shard in parts.items():
        where = part(tuple(shape), mesh, placements, rank)
        assert not is_there[where].any() or torch.equal(whole[where], shard), "copies differ"
        whole[where], is_there[where] = shard, True
    assert is_there.all()
    return whole


class Group:
    """In the place of vLLM's communicator. `ranks`: the trainer's, where each is a process of its own."""

    device = CPU

    def __init__(self, exchange: "Exchange", port: int, rank: int, world: int, ranks: Any):
        self.rank, self._world, self._ranks, self.comm = rank, world, ranks, next(exchange.numbers)
        self._exchange, self._port, self._is_ended = exchange, port, False
        exchange.groups[self.comm] = self

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        if self.rank == src:
            for other in range(self._world):
                if other != src:
                    self._queue(src, other).put(tensor.clone())
        elif self._ranks is None or self.rank >= self._ranks.num:
            tensor.copy_(self._take(src))
        else:
            tensor.copy_(self._ranks.from_first(self._take(src) if self.rank == 0 else None))

    def send(self, shard: Tensor, targets: range) -> None:
        shards = {self.rank: shard} if self._ranks is None else dict(enumerate(self._ranks.to_first(shard)))
        if self._ranks is not None and self.rank:
            return  # the first one does it
        for source, target in itertools.product(shards, targets):
            self._queue(source, target).put(shards[source].clone())
        self._exchange.on_stream.add(self)

    def receive(self, sources: range) -> dict[int, Tensor]:
        return {source: self._take(source) for source in sources}

    def settle(self) -> None:
        """Until all is taken that this rank sent."""
        for target in range(self._world):
            while self._queue(self.rank, target).unfinished_tasks:
                self._require_living()
                threading.Event().wait(0.002)

    def destroy(self) -> None:
        self._is_ended = True

    def _take(self, source: int) -> Tensor:
        for _ in range(TAKE_S * 500):
            self._require_living()
            try:
                found = self._queue(source, self.rank).get(timeout=0.002)
            except queue.Empty:
                continue
            self._queue(source, self.rank).task_done()
            return found
        raise RuntimeError(f"rank {source} sent nothing")

    def _require_living(self) -> None:
        if self._is_ended:
            raise RuntimeError("the communicator was aborted")

    def _queue(self, source: int, target: int) -> queue.Queue:
        return self._exchange.queue(self._port, source, target)


class Exchange:
    """Where groups meet, by port."""

    def __init__(self, ranks: Any = None):
        self._ranks, self._lock = ranks, threading.Lock()
        self.numbers, self.groups = itertools.count(1), dict[int, Group]()
        self._queues: dict[tuple[int, int, int], queue.Queue] = defaultdict(queue.Queue)
        self._local = threading.local()
        self.worlds: list[int] = []
        self.moved: set[tuple[int, int]] = set()  # from how many parts a tensor came, into how many

    @property
    def on_stream(self) -> set[Group]:
        """Groups in which this thread has sent something, and has not waited for it."""
        if not hasattr(self._local, "groups"):
            self._local.groups = set()
        return self._local.groups

    def queue(self, *key: int) -> queue.Queue:
        with self._lock:
            return self._queues[key]  # type: ignore[index]

    def trainer(self, info: dict[str, Any], rank: int) -> Group:
        self.worlds.append(info["world_size"])
        return Group(self, info["master_port"], rank, info["world_size"], self._ranks)

    def worker(self, info: Any, parallel_config: Any) -> Group:
        return Group(self, info.master_port, info.rank_offset + parallel_config.rank, info.world_size, self._ranks)

    def reshard(
        self,
        src: Tensor | None,
        dst: Tensor | None,
        comm: int,
        stream: Any,
        *,
        src_mesh: Mesh,
        src_placements: Placements,
        dst_mesh: Mesh,
        dst_placements: Placements,
        handle: Any,
    ) -> None:
        group = self.groups[comm]
        if src is not None:
            group.send(src, dst_mesh.ranks)
        if dst is not None:
            whole = put_together(group.receive(src_mesh.ranks), src_mesh, src_placements)
            dst.copy_(whole[part(tuple(whole.shape), dst_mesh, dst_placements, group.rank)])
            self.moved.add((num_parts(src_mesh, src_placements), num_parts(dst_mesh, dst_placements)))

    def synchronize(self) -> None:
        while self.on_stream:
            self.on_stream.pop().settle()


def stand_in(monkeypatch: pytest.MonkeyPatch, ranks: Any = None) -> Exchange:
    """For NCCL, M2N and CUDA."""
    exchange = Exchange(ranks)
    nccl, m2n = ModuleType("nccl"), ModuleType("nccl.m2n")
    handle = SimpleNamespace(create=lambda config: SimpleNamespace(destroy=lambda: None))
    for name, thing in {"Mesh": Mesh, "Shard": Shard, "Replicate": Replicate, "Config": SimpleNamespace}.items():
        setattr(m2n, name, thing)
    m2n.Handle, m2n.reshard, nccl.m2n = handle, exchange.reshard, m2n  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nccl", nccl)
    monkeypatch.setitem(sys.modules, "nccl.m2n", m2n)
    monkeypatch.setattr(m2n_trainer, "trainer_init", exchange.trainer)
    monkeypatch.setattr(m2n_engine, "worker_init_process_group", exchange.worker)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: exchange)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return exchange
