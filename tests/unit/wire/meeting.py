"""Versions that are sent, without GPUs: queues in the place of NCCL's process group, and who asks for whom.

vLLM's own classes are at both ends.
"""

import asyncio
import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

from palestra.core.errors import InfrastructureError
from palestra.wire.sending import Sending
from palestra.wire.weights.sender import Sender

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, as vLLM's layers are imported
    from vllm.distributed.weight_transfer import sparse_nccl_engine
    from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

    from palestra.wire.weights import vllm_engine

CPU = torch.device("cpu")


class Alone:
    """The ranks of a trainer that has one."""

    rank, num, device = 0, 1, CPU

    def from_first(self, thing):
        return thing

    def to_first(self, thing):
        return [thing]


class Meeting:
    """Where groups meet: by port, each with a queue for every worker."""

    def __init__(self):
        self.groups: dict[int, dict[int, queue.Queue]] = {}
        self.worlds: list[int] = []
        self._lock = threading.Lock()

    def queues(self, port: int) -> dict[int, queue.Queue]:
        with self._lock:
            return self.groups.setdefault(port, {})

    def trainer(self, info: Any) -> "Group":
        queues = self.queues(info.master_port)
        for rank in range(1, info.world_size):
            queues.setdefault(rank, queue.Queue())
        self.worlds.append(info.world_size)
        return Group(queues, 0)

    def worker(self, info: Any, parallel_config: Any) -> "Group":
        queues = self.queues(info.master_port)
        queues.setdefault(info.rank_offset, queue.Queue())
        return Group(queues, info.rank_offset)


class Group:
    """What is broadcast arrives in order; a sender waits until its receivers have taken all."""

    device = CPU

    def __init__(self, queues: dict[int, queue.Queue], rank: int):
        self._queues, self._rank, self._is_ended = queues, rank, False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert src == 0
        if self._rank:
            tensor[...] = self._queues[self._rank].get(
                timeout=60
            )  # as patches are put in place, vLLM has another copy_
            self._queues[self._rank].task_done()
            return
        for one in self._queues.values():
            one.put(self.on_its_way(tensor.clone()))
        for one in self._queues.values():
            while one.unfinished_tasks:
                if self._is_ended:
                    raise RuntimeError("the communicator was aborted")
                threading.Event().wait(0.005)

    @staticmethod
    def on_its_way(tensor: torch.Tensor) -> torch.Tensor:
        """Where a test may do harm."""
        return tensor

    def destroy(self) -> None:
        self._is_ended = True


def one_at_a_time(put: Callable[..., Any]) -> Callable[..., Any]:
    """Engines of one test are in one process, all of which vLLM's way to put patches in place takes for itself."""
    lock = threading.Lock()

    def locked(*arguments: Any, **options: Any) -> Any:
        with lock:
            return put(*arguments, **options)

    return locked


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    """For NCCL and CUDA, in vLLM's classes of both backends."""
    met = Meeting()
    for module in (nccl_engine, sparse_nccl_engine):
        monkeypatch.setattr(module, "open_trainer_endpoint", met.trainer)
        monkeypatch.setattr(module, "worker_init_process_group", met.worker)
    put = one_at_a_time(load_checkpoint_weight_patches)
    monkeypatch.setattr(sparse_nccl_engine, "load_checkpoint_weight_patches", put)
    streams = (SimpleNamespace(synchronize=lambda: None),) * 2
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda *_: streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda _: nullcontext())
    monkeypatch.setattr(vllm_engine, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(vllm_engine, "finalize_layerwise_reload", lambda model, config: None)
    return met


class Trainer:
    """The trainer's process: hears `SendWeights`, and says what vLLM's side of it wants of engines. `gives_up`: when an
    engine has failed, as it would at its deadline."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        deadline_s: float = 20,
        sends: type[Sender] = Sender,
        width: int = 1,
    ):
        self.tensors, self.deadline_s, self.width = tensors, deadline_s, width
        self.sender = sends(lambda: self.tensors.items(), ranks=Alone(), host="127.0.0.1")
        self.sending: Sending
        self.error, self.gives_up = "", False
        self.met: list[Any] = []

    async def begin(self, engines) -> bool:
        loop, is_new, self.met = asyncio.get_running_loop(), list(engines) != self.met, list(engines)

        def send() -> None:
            try:
                self.sender.send(
                    lambda what, info: loop.call_soon_threadsafe(self.sending.asked, what, info),  # type: ignore[arg-type]
                    num_workers=len(self.met) * self.width,
                    is_new_group=is_new,
                    deadline_s=self.deadline_s,
                )
            except InfrastructureError as failure:
                self.error = str(failure)
            loop.call_soon_threadsafe(self.sending.sent, self.error)

        self.thread = threading.Thread(target=send)
        self.thread.start()
        return is_new

    async def send_to(self, *engines: Any) -> list[BaseException | None]:
        self.sending = Sending(engines, self.begin, width=self.width)  # type: ignore[arg-type]

        async def one(engine: Any) -> None:
            try:
                async with asyncio.timeout(60):
                    await self.sending.into(engine, deadline_s=20)  # type: ignore[arg-type]
            except Exception as failure:
                for sender in getattr(self.sender, "senders", [self.sender]) if self.gives_up else ():
                    sender._told.put(("failed", failure))
                await self.sending.leave(engine)  # type: ignore[arg-type]
                raise

        found = await asyncio.gather(*map(one, engines), return_exceptions=True)
        await asyncio.to_thread(self.thread.join, 20)
        return found
