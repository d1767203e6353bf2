"""Samples into packs, packs onto ranks.

Legend: S samples, U units. A unit is what must share a pack: the samples of one rollout, or one sample.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CROSSOVER_TOKENS = 32_768
_GRAINS, _CANDIDATES = 4096, 64

Packs = list[list[int]]
Lengths = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class Packing:
    """Where every sample goes: `ranks[r][i]` are the samples (ascending indices) of rank r's i-th forward.

    Every rank has the same number of packs, the costliest first; an empty pack is `()`. Forwards with the same i run
    side by side and cost about the same. `split` names the `keep_together` ids whose samples did not fit one pack:
    what looks at a whole rollout sees each of its packs alone there.
    """

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    max_tokens: int
    num_tokens: int
    split: tuple[int, ...] = ()

    @property
    def num_microbatches(self) -> int:
        """Forwards per rank."""
        return len(self.ranks[0])

    @property
    def num_packs(self) -> int:
        return self.num_microbatches * len(self.ranks)

    @property
    def fill(self) -> float:
        """Real tokens / (packs x capacity), empty packs included; 0 where there are no packs."""
        return self.num_tokens / (self.num_packs * self.max_tokens) if self.num_packs else 0.0

    @property
    def pack_of_sample(self) -> NDArray[np.int64]:
        """[S]: the pack of each sample; packs are numbered rank by rank."""
        packs = [samples for rank in self.ranks for samples in rank]
        pack_S = np.zeros(sum(map(len, packs)), np.int64)
        for index, samples in enumerate(packs):
            pack_S[list(samples)] = index
        return pack_S


def pack(
    lengths: Lengths,
    *,
    max_tokens: int,
    num_ranks: int,
    keep_together: Sequence[int] | None = None,
    crossover_tokens: int = CROSSOVER_TOKENS,
) -> Packing:
    """Place samples into packs of at most `max_tokens`, the same number on every rank, at about equal cost.

    First-fit decreasing says how many packs it takes, or filling one pack after the other as full as possible, where
    that saves each rank one. Rounded up to a multiple of `num_ranks`, they are filled by longest-processing-time, or
    as found where that does not fit. Samples with the same `keep_together` id (the rollout) share a pack; an id longer
    than a pack is split into its samples and named in `Packing.split`. A pack is empty only if there are fewer units
    than packs. Deterministic.

    Units:   cost of a sample = length + length^2 / crossover_tokens, so that at `crossover_tokens` attention costs as
             much as everything else (about 12 x width for a dense transformer).
    Keeps:   every sample exactly once.
    Errors:  ValueError naming the sample, if one alone is too long or empty.
    Source:  Krell et al. 2021, arXiv:2107.02027; Johnson 1973 (first-fit decreasing); Gupta and Ho 1999 (minimum bin
             slack); Graham 1969 (longest first).
    """
    lengths_S = _checked(lengths, max_tokens, num_ranks)
    unit_S, split = _units(lengths_S, max_tokens, keep_together)
    tokens_U = np.bincount(unit_S, weights=lengths_S).astype(np.int64)
    cost_S = lengths_S + lengths_S.astype(np.float64) ** 2 / crossover_tokens
    cost_U = np.bincount(unit_S, weights=cost_S).astype(np.float64)
    packs = _first_fit_decreasing(tokens_U, max_tokens)
    if -(-len(packs) // num_ranks) > -(-int(tokens_U.sum()) // (max_tokens * num_ranks)):
        packs = min(packs, _fullest_first(tokens_U, max_tokens), key=len)
    num_packs = -(-len(packs) // num_ranks) * num_ranks
    packs = _longest_first(tokens_U, cost_U, max_tokens, num_packs) or _extend(packs, cost_U, num_packs)
    samples = _samples_of_units(unit_S, len(tokens_U))
    ranks = tuple(
        tuple(tuple(sorted(sample for unit in units for sample in samples[unit])) for units in packs_of_rank)
        for packs_of_rank in _deal(packs, cost_U, num_ranks)
    )
    return Packing(ranks=ranks, max_tokens=max_tokens, num_tokens=int(lengths_S.sum()), split=split)


def _checked(lengths: Lengths, max_tokens: int, num_ranks: int) -> NDArray[np.int64]:
    if max_tokens < 1 or num_ranks < 1:
        raise ValueError(f"max_tokens={max_tokens}, num_ranks={num_ranks}: both must be at least 1")
    lengths_S = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((lengths_S < 1) | (lengths_S > max_tokens))
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"sample {index} has {lengths_S[index]} tokens, a pack holds 1 to {max_tokens}; "
            "raise max_tokens or drop the sample"
        )
    return lengths_S


def _units(
    lengths_S: NDArray[np.int64], max_tokens: int, keep_together: Sequence[int] | None
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """The unit of every sample, numbered without gaps, and the ids that had to be split."""
    every_sample_S = np.arange(len(lengths_S))
    if keep_together is None:
        return every_sample_S, ()
    if len(keep_together) != len(lengths_S):
        raise ValueError(
            f"keep_together has {len(keep_together)} ids for {len(lengths_S)} samples; give one per sample"
        )
    ids, id_S = np.unique(np.asarray(keep_together), return_inverse=True)
    is_split = np.bincount(id_S, weights=lengths_S, minlength=len(ids)) > max_tokens
    apart_S = np.where(is_split[id_S], len(ids) + every_sample_S, id_S)
    return np.unique(apart_S, return_inverse=True)[1], tuple(ids[is_split].tolist())


def _samples_of_units(unit_S: NDArray[np.int64], num_units: int) -> list[list[int]]:
    samples: list[list[int]] = [[] for _ in range(num_units)]
    for sample, unit in enumerate(unit_S.tolist()):
        samples[unit].append(sample)
    return samples


def _first_fit_decreasing(tokens_U: NDArray[np.int64], capacity: int) -> Packs:
    """First-fit decreasing, one pack at a time: the largest unit left that still fits, until none does.

    That is the same packing as placing each unit, longest first, into the first pack with room, in O(U log U): a
    binary search finds the next size that fits, and `_next_free` jumps over units that are already placed.
    """
    order = np.argsort(-tokens_U, kind="stable").tolist()
    negative_sizes: list[int] = np.sort(-tokens_U).tolist()
    successor = list(range(len(order) + 1))
    packs: Packs = []
    while (position := _next_free(successor, 0)) < len(order):
        room, units = capacity, []
        while position < len(order):
            units.append(order[position])
            room += negative_sizes[position]
            successor[position] = position + 1
            position = _next_free(successor, max(position + 1, bisect_left(negative_sizes, -room)))
        packs.append(units)
    return packs


def _next_free(successor: list[int], position: int) -> int:
    """First position >= `position` that is not placed; halves the path it walked (union-find)."""
    while successor[position] != position:
        successor[position] = successor[successor[position]]
        position = successor[position]
    return position


def _fullest_first(tokens_U: NDArray[np.int64], capacity: int) -> Packs:
    """One pack at a time: the largest unit left, and of the others those that leave the least room.

    A sum of sizes is a bit of an integer, so that one shift adds a unit to all sums at once. Long packs are cut into
    `_GRAINS`, and at most `_CANDIDATES` units of all sizes are tried, to bound the time.
    """
    grain = -(-capacity // _GRAINS)
    grains: list[int] = (-(-tokens_U // grain)).tolist()
    left: list[int] = np.argsort(-tokens_U, kind="stable").tolist()
    packs: Packs = []
    while left:
        first, *rest = left
        room = capacity // grain - grains[first]
        fitting = [unit for unit in rest if grains[unit] <= room]
        tried = fitting[:: -(-len(fitting) // _CANDIDATES) or 1][::-1]
        sums = [1]  # that the first so many of `tried` can reach
        for unit in tried:
            sums.append((sums[-1] | sums[-1] << grains[unit]) & ((2 << room) - 1))
        missing, chosen = sums[-1].bit_length() - 1, {first}
        for unit, without in zip(tried[::-1], sums[-2::-1], strict=True):  # large ones first: small ones fit later, too
            if missing >= grains[unit] and without >> (missing - grains[unit]) & 1:
                chosen.add(unit)
                missing -= grains[unit]
        packs.append([unit for unit in left if unit in chosen])
        left = [unit for unit in left if unit not in chosen]
    return packs


def _longest_first(
    tokens_U: NDArray[np.int64], cost_U: NDArray[np.float64], capacity: int, num_packs: int
) -> Packs | None:
    """Costliest unit first, always into the cheapest pack; None if that runs out of room.

    A pack without room for a unit is closed for the (mostly smaller) ones that follow, so each is set aside once.
    """
    tokens, costs = tokens_U.tolist(), cost_U.tolist()
    packs: Packs = [[] for _ in range(num_packs)]
    room = [capacity] * num_packs
    cheapest = [(0.0, index) for index in range(num_packs)]  # sorted, so already a heap
    for unit in np.argsort(-cost_U, kind="stable").tolist():
        while cheapest and room[cheapest[0][1]] < tokens[unit]:
            heapq.heappop(cheapest)
        if not cheapest:
            return None
        cost, index = cheapest[0]
        packs[index].append(unit)
        room[index] -= tokens[unit]
        heapq.heapreplace(cheapest, (cost + costs[unit], index))
    return packs


def _extend(packs: Packs, cost_U: NDArray[np.float64], num_packs: int) -> Packs:
    """Up to `num_packs` packs, by halving the costliest that has two units or more."""
    costs = cost_U.tolist()
    packs = [sorted(units, key=costs.__getitem__, reverse=True) for units in packs]
    costliest = [(-sum(costs[unit] for unit in units), index) for index, units in enumerate(packs) if len(units) > 1]
    heapq.heapify(costliest)
    while len(packs) < num_packs and costliest:
        _, index = heapq.heappop(costliest)
        packs.append(packs[index][1::2])
        packs[index] = packs[index][0::2]
        for half in (index, len(packs) - 1):
            if len(packs[half]) > 1:
                heapq.heappush(costliest, (-sum(costs[unit] for unit in packs[half]), half))
    return packs + [[] for _ in range(num_packs - len(packs))]


def _deal(packs: Packs, cost_U: NDArray[np.float64], num_ranks: int) -> list[Packs]:
    """Rows of packs of similar cost, one per rank; in a row the costliest goes to the rank with the least so far."""
    costs = cost_U.tolist()
    cost_of_pack = [sum(costs[unit] for unit in units) for units in packs]
    costliest_first = sorted(range(len(packs)), key=lambda index: -cost_of_pack[index])
    load = [0.0] * num_ranks
    ranks: list[Packs] = [[] for _ in range(num_ranks)]
    for start in range(0, len(packs), num_ranks):
        least_loaded_first = sorted(range(num_ranks), key=load.__getitem__)
        for rank, index in zip(least_loaded_first, costliest_first[start : start + num_ranks], strict=True):
            ranks[rank].append(packs[index])
            load[rank] += cost_of_pack[index]
    return ranks
