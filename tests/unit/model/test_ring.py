"""Which queries see which keys when a pack lies on several ranks; the values are compared in tests/dist."""

import pytest
import torch

from palestra.model.context import Context, Ring, Ulysses
from palestra.model.documents import documents_of
from palestra.model.ring import _kernel_window, blocks_of, pieces_of

LENGTHS = (5, 1, 9, 2, 7)  # 24 tokens: 12 pieces of 2 for 6 ranks, 4 of 6 for two


def visible(lengths: tuple[int, ...], window: int | None) -> torch.Tensor:
    """[T, T], by the definition."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(document))
    distance = place[:, None] - place
    return (document[:, None] == document) & (distance >= 0) & (distance < (window or len(place)))


def parts(size: int, total: int) -> list[torch.Tensor]:
    length = total // (2 * size)
    return [
        torch.cat([torch.arange(piece * length, (piece + 1) * length) for piece in pieces_of(rank, size)])
        for rank in range(size)
    ]


def seen_by_blocks(lengths: tuple[int, ...], size: int, window: int | None) -> torch.Tensor:
    """[T, T], how often a query meets a key over all ranks."""
    seen = torch.zeros(24, 24, dtype=torch.int64)
    where = parts(size, 24)
    for q_rank in range(size):
        for k_rank in range(size):
            for block in (block for pair in blocks_of(lengths, size, q_rank, k_rank, window) for block in pair):
                rows, columns = where[q_rank][slice(*block.q)], where[k_rank][slice(*block.k)]
                mask = block.visible((0, len(rows)), torch.device("cpu"))
                assert mask.any(1).all(), "a row without keys would have no softmax"
                seen[rows[:, None], columns] += mask
    return seen


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_blocks_see_every_visible_pair_once_and_nothing_else(size, window):
    assert torch.equal(seen_by_blocks(LENGTHS, size, window), visible(LENGTHS, window).long())


def test_a_boundary_that_is_ignored_is_seen():
    """The negative control."""
    assert not torch.equal(seen_by_blocks((24,), 2, None), visible(LENGTHS, None).long())


def test_ranks_have_equal_work_on_one_long_document():
    """By pairs of tokens; cut into one run each, the last of four ranks would have seven times the first's."""
    work = [
        sum(
            int(block.visible((0, block.q[1] - block.q[0]), torch.device("cpu")).sum())
            for k_rank in range(4)
            for pair in blocks_of((64,), 4, q_rank, k_rank, None)
            for block in pair
        )
        for q_rank in range(4)
    ]
    assert work == [64 * 65 // 2 // 4] * 4


@pytest.mark.parametrize("window", [None, 1, 3, 8, 20])
@pytest.mark.parametrize("lengths", [(24,), LENGTHS, (7, 17), (1, 23), (6, 1, 1, 10, 6)])
def test_the_kernels_window_is_the_same(lengths, window):
    """torch's kernel aligns the last query with the last key, and counts left and right from there. In some of these
    packs one token of a document comes first in a piece."""
    for q_rank in range(2):
        for k_rank in range(2):
            for pair in blocks_of(lengths, 2, q_rank, k_rank, window):
                (left, right), is_causal = _kernel_window(pair)
                for block in pair:
                    num_q, num_k = block.q[1] - block.q[0], block.k[1] - block.k[0]
                    j = torch.arange(num_k) - (torch.arange(num_q)[:, None] + num_k - num_q)
                    allowed = ((left < 0) | (j >= -left)) & ((right < 0) | (j <= right))
                    assert torch.equal(allowed, block.visible((0, num_q), torch.device("cpu")))
                    assert is_causal == (right == 0)


@pytest.mark.parametrize(("kind", "pieces"), [(Ulysses, 3), (Ring, 6)])
def test_every_token_has_one_owner_and_padding_is_a_document_of_its_own(kind, pieces):
    context = kind.__new__(kind)
    context.rank, context.size, context.pieces = 1, 3, pieces
    documents = documents_of([5, 6], context=context)
    assert documents.lengths == (5, 6, 1)
    owned = [documents.place[documents.owner == rank].tolist() for rank in range(3)]
    assert [sorted(places) for places in owned] == [[0, 1, 2, 3]] * 3
    padded = torch.tensor([*range(100, 111), 0])
    assert documents.take(torch.arange(100, 111)).tolist() == padded[context.part(12)].tolist()
    positions = torch.tensor([*range(5), *range(6), 0])
    assert documents.positions[0].tolist() == positions[context.part(12)].tolist()


def test_one_rank_has_all_of_it():
    documents = documents_of([3, 4], context=Context())
    assert documents.lengths == (3, 4)
    assert documents.part.tolist() == list(range(7))
