"""Replies on their way: which version tokens are put down to, and how pieces become one reply."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from palestra.core.records import Reply, Span
from palestra.wire.draft import NOTHING, Draft


def test_tokens_are_put_down_to_the_version_of_the_tokens_before_them():
    serving = [4]
    draft = Draft(lambda: serving[0])
    draft.add([1, 2], [-0.1, -0.2])
    serving[0] = 5  # a publish; what the engine held back from before it arrives with what came after
    draft.add([3, 4, 5], [-0.3, -0.4, -0.5])
    draft.add([6], [-0.6])
    assert draft.partial.spans == (Span(4, 0, 5), Span(5, 5, 6))
    assert draft.partial.finish_reason == "abort"


def test_without_a_version_there_is_nothing_to_go_on_from():
    draft = Draft(lambda: None)
    draft.add([1], [-0.1])
    assert draft.partial == NOTHING


def test_who_waits_hears_of_tokens():
    heard: list[int] = []
    draft = Draft(lambda: 1, lambda: heard.append(len(draft.token_ids)))
    draft.add([1], [-0.1])
    draft.add([2, 3], [-0.1, -0.1])
    assert heard == [1, 3]


def test_joined_and_cut_by_hand():
    first = Reply(token_ids=[1, 2], logprobs=[-0.1, -0.2], spans=(Span(3, 0, 2),), finish_reason="abort")
    rest = Reply(token_ids=[3, 4], logprobs=[-0.3, -0.4], spans=(Span(3, 0, 1), Span(4, 1, 2)), finish_reason="length")
    whole = first.then(rest)
    assert whole == Reply(
        token_ids=[1, 2, 3, 4],
        logprobs=[-0.1, -0.2, -0.3, -0.4],
        spans=(Span(3, 0, 3), Span(4, 3, 4)),
        finish_reason="length",
    )
    assert whole.after(2) == rest
    assert whole.after(3).spans == (Span(4, 0, 1),)


@st.composite
def replies(draw) -> Reply:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    spans, start = [], 0
    for version, size in enumerate(sizes):
        spans.append(Span(version, start, start + size))
        start += size
    return Reply(
        token_ids=list(range(start)),
        logprobs=[-float(i) for i in range(start)],
        spans=tuple(spans),
        finish_reason="stop",
    )


@given(replies(), st.lists(st.integers(0, 20), max_size=4))
def test_cut_anywhere_and_joined_again_it_is_the_same(reply: Reply, cuts: list[int]):
    size = len(reply.token_ids)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    joined = NOTHING
    for start, end in pairwise(edges):
        rest = reply.after(start)
        piece = Reply(
            token_ids=rest.token_ids[: end - start],
            logprobs=rest.logprobs[: end - start],
            spans=tuple(Span(s.version, s.start, min(s.end, end - start)) for s in rest.spans if s.start < end - start),
            finish_reason="stop",
        )
        joined = joined.then(piece)
    assert joined == reply
