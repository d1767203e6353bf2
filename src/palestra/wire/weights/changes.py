"""What changed since the version that engines hold, as vLLM's `sparse_nccl` takes it: where, and what is there now.

Which weights exactly a process holds is told by a mark, of which each version of each life of the trainer has another.
Changes name the mark that they are taken from, the mark that they lead to, and a digest of all that is sent.

Every rank has each tensor whole for a moment, and keeps the version before of a part of them, in host memory.
N: elements of a tensor; C: those that changed, to the bit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from blake3 import blake3
from msgspec import Struct

MAX_SHARE = 0.5  # of a whole version's bytes: above it changes save little, and a version is staged whole
MAX_ELEMENTS = 2**31 - 1  # of a tensor, that vLLM's positions reach
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Tensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Patch:
    """Of the tensor that comes `order`-th. Shapes: `at_C` (int32, into the tensor laid flat) and `values_C`, on the
    CPU."""

    order: int
    name: str
    shape: tuple[int, ...]
    at_C: torch.Tensor
    values_C: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.at_C.nbytes + self.values_C.nbytes


class Kinship(Struct, frozen=True, kw_only=True):
    """What changes lead from and to, and the digest of everything that is sent, in its order."""

    base: str
    mark: str
    digest: str


@dataclass
class Changes:
    """Of one rank's part of a version. `is_whole`: something cannot be told as a change, or it is too much."""

    full_bytes: int = 0  # of all parts
    sent_bytes: int = 0
    is_whole: bool = False
    patches: list[Patch] = field(default_factory=list)

    def add(self, patch: Patch | None, *, max_bytes: float) -> None:
        """None: the tensor cannot be told as a change."""
        if patch is not None and patch.at_C.numel():
            self.patches.append(patch)
            self.sent_bytes += patch.num_bytes
        self.is_whole = self.is_whole or patch is None or self.sent_bytes > max_bytes
        if self.is_whole:
            self.patches.clear()


class Past:
    """One rank's part of the version that was staged or offered last, named by `mark`; empty while it is none."""

    def __init__(self, *, rank: int, num_ranks: int):
        self.mark = ""
        self._rank, self._loads = rank, [0] * num_ranks
        self._owners: dict[str, int] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def keep(self, tensors: Tensors, mark: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors; at their end they are the past."""
        if self.mark == mark:
            yield from tensors
            return
        self.mark = ""
        for name, tensor in tensors:
            if self._is_ours(name, tensor):
                self._keep(name, tensor.detach())
            yield name, tensor
        self.mark = mark

    def step(self, tensors: Tensors, mark: str) -> Changes:
        """What changed of this rank's part; afterwards `tensors` are the past, and whoever holds what was it before
        must be given all of these changes."""
        found, self.mark = Changes(), ""
        max_bytes = MAX_SHARE * sum(self._loads)
        for order, (name, tensor) in enumerate(tensors):
            found.full_bytes += tensor.nbytes
            if self._is_ours(name, tensor):
                found.add(self._patch(order, name, tensor.detach()), max_bytes=max_bytes)
        self.mark = mark
        return found

    def still(self) -> Patch:
        """A patch that changes nothing."""
        name, tensor = next(iter(self._kept.items()))
        return Patch(0, name, tuple(tensor.shape), torch.zeros(1, dtype=torch.int32), tensor.view(-1)[:1].clone())

    def _is_ours(self, name: str, tensor: torch.Tensor) -> bool:
        """Tensors come in one order on all ranks: each goes to whoever has least."""
        if name not in self._owners:
            owner = self._loads.index(min(self._loads))
            self._owners[name] = owner
            self._loads[owner] += tensor.nbytes
        return self._owners[name] == self._rank

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._kept:
            self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._kept[name].copy_(tensor)

    def _patch(self, order: int, name: str, tensor: torch.Tensor) -> Patch | None:
        before_N, after_N = self._kept[name].view(-1), tensor.contiguous().view(-1)
        differs_N = _words(before_N.to(tensor.device)) != _words(after_N)
        at_C = differs_N.nonzero().view(-1)
        values_C, at_C = after_N[at_C].cpu(), at_C.cpu()
        before_N[at_C] = values_C
        if at_C.numel() and (not tensor.is_floating_point() or tensor.numel() > MAX_ELEMENTS):
            return None
        return Patch(order, name, tuple(tensor.shape), at_C.to(torch.int32), values_C)


class Digest:
    """Of names, and of what is sent for them in their order: positions, values, positions, values."""

    def __init__(self, names: list[str]):
        self._hash = blake3("\n".join(names).encode())

    def update(self, tensor: torch.Tensor) -> None:
        self._hash.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def digest_of(patches: list[Patch]) -> str:
    digest = Digest([patch.name for patch in patches])
    for patch in patches:
        digest.update(patch.at_C)
        digest.update(patch.values_C)
    return digest.text


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Elements as integers: what is equal is equal to the bit, and not-a-number to itself."""
    return tensor.view(_WORDS[tensor.dtype.itemsize])
