"""The documents of a pack: where they lie, and which tokens this rank has of them.

Legend: T tokens of a pack with its padding, t those of them on this rank, N documents, K scored tokens, S slots of the
padded layout, L longest document of a group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from msgspec import Struct, field
from torch import Tensor

from palestra.model.context import WHOLE, Context

_SHORT = 32  # documents up to this length share a group, whatever padding that costs


class Documents(Struct, frozen=True, kw_only=True, eq=False):
    """Where the documents of one pack lie. Made once per pack; every layer uses it.

    Shapes: `ends` [N + 1] from 0; `source` [S] is the token in each slot (0 where it is padding); `slot` [T] the slot
    of each token; `groups` has (n, L) for each block of n * L slots. `positions` [1, t]: each document counts from 0.
    `part` [t] are this rank's tokens, `is_real` those of them that are no padding; `owner` and `place` [T] the rank
    that has a token and where in its part. `masks` are those that a kernel has made of it, by window, and `taken`
    the names of the kernels that attended over it.
    A context of several ranks needs T to be a multiple: what fills it up is one more document at the end.
    No dataclass: FSDP makes those anew for every layer, which would forget the masks.
    """

    context: Context
    lengths: tuple[int, ...]
    ends: Tensor
    source: Tensor
    slot: Tensor
    groups: tuple[tuple[int, int], ...]
    positions: Tensor
    part: Tensor
    is_real: Tensor
    owner: Tensor
    place: Tensor
    masks: dict[int | None, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def take(self, stream: Tensor, *, padding: int = 0) -> Tensor:
        """This rank's [t, ...] of what is [T, ...] for a pack's tokens, padding included."""
        missing = (0,) * (2 * stream.dim() - 1) + (len(self.slot) - len(stream),)
        return F.pad(stream, missing, value=padding)[self.part]


def documents_of(lengths: list[int], device: torch.device | str = "cpu", context: Context = WHOLE) -> Documents:
    """The layout of documents of these lengths, in this order. Errors: ValueError for an empty document."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a pack needs documents of at least one token, got lengths {lengths}")
    missing = -sum(lengths) % context.pieces
    padded = (*lengths, missing) if missing else tuple(lengths)
    ends = F.pad(torch.tensor(padded).cumsum(0), (1, 0))
    num = int(ends[-1])
    position = torch.arange(num) - ends[:-1].repeat_interleave(ends.diff())
    part, owner, place = context.part(num), torch.empty(num, dtype=torch.int64), torch.empty(num, dtype=torch.int64)
    for rank in range(context.size):
        tokens = context.part_of(rank, num)
        owner[tokens], place[tokens] = rank, torch.arange(len(tokens))
    source, slot, groups = _slots(padded, ends)
    return Documents(
        context=context,
        lengths=padded,
        ends=ends.to(device, torch.int32),
        source=source.to(device),
        slot=slot.to(device),
        groups=groups,
        positions=position[part].unsqueeze(0).to(device),
        part=part.to(device),
        is_real=(part < sum(lengths)).to(device),
        owner=owner.to(device),
        place=place.to(device),
    )


def _slots(lengths: tuple[int, ...], ends: Tensor) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
    source, groups, first_slot = [], [], 0
    slot = torch.empty(int(ends[-1]), dtype=torch.int64)
    for members in _group(lengths):
        longest = lengths[members[0]]
        length_N = torch.tensor([lengths[member] for member in members])
        column_L = torch.arange(longest)
        is_token_NL = column_L < length_N[:, None]
        token_NL = torch.where(is_token_NL, ends[torch.tensor(members)][:, None] + column_L, 0)
        slot_NL = first_slot + torch.arange(token_NL.numel()).view_as(token_NL)
        slot[token_NL[is_token_NL]] = slot_NL[is_token_NL]
        source.append(token_NL.flatten())
        groups.append((len(members), longest))
        first_slot += token_NL.numel()
    return torch.cat(source), slot, tuple(groups)


def _group(lengths: tuple[int, ...]) -> list[list[int]]:
    """Documents, longest first, in groups whose shortest is at least half as long as the longest (or short anyway)."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or (longest > _SHORT and 2 * lengths[index] < longest):
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups
