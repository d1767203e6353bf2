"""Laws of packing. A sample's cost is its length plus its length squared over the crossover."""

import math
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from palestra.algo.packing import CROSSOVER_TOKENS, Packing, _first_fit_decreasing, pack

law = settings(deadline=None)  # a busy machine may stall any one example

CAPACITY = 64
lengths_st = st.lists(st.integers(1, CAPACITY), max_size=60)
ranks_st = st.integers(1, 7)


def packs_of(packing: Packing) -> list[tuple[int, ...]]:
    return [samples for rank in packing.ranks for samples in rank]


def cost(lengths: list[int], samples: tuple[int, ...]) -> float:
    return sum(lengths[sample] + lengths[sample] ** 2 / CROSSOVER_TOKENS for sample in samples)


def one_by_one_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook loop that the fast one must equal: each sample, longest first, into the first pack with room."""
    packs: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample)):
        for samples in packs:
            if sum(lengths[other] for other in samples) + lengths[sample] <= capacity:
                samples.append(sample)
                break
        else:
            packs.append([sample])
    return packs


@given(lengths_st)
@law
def test_it_is_first_fit_decreasing(lengths):
    assert _first_fit_decreasing(np.array(lengths, dtype=np.int64), CAPACITY) == one_by_one_first_fit(lengths, CAPACITY)


def test_a_pack_that_first_fit_would_need_is_saved():
    """First-fit fills 33 + 20, 32 + 20, 20 + 15 and 15; 33 + 15 + 15, 32 + 20 and 20 + 20 + 15 do with one fewer."""
    lengths = [15, 15, 15, 20, 20, 20, 33, 32]
    assert len(one_by_one_first_fit(lengths, CAPACITY)) == 4
    assert pack(lengths, max_tokens=CAPACITY, num_ranks=1).num_packs == 3


@given(lengths_st, ranks_st, st.data())
@law
def test_nothing_is_lost_doubled_or_too_large(lengths, num_ranks, data):
    ids = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    packing = pack(lengths, max_tokens=CAPACITY, num_ranks=num_ranks, keep_together=ids)
    packs = packs_of(packing)
    assert sorted(sample for samples in packs for sample in samples) == list(range(len(lengths)))
    assert packing.num_tokens == sum(lengths)
    assert all(sum(lengths[sample] for sample in samples) <= CAPACITY for samples in packs)
    assert all(list(samples) == sorted(samples) for samples in packs)
    assert len({len(rank) for rank in packing.ranks}) == 1
    assert packing == pack(lengths, max_tokens=CAPACITY, num_ranks=num_ranks, keep_together=ids)


@given(lengths_st, ranks_st, st.data())
@law
def test_a_rollout_is_in_one_pack_or_named_as_split(lengths, num_ranks, data):
    ids = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    packing = pack(lengths, max_tokens=CAPACITY, num_ranks=num_ranks, keep_together=ids)
    tokens = {rollout: sum(length for length, id in zip(lengths, ids, strict=True) if id == rollout) for rollout in ids}
    assert packing.split == tuple(sorted(rollout for rollout in tokens if tokens[rollout] > CAPACITY))
    for rollout in set(tokens) - set(packing.split):
        assert sum(any(ids[sample] == rollout for sample in samples) for samples in packs_of(packing)) == 1


@given(lengths_st.filter(bool), ranks_st)
@law
def test_no_more_packs_than_first_fit_and_no_fewer_than_the_tokens_fill(lengths, num_ranks):
    packing = pack(lengths, max_tokens=CAPACITY, num_ranks=num_ranks)
    most, least = len(one_by_one_first_fit(lengths, CAPACITY)), math.ceil(sum(lengths) / CAPACITY)
    assert least <= packing.num_microbatches * num_ranks == packing.num_packs
    assert packing.num_microbatches <= math.ceil(most / num_ranks)
    assert sum(not samples for samples in packs_of(packing)) == max(0, packing.num_packs - len(lengths))
    assert packing.fill == sum(lengths) / (packing.num_packs * CAPACITY)


@given(st.lists(st.lists(st.integers(1, CAPACITY - 1), max_size=6), min_size=1, max_size=20))
@law
def test_fill_is_within_the_bound_of_first_fit_decreasing(cuts_of_packs):
    # Full packs cut into pieces: the best packing is known. Dosa 2007: FFD <= 11/9 best + 6/9.
    lengths = []
    for cuts in cuts_of_packs:
        edges = [0, *sorted(set(cuts)), CAPACITY]
        lengths += [right - left for left, right in pairwise(edges)]
    best = len(cuts_of_packs)
    packing = pack(lengths, max_tokens=CAPACITY, num_ranks=1)
    assert packing.num_packs <= (11 * best + 6) // 9
    assert packing.fill >= best / ((11 * best + 6) // 9)


@given(lengths_st, ranks_st)
@law
def test_forwards_side_by_side_cost_alike_and_ranks_end_within_one_pack_of_each_other(lengths, num_ranks):
    packing = pack(lengths, max_tokens=CAPACITY, num_ranks=num_ranks)
    rows = [sorted(cost(lengths, samples) for samples in row) for row in zip(*packing.ranks, strict=True)]
    assert all(row[0] >= after[-1] - 1e-9 for row, after in pairwise(rows))
    load = [sum(cost(lengths, samples) for samples in rank) for rank in packing.ranks]
    assert max(load) - min(load) <= max((row[-1] for row in rows), default=0) + 1e-9


@given(st.lists(st.integers(1, 4), min_size=200, max_size=400), ranks_st)
@law
def test_many_small_samples_are_balanced_to_within_one_sample(lengths, num_ranks):
    # one pack per rank has room for everything, so nothing stands in the way of balance
    packing = pack(lengths, max_tokens=2000, num_ranks=num_ranks)
    tokens = [sum(lengths[sample] for samples in rank for sample in samples) for rank in packing.ranks]
    assert max(tokens) - min(tokens) <= 4
