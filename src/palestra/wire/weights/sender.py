"""The trainer's side of versions that are sent: vLLM's own backend, whose words to engines go another way.

All ranks gather one layer after the other from their shards; the first one broadcasts it (`nccl`; `changes_sender.py`
is of `sparse_nccl`, `shards_sender.py` of `nccl_m2n`). vLLM would ask engines itself; here the orchestrator does, and
`ask` tells it what.

This has never run on a GPU. Tests drive vLLM's classes with another process group in the place of NCCL's.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferUpdatePayload,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from palestra.core.errors import DeadlineError, InfrastructureError, PalestraError
from palestra.wire.weights.changes import Tensors

T = TypeVar("T")
Pass = Iterator[tuple[str, torch.Tensor]]
Told = queue.SimpleQueue[tuple[Literal["init", "update", "done", "failed"], Any]]
Ask = Callable[[Literal["init", "update"], dict[str, Any]], None]
_ABORTED_S = 15.0  # from the end of a process group until whoever was stuck in it is free


class StuckError(PalestraError):
    """What sends cannot be broken off: only the end of the process does."""


class Ranks(Protocol):
    """What a sender uses of the trainer's ranks."""

    @property
    def rank(self) -> int: ...
    @property
    def num(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def from_first(self, thing: T) -> T: ...
    def to_first(self, thing: T) -> list[T]: ...


@dataclass(frozen=True)
class Offer:
    """What a version comes to, if it is sent to engines that hold `base`; empty if that does not matter. Of what is
    sent, `shard_bytes` are gathered nowhere in the trainer."""

    sent_bytes: int
    full_bytes: int
    base: str = ""
    shard_bytes: int = 0


class Sender:
    """Of one rank. `tensors()` is a pass over the weights, a collective, always in one order.

    Each send is one pass on every rank, whatever happens on the first one: the others cannot know.
    """

    def __init__(self, tensors: Callable[[], Tensors], *, ranks: Ranks, host: str):
        self._source, self._ranks, self._host = _Weights(tensors), ranks, host
        self._engine: TrainerWeightTransferEngine | None = None
        self._told: Told | None = None  # of the send that goes on
        self._lock = threading.Lock()

    def prepare(self, mark: str) -> Offer | None:
        """For the weights as they are now, which `mark` names. A collective. None: they cannot be sent, stage them."""
        num_bytes = self._source.num_bytes
        return Offer(num_bytes, num_bytes)

    def passing(self, tensors: Pass, mark: str) -> Pass:
        """A pass that stages a version: the same tensors."""
        return tensors

    def send(self, ask: Ask, *, num_workers: int, is_new_group: bool, deadline_s: float) -> None:
        """What was prepared. A collective. `ask` is called in this thread.

        Errors: InfrastructureError, if an engine has failed or is late; then the next send needs a new group.
        StuckError, if the trainer must end.
        """
        self._told = told = queue.SimpleQueue()
        work = threading.Thread(target=self._work, args=(told, num_workers, is_new_group), daemon=True)
        late_s = 0 if self._is_sender else _ABORTED_S  # others wait for what it gives up
        ends_at = time.monotonic() + deadline_s + late_s
        self._begin()
        work.start()
        thing: Any
        while True:
            try:
                what, thing = told.get(timeout=max(0.0, ends_at - time.monotonic()))
            except queue.Empty:
                what, thing = "failed", DeadlineError("engines to receive a version (sync.deadline_s)", deadline_s)
            if what == "done":
                return
            if what == "failed":
                self._give_up(work)
                raise InfrastructureError(f"weights were not sent: {type(thing).__name__} {thing}") from thing
            self._say(ask, what, thing)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _work(self, told: Told, num_workers: int, is_new_group: bool) -> None:
        try:
            if self._ranks.device.type == "cuda":
                torch.cuda.set_device(self._ranks.device)  # each thread has its own
            if is_new_group or self._engine is None:
                self.close()
                self._take(self._meet(Client(told), num_workers), told)
            assert self._engine is not None
            assert isinstance(self._engine.client, Client)
            self._engine.client.told = told
            self._transfer(self._engine)
        except BaseException as error:
            told.put(("failed", error))
        else:
            told.put(("done", None))

    def _take(self, engine: TrainerWeightTransferEngine, told: Told) -> None:
        """Errors: InfrastructureError, if the send was given up meanwhile."""
        with self._lock:
            if self._told is told:
                self._engine = engine
                return
        engine.shutdown()
        raise InfrastructureError("engines came after the send was given up")

    @property
    def _is_sender(self) -> bool:
        return self._ranks.rank == 0

    def _meet(self, client: "Client", num_workers: int) -> TrainerWeightTransferEngine:
        info = NCCLTrainerInitInfo(
            rank=self._ranks.rank,
            master_address=self._host,
            master_port=free_port(self._host),
            world_size=1 + num_workers,
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def _begin(self) -> None:
        self._source.begin()

    def _transfer(self, engine: TrainerWeightTransferEngine) -> None:
        engine.send_weights()

    def _say(self, ask: Ask, what: Literal["init", "update"], info: dict[str, Any]) -> None:
        ask(what, info)

    def _give_up(self, work: threading.Thread) -> None:
        """The thread begins no transfer any more; one that meets nobody may be left alone.

        Errors: StuckError, if it is still in a transfer without its process group.
        """
        with self._lock:
            self._told, has_met = None, self._engine is not None
        self._abort()
        work.join(timeout=_ABORTED_S)
        if has_met and work.is_alive():
            raise StuckError(f"a send is stuck {_ABORTED_S:.0f} s after its process group was ended")
        self._finish()

    def _abort(self) -> None:
        self.close()

    def _finish(self) -> None:
        """What was broken off: other ranks are in it, too."""
        self._source.finish()


class _Weights(WeightSource):
    """Names and shapes never change: they are learned in a pass of their own, before the first send."""

    def __init__(self, tensors: Callable[[], Tensors]):
        self._tensors, self._metadata = tensors, list[ParamMeta]()
        self._pass: Pass = iter(())

    @property
    def num_bytes(self) -> int:
        """Of a version. A collective, the first time."""
        return sum(meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in self.metadata())

    def metadata(self) -> list[ParamMeta]:
        if not self._metadata:
            self._metadata = [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self._tensors()]
        return self._metadata

    def begin(self) -> None:
        """A pass, of which nothing is gathered yet."""
        self._pass = iter(self._tensors())

    def __iter__(self) -> Pass:
        return self._pass

    def finish(self) -> None:
        """The pass that was begun."""
        for _ in self._pass:
            pass


class Client:
    """Stands where vLLM's trainer side has an engine."""

    def __init__(self, told: Told):
        self.told = told

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.told.put(("init", init_info))

    def start_weight_update(self) -> None:
        """The orchestrator has started it."""

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self.told.put(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The orchestrator finishes it."""


def free_port(host: str) -> int:
    with socket.socket() as one:
        one.bind((host, 0))
        return one.getsockname()[1]
