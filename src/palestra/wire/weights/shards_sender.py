"""The trainer's side of versions that are sent from where they lie, by vLLM's own `nccl_m2n` backend.

Every rank is in the process group with the workers, and sends its part of a tensor, where parts in the order of ranks
are what the ranks have of it; else the tensor is gathered to all of them, with no more of its layer than must be, and
they are copies of each other. vLLM's workers say where each one goes.

This has never run on a GPU, and NVIDIA's `nccl-extensions`, which moves the parts, runs on nothing else. It needs NCCL
2.30.5 and VLLM_NCCL_SO_PATH at the very library that it was linked against. Tests drive vLLM's classes with a stand-in.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.m2n_common import (
    MAX_SOURCE_SHARDS,
    REPLICATE,
    REPLICATED,
    M2NMesh,
    M2NParamMeta,
    check_transferable,
    import_m2n,
)
from vllm.distributed.weight_transfer.m2n_source import M2NWeightSource
from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo, M2NTrainerWeightTransferEngine

from palestra.core.errors import InfrastructureError, UserError
from palestra.wire.weights.sender import Ask, Client, Offer, Pass, Ranks, Sender, free_port

MAX_PARTS = MAX_SOURCE_SHARDS  # of a tensor that a worker gets whole, as vLLM fuses it with others


class Lying(Protocol):
    """A tensor; `dim` is that of which each rank has one part, None if each has all of it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dim(self) -> int | None: ...


class Weights(Protocol):
    """`copies` of them lie one after the other on the ranks. `tensors()` is a pass, a collective, in the order of
    `lying`, over what this rank has."""

    @property
    def copies(self) -> int: ...
    @property
    def lying(self) -> Sequence[Lying]: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class ShardsSender(Sender):
    """All ranks send: each gives up by itself, and none goes on where one has failed."""

    def __init__(self, weights: Weights, *, ranks: Ranks, host: str):
        """Errors: UserError, if nothing is there to send with, or a tensor cannot be sent."""
        require_m2n()
        super().__init__(weights.tensors, ranks=ranks, host=host)
        self._source = self._shards = Source(weights, num_ranks=ranks.num)
        self._port = 0

    def prepare(self, mark: str) -> Offer | None:
        num_bytes = self._source.num_bytes
        return Offer(num_bytes, num_bytes, shard_bytes=self._shards.shard_bytes)

    def send(self, ask: Ask, *, num_workers: int, is_new_group: bool, deadline_s: float) -> None:
        error = ""
        try:
            super().send(ask, num_workers=num_workers, is_new_group=is_new_group, deadline_s=deadline_s)
        except InfrastructureError as failure:
            error = str(failure)
        error = self._ranks.from_first("; ".join(sorted({*self._ranks.to_first(error)} - {""})))
        if error:
            self.close()
            raise InfrastructureError(error)

    @property
    def _is_sender(self) -> bool:
        return True

    def _begin(self) -> None:
        self._port = self._ranks.from_first(free_port(self._host))
        super()._begin()

    def _meet(self, client: Client, num_workers: int) -> TrainerWeightTransferEngine:
        """Workers of one engine, among which its matrices are split."""
        info = M2NTrainerInitInfo(
            rank=self._ranks.rank,
            master_address=self._host,
            master_port=self._port,
            world_size=self._ranks.num + num_workers,
            num_trainer_ranks=self._ranks.num,
            dst_mesh_dims=(1, num_workers),
        )
        return Engine.trainer_init(info, client=client, source=self._shards)

    def _abort(self) -> None:
        """vLLM's side would wait for the device first, which waits for whoever is gone."""
        if (engine := self._shards.engine) is not None and engine.group is not None:
            engine.group.destroy()
        super()._abort()


class Engine(M2NTrainerWeightTransferEngine):
    """Known before it meets anybody, so that it can be broken off while it does."""

    def __init__(self, *, source: M2NWeightSource, **options: Any):
        super().__init__(source=source, **options)
        cast("Source", source).engine = self


class Source(M2NWeightSource):
    def __init__(self, weights: Weights, *, num_ranks: int):
        self._weights, self._num_ranks = weights, num_ranks
        self._pass: Pass = iter(())
        self.engine: Engine | None = None  # the newest
        for tensor in weights.lying:
            try:
                check_transferable(tensor.name, tensor.dtype, tensor.shape)
            except ValueError as error:
                raise UserError(f"sync.kind=nccl_m2n cannot send {error}; use sync.kind=nccl") from error

    @property
    def num_bytes(self) -> int:
        return sum(map(_bytes, self._weights.lying))

    @property
    def shard_bytes(self) -> int:
        return sum(_bytes(tensor) for tensor in self._weights.lying if tensor.dim is not None)

    def mesh(self) -> M2NMesh:
        """Copies, and the parts of each."""
        return M2NMesh((self._weights.copies, self._num_ranks // self._weights.copies), 0)

    def metadata(self) -> list[ParamMeta]:
        return [
            M2NParamMeta(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                REPLICATED if tensor.dim is None else (REPLICATE, tensor.dim),
            )
            for tensor in self._weights.lying
        ]

    def begin(self) -> None:
        self._pass = iter(self._weights.tensors())

    def __iter__(self) -> Pass:
        return self._pass

    def finish(self) -> None:
        for _ in self._pass:
            pass


def require_m2n() -> None:
    """Errors: UserError, if what moves the parts is not installed."""
    try:
        import_m2n()
    except ImportError as error:
        raise UserError(f"sync.kind=nccl_m2n: {error}; install it, or use sync.kind=nccl") from error


def _bytes(tensor: Lying) -> int:
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
