"""The trainer's side of versions that are sent: vLLM's own `nccl` backend, whose words to engines go another way.

A rank gathers one layer after the other from its shards; the first rank broadcasts what it has gathered. vLLM would
ask engines itself; here the orchestrator does, and `ask` tells it what.

This has never run on a GPU. Tests drive vLLM's classes with another process group in the place of NCCL's.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferUpdatePayload,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from palestra.core.errors import DeadlineError, InfrastructureError

Ask = Callable[[Literal["init", "update"], dict[str, Any]], None]
_ABORTED_S = 15.0  # from the end of a process group until whoever was stuck in it is free


class Sender:
    """Of one rank. `tensors()` is a pass over the weights, a collective, always in one order."""

    def __init__(
        self, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]], *, rank: int, device: torch.device, host: str
    ):
        self._source, self._rank, self._device, self._host = _Weights(tensors), rank, device, host
        self._engine: TrainerWeightTransferEngine | None = None

    @property
    def num_bytes(self) -> int:
        """Of a version. A collective, the first time."""
        return sum(meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in self._source.metadata())

    def send(self, ask: Ask, *, num_workers: int, is_new_group: bool, deadline_s: float) -> None:
        """What the weights are now. A collective. `ask` is called in this thread.

        Errors: InfrastructureError, if an engine has failed or is late; then the next send needs a new group.
        """
        told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        work = threading.Thread(target=self._work, args=(told, num_workers, is_new_group), daemon=True)
        ends_at = time.monotonic() + deadline_s
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
            ask("init" if what == "init" else "update", thing)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _work(self, told: "queue.SimpleQueue[tuple[str, Any]]", num_workers: int, is_new_group: bool) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own
            if is_new_group or self._engine is None:
                self.close()
                self._engine = self._meet(_Client(told), 1 + num_workers)
            assert isinstance(self._engine.client, _Client)
            self._engine.client.told = told
            self._engine.send_weights()
        except BaseException as error:
            told.put(("failed", error))
        else:
            told.put(("done", None))

    def _meet(self, client: "_Client", world_size: int) -> TrainerWeightTransferEngine:
        info = NCCLTrainerInitInfo(
            rank=self._rank, master_address=self._host, master_port=_free_port(self._host), world_size=world_size
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def _give_up(self, work: threading.Thread) -> None:
        """Errors: InfrastructureError, if the thread is still stuck without its process group: the trainer must end."""
        self.close()
        work.join(timeout=_ABORTED_S)
        if work.is_alive():
            raise InfrastructureError(f"a send is stuck {_ABORTED_S:.0f} s after its process group was ended")
        self._source.finish()


class _Weights(WeightSource):
    """Names and shapes never change: they are learned in a pass of their own, before the first send."""

    def __init__(self, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]]):
        self._tensors, self._metadata = tensors, list[ParamMeta]()
        self._pass: Iterator[tuple[str, torch.Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        if not self._metadata:
            self._metadata = [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self._tensors()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._pass = iter(self._tensors())
        return self._pass

    def finish(self) -> None:
        """A pass that was broken off: other ranks are in it, too."""
        for _ in self._pass:
            pass


class _Client:
    """Stands where vLLM's trainer side has an engine."""

    def __init__(self, told: "queue.SimpleQueue[tuple[str, Any]]"):
        self.told = told

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.told.put(("init", init_info))

    def start_weight_update(self) -> None:
        """The orchestrator has started it."""

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self.told.put(("update", update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The orchestrator finishes it."""


def _free_port(host: str) -> int:
    with socket.socket() as one:
        one.bind((host, 0))
        return one.getsockname()[1]
