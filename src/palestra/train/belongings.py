"""What a trainer keeps on its device between two steps, and where it is while an engine uses that device.

It stays where it is, if there is room for it beside the engine; else it goes to host memory, and the device's is given
back. Storages are emptied and filled: parameters, shards, moments and views of them remain the same tensors.
"""

import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from palestra.train.moments import local

_GIB = 2**30
_CONTEXT_BYTES = _GIB  # of CUDA in either process, which no allocator counts


def has_room(state_bytes: int, *, device_bytes: int, engine_share: float) -> bool:
    """Whether a trainer may keep so much beside an engine that takes `engine_share` of the device."""
    return state_bytes + _CONTEXT_BYTES <= (1 - engine_share) * device_bytes


class Belongings:
    """Of one rank. `tensors` are asked for anew each time; those in other memory than the device's are left alone.

    Keeps: as many bytes of host memory, pinned where there is CUDA, from the first time on that they are needed.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], device: torch.device, *, engine_share: float):
        self._tensors, self._device, self._engine_share = tensors, device, engine_share
        self._spare: dict[int, list[Tensor]] = {}  # host memory by size
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._has_said = ""

    def put_away(self) -> None:
        """To host memory, or nowhere where there is room."""
        if self._device.type == "cpu":
            return  # the engine's memory is the host's, too
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(self._device)
        total = torch.cuda.get_device_properties(self._device).total_memory
        if has_room(held, device_bytes=total, engine_share=self._engine_share):
            self._say(f"{held / _GIB:.1f} GiB stay on the device while the engine uses it")
            return
        moved = self.move()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_reserved(self._device)
        self._say(
            f"{moved / _GIB:.1f} GiB are kept in host memory while the engine uses {self._engine_share:.2f} of the "
            f"device, {left / _GIB:.1f} GiB stay"
        )

    def move(self) -> int:
        """Everything to host memory; returns the bytes."""
        for storage in self._storages():
            host = self._host_of(storage)
            host.copy_(_bytes_of(storage), non_blocking=True)
            self._away.append((storage, host))
        self._settle()
        for storage, _ in self._away:
            storage.resize_(0)
        return sum(host.nbytes for _, host in self._away)

    def bring_back(self) -> None:
        for storage, host in self._away:
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)
        self._settle()
        for _, host in self._away:
            self._spare.setdefault(host.nbytes, []).append(host)
        self._away = []

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Each once, whoever shares it."""
        seen: set[int] = set()
        for tensor in self._tensors():
            storage = local(tensor).untyped_storage()
            if storage.device.type == self._device.type and storage.nbytes() and storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage

    def _host_of(self, storage: torch.UntypedStorage) -> Tensor:
        """Memory that was pinned once serves all turns."""
        spare = self._spare.get(storage.nbytes())
        return spare.pop() if spare else _empty(storage.nbytes(), is_pinned=self._device.type == "cuda")

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _say(self, what: str) -> None:
        """Once, and again where it is something else: into the log."""
        if what != self._has_said:
            self._has_said = what
            print(f"launch.turns: {what}", file=sys.stderr)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Weights, buffers, and what the optimizer remembers."""
    yield from model.parameters()
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _empty(size: int, *, is_pinned: bool) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All of it, as a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
