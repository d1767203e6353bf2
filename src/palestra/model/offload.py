"""What layers save for their backward, in host memory until then.

Whole storages travel, each once per layer, however many tensors lie in it: what autograd would have kept is what is
moved. On CUDA they travel on a stream of their own, through pinned memory, while the next layer computes: two layers
are on the device at once, the one that computes and the one that travels. On a CPU the same runs without streams.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

_SMALL_BYTES = 1024  # not worth a journey


class Store(Protocol):
    """Where the tensors of one run of a layer are kept."""

    def pack(self, tensor: Tensor) -> Any: ...

    def unpack(self, packed: Any) -> Tensor: ...


class Keeper(Protocol):
    """Gives every run of a layer its store."""

    def run(self, layer: nn.Module, shared: Mapping[str, Any]) -> AbstractContextManager[Store]:
        """Around the forward of `layer`. `shared` are arguments that other layers have too: they stay."""
        ...


class Stay:
    """On the device, as autograd has it."""

    @contextmanager
    def run(self, layer: nn.Module, shared: Mapping[str, Any]) -> Iterator[Store]:
        yield self

    def pack(self, tensor: Tensor) -> Tensor:
        return tensor

    def unpack(self, packed: Tensor) -> Tensor:
        return packed


class Offload:
    """To the host when a layer is done, and back before its backward needs it."""

    def __init__(self, device: torch.device):
        self.lane = _Lane(device)
        self._latest: weakref.ref[_Cargo] | None = None

    @contextmanager
    def run(self, layer: nn.Module, shared: Mapping[str, Any]) -> Iterator[Store]:
        before = self._latest and self._latest()
        cargo = _Cargo(self.lane, layer, shared, before)
        self._latest = weakref.ref(cargo)
        disable: Any = torch.compiler.disable  # to be called by compiled layers, not compiled with them
        with saved_tensors_hooks(disable(cargo.pack), disable(cargo.unpack)):
            yield cargo
        cargo.close()
        if before is not None:
            before.leave()


class _Lane:
    """Copies between device and host, in order, beside the computation."""

    def __init__(self, device: torch.device):
        self.device, self._is_cuda = device, device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._is_cuda else None

    def to_host(self, flat: Tensor) -> Tensor:
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=self._is_cuda)
        self._copy(host, flat)
        return host

    def to_device(self, host: Tensor) -> Tensor:
        flat = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self._copy(flat, host)
        return flat

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Both belong to the stream that computes: it must `wait` before it uses or frees either."""
        if self._is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream) if self._is_cuda else nullcontext():
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """To wait for all copies up to here."""
        return self._stream.record_event() if self._is_cuda else None

    def wait(self, mark: Any) -> None:
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)


@dataclass
class _Piece:
    """One storage, as bytes: `flat` on the device, if it is there. `num_uses`: so often it will be unpacked."""

    flat: Tensor | None
    host: Tensor
    num_uses: int = 0


@dataclass(frozen=True)
class _Packed:
    piece: _Piece
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Cargo:
    """What one run of a layer saved."""

    def __init__(self, lane: _Lane, layer: nn.Module, shared: Mapping[str, Any], before: "_Cargo | None"):
        self._lane, self._layer = lane, layer
        self._before = None if before is None else weakref.ref(before)
        self._shared = {_address(leaf) for leaf in tree_leaves(dict(shared)) if isinstance(leaf, Tensor)}
        self._by_address: dict[int, _Piece] = {}
        self._pieces: list[_Piece] = []
        self._is_away = False
        self._mark: Any = None  # of the latest copy of it

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        if type(tensor) is not Tensor or tensor.device.type != self._lane.device.type or self._stays(tensor):
            return tensor
        address = _address(tensor)
        piece = self._by_address.get(address)
        if piece is None:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            piece = self._by_address[address] = _Piece(flat, self._lane.to_host(flat))
            self._pieces.append(piece)
        piece.num_uses += 1
        return _Packed(piece, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _stays(self, tensor: Tensor) -> bool:
        """What is small, shared, or a weight, which may have been gathered a moment ago."""
        address = _address(tensor)
        is_small = tensor.untyped_storage().nbytes() < _SMALL_BYTES
        return is_small or address in self._shared or any(address == _address(w) for w in self._layer.parameters())

    def unpack(self, packed: Tensor | _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._come_back()
        self._lane.wait(self._mark)
        self._mark = None
        if (before := self._before and self._before()) is not None:
            before._come_back()
        piece = packed.piece
        if piece.flat is None:
            raise RuntimeError("what a layer saved is in host memory for one backward; this is the second")
        typed = torch.empty(0, dtype=packed.dtype, device=piece.flat.device)
        typed.set_(piece.flat.untyped_storage(), packed.offset, packed.size, packed.stride)
        piece.num_uses -= 1
        if piece.num_uses == 0:
            piece.flat = None
        return typed

    def close(self) -> None:
        """The layer is through: nothing more is saved."""
        self._by_address.clear()
        self._mark = self._lane.mark()

    def leave(self) -> None:
        """Give up the device's memory, as soon as the copies are there."""
        self._lane.wait(self._mark)
        self._is_away = True
        for piece in self._pieces:
            piece.flat = None

    def _come_back(self) -> None:
        """Begin to, if it is away."""
        if self._is_away:
            self._is_away = False
            for piece in self._pieces:
                piece.flat = self._lane.to_device(piece.host)
            self._mark = self._lane.mark()


def _address(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
