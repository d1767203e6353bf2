"""Who holds what, and how matrices are dealt: hand-made layouts, and laws of the deal."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from palestra.core.errors import PalestraError
from palestra.model.holdings import Run, even_dim, holding
from palestra.train.exchange import cut, deal


def _rows(size: int, mesh_shape, placements, coordinate) -> list[int]:
    held = holding((size, 3), mesh_shape, placements, coordinate)
    return [index for run in held.runs[0] for index in range(run.start, run.start + run.length)]


def test_rows_of_an_uneven_shard():
    assert [_rows(10, (4,), [Shard(0)], (rank,)) for rank in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [_rows(5, (4,), [Shard(0)], (rank,)) for rank in range(4)] == [[0, 1], [2, 3], [4], []]


def test_rows_of_a_strided_shard():
    """Nine rows in two chunks of five and four, each over four ranks."""
    held = [_rows(9, (4,), [_StridedShard(0, split_factor=2)], (rank,)) for rank in range(4)]
    assert held == [[0, 1, 5], [2, 3, 6], [4, 7], [8]]


@pytest.mark.parametrize(
    ("shape", "mesh", "placements", "expected"),
    [
        ((8, 3), (2, 2), [Replicate(), Shard(0)], 0),
        ((3, 8), (2, 2), [Replicate(), Shard(1)], 1),
        ((8, 3), (2, 1, 2), [Replicate(), _StridedShard(0, split_factor=2), Shard(0)], 0),  # strides over one
        ((6, 4), (2, 2), [Replicate(), Replicate()], None),
        ((9, 3), (2, 2), [Replicate(), Shard(0)], None),  # five rows and four
        ((8, 3), (2, 2), [Shard(0), Replicate()], None),  # copies beside each other
        ((8, 8), (2, 2), [Shard(0), Shard(1)], None),
        ((8, 3), (1, 2, 2), [Replicate(), _StridedShard(0, split_factor=2), Shard(0)], None),  # experts of two owners
    ],
)
def test_equal_parts_in_the_order_of_ranks(shape, mesh, placements, expected):
    """Of four ranks, two of which share a copy."""
    ranks: Any = SimpleNamespace(mesh=torch.arange(4).view(mesh), shape=mesh)
    assert even_dim(shape, ranks, placements, copies=2, num_ranks=4) == expected
    assert even_dim(shape, ranks, placements, copies=2, num_ranks=8) is None, "others hold nothing of it"


def test_rows_of_a_sharded_shard():
    mesh, placements = (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]
    held = [_rows(8, mesh, placements, (a, b)) for a in range(2) for b in range(2)]
    assert held == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert [_rows(8, mesh, [Shard(0), Shard(0)], (a, b)) for a in range(2) for b in range(2)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


def test_runs_say_where_they_are_in_the_shard():
    held = holding((9, 4), (4,), [_StridedShard(0, split_factor=2)], (0,))
    assert held.runs == ((Run(0, 0, 2), Run(5, 2, 1)), (Run(0, 0, 4),))


def test_replicas_are_told_apart():
    held = holding((8, 4), (2, 2), [Replicate(), Shard(0)], (1, 0))
    assert (held.replica, held.runs[0]) == ((1,), (Run(0, 0, 4),))


def test_a_sum_that_is_not_made_yet_is_refused():
    with pytest.raises(PalestraError, match="it must be sharded or replicated"):
        holding((8, 4), (2,), [Partial()], (0,))


def _held(shape, mesh_shape, placements):
    coordinates = [(a, b) for a in range(mesh_shape[0]) for b in range(mesh_shape[1])]
    return {rank: holding(shape, mesh_shape, placements, where) for rank, where in enumerate(coordinates)}


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(slice(0, 12), slice(0, 10)), (slice(6, 12), slice(0, 10)), (slice(0, 12), slice(1, 10, 2))],
    ids=["whole", "up", "every_other_column"],
)
@pytest.mark.parametrize(
    "placements",
    [[Shard(1), Shard(0)], [_StridedShard(0, split_factor=2), Shard(0)], [Replicate(), Shard(1)]],
    ids=str,
)
def test_pieces_put_together_are_the_matrix(rows, columns, placements):
    """From shards that say which element they are: each element of the matrix once per replica."""
    whole = torch.arange(120).view(12, 10)
    held = _held((12, 10), (2, 2), placements)
    matrix = cut(0, rows, columns, None, held, (12, 10))
    expected = whole[rows, columns]
    for owner in matrix.pieces:
        built, count = torch.zeros_like(expected), torch.zeros_like(expected)
        for sender in matrix.senders(owner):
            index = [
                [i for run in runs for i in range(run.start, run.start + run.length)] for runs in held[sender].runs
            ]
            shard = whole[index[0]][:, index[1]]
            for piece in matrix.pieces[sender]:
                built[piece.there] = shard[piece.here].view(piece.shape)
                count[piece.there] += 1
        assert torch.equal(built, expected)
        assert (count == 1).all()


def test_the_deal_is_even_and_only_to_holders():
    held = _held((12, 10), (2, 2), [Shard(0), Shard(1)])
    few = _held((2, 10), (2, 2), [Replicate(), Shard(0)])
    few = {rank: one for rank, one in few.items() if rank in (1, 3)}
    matrices = [cut(which, slice(0, 12), slice(0, 10), None, held, (12, 10)) for which in range(16)]
    matrices += [cut(16 + which, slice(0, 2), slice(0, 10), None, few, (2, 10)) for which in range(3)]
    rounds = deal(matrices, round_elements=240)
    dealt = [(owner, matrix) for one in rounds for owner, matrix in one.matrices()]
    assert sorted(matrix.parameter for _, matrix in dealt) == list(range(19))
    assert all(owner in matrix.pieces for owner, matrix in dealt)
    loads = {rank: sum(matrix.cost for owner, matrix in dealt if owner == rank) for rank in range(4)}
    assert max(loads.values()) - min(loads.values()) <= 2 * 40
    assert all(len(one.owned[rank]) == 2 for one in rounds[:2] for rank in range(4))


def test_a_matrix_larger_than_a_round_has_one_of_its_own():
    held = _held((12, 10), (1, 1), [Shard(0), Shard(1)])
    matrices = [cut(which, slice(0, 12), slice(0, 10), None, held, (12, 10)) for which in range(3)]
    assert [len(one.owned[0]) for one in deal(matrices, round_elements=1)] == [1, 1, 1]
