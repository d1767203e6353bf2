"""Routes stay with their tokens: through turns, broken replies, forks, batches, packs, and the ranks of a context.

Everywhere the experts of a token are a function of its id, and ids are unique.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.train.batches import make_batch

from palestra.core.records import NO_ROUTES, Reply, Sample, Span
from palestra.env.chat.draft import Draft
from palestra.model.context import Context, Ring, Ulysses
from palestra.orchestrate.batcher import _routed
from palestra.train.packs import plan_step
from palestra.wire.batches import Batch, decode, encode
from palestra.wire.routes import as_array, read_routes, routes_of

LAYERS, CHOSEN = 3, 2


def experts_of(token_ids: np.ndarray) -> np.ndarray:
    """[T, L, K], different in every layer and place."""
    place = np.arange(LAYERS * CHOSEN).reshape(LAYERS, CHOSEN)
    return (np.asarray(token_ids)[:, None, None] * 31 + 7 * place) % 251


@dataclass
class Engine:
    """Says tokens with ids of their own. Of a prompt and a reply it knows the experts of all tokens but the last."""

    next_id: int = 0
    asked: list[int] = field(default_factory=list)

    def tokens(self, num: int) -> list[int]:
        self.next_id += num
        return list(range(self.next_id - num, self.next_id))

    def reply(self, prompt: list[int], num: int, routes_from: int, *, is_broken: bool = False) -> Reply:
        self.asked.append(routes_from)
        said = self.tokens(num)
        routes = experts_of(np.array([*prompt, *said][routes_from:-1])).astype(np.uint8)
        return Reply(
            token_ids=said,
            logprobs=[-1.0] * num,
            spans=(Span(0, 0, num),),
            finish_reason="abort" if is_broken else "stop",
            routes=NO_ROUTES if is_broken else routes_of(routes),
        )


@st.composite
def samples(draw: st.DrawFn, engine: Engine) -> Sample:
    """Turns of some tokens each; a reply may break off, and is gone on with as the gateway does."""
    draft = Draft(engine.tokens(draw(st.integers(1, 5))))
    for _ in range(draw(st.integers(1, 3))):
        prompt, begun = list(draft.token_ids), None
        if draw(st.booleans()):
            begun = engine.reply(prompt, draw(st.integers(1, 3)), draft.num_routed, is_broken=True)
            prompt += begun.token_ids
        routed = draft.num_routed + (begun.routes.num_tokens if begun else 0)
        rest = engine.reply(prompt, draw(st.integers(1, 4)), routed)
        draft.add_reply(begun.then(rest) if begun else rest, 0)
        assert draft.num_routed == len(draft.token_ids) - 1
        (sample,) = draft.samples()
        if draw(st.booleans()):
            draft = draft.as_context()
        draft.continue_with(engine.tokens(draw(st.integers(0, 3))))
    return sample


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    engine = Engine()
    parts = [draw(samples(engine)) for _ in range(draw(st.integers(1, 5)))]
    parts = [sample if draw(st.booleans()) else _cut(sample, draw(st.integers(0, 4))) for sample in parts]
    packs = draw(st.lists(st.integers(0, 1), min_size=len(parts), max_size=len(parts)))
    plain = make_batch([len(sample.token_ids) for sample in parts], packs=packs, prompt=1)
    token_ids = np.concatenate([sample.token_ids for sample in parts])
    return replace(plain, num_packs=2, token_ids=token_ids, **_routed(parts))


def _cut(sample: Sample, num_tokens: int) -> Sample:
    return Sample(
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        sampled=sample.sampled,
        spans=sample.spans,
        routes=sample.routes.first(num_tokens),
    )


def contexts() -> list[Context]:
    """Ranks of contexts that need no others to say which tokens are theirs."""
    found: list[Context] = [Context()]
    for kind in (Ulysses, Ring):
        for rank in range(2):
            one = object.__new__(kind)
            one.kernels, one.rank, one.size, one.pieces = ("padded",), rank, 2, 2 if kind is Ulysses else 4
            found.append(one)
    return found


def require_aligned(token_ids: torch.Tensor, routes: torch.Tensor, is_real: torch.Tensor) -> int:
    """How many tokens have routes: each its own."""
    known = (routes >= 0).all(-1).all(-1)
    assert not (known & ~is_real).any(), "padding has none"
    expected = torch.from_numpy(experts_of(token_ids[known].numpy()))
    assert torch.equal(routes[known].long(), expected.long())
    return int(known.sum())


@given(batches())
@settings(max_examples=40, deadline=None)
def test_every_token_keeps_its_own_routes(before: Batch):
    after = decode(encode(before))
    assert np.array_equal(after.routes, before.routes)
    assert after.routes.dtype == np.uint8
    for context in contexts():
        found = [
            require_aligned(take(pack.token_ids), take(pack.routes, padding=-1), pack.documents.is_real)
            for rank in range(2)
            for pack in plan_step(after, rank=rank, num_ranks=2, context=context).packs
            if pack.routes.numel()
            for take in [pack.documents.take]
        ]
        if context.size == 1:
            assert sum(found) == before.num_routed.sum()


def test_the_law_sees_routes_that_are_one_token_off():
    ids = torch.arange(6)
    right = torch.from_numpy(experts_of(ids.numpy())).short()
    assert require_aligned(ids, right, ids >= 0) == 6
    with pytest.raises(AssertionError):
        require_aligned(ids, right.roll(1, 0), ids >= 0)
    with pytest.raises(AssertionError):
        require_aligned(ids, right.flip(1), ids >= 0)
    with pytest.raises(AssertionError, match="padding"):
        require_aligned(ids, right, ids < 5)


@pytest.mark.parametrize("text", ["", "AAAA", "no base64!", "k05VTVBZ"])
def test_what_is_no_array_is_a_value_error(text: str):
    with pytest.raises(ValueError, match=r"."):
        read_routes(text, num_tokens=1)


def test_arrays_and_bytes_are_the_same_numbers():
    wide = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4) + 300
    routes = routes_of(wide)
    assert (routes.num_tokens, routes.token_bytes) == (2, 3 * 4 * 2)
    assert np.array_equal(as_array(routes), wide)
    assert np.array_equal(as_array(routes.first(1).then(routes)), np.concatenate([wide[:1], wide]))
    assert routes.first(0).then(NO_ROUTES).num_tokens == 0
    with pytest.raises(ValueError, match="3 layers x 4 are followed by those of 2 x 4: two models"):
        routes.then(routes_of(wide[:, :2]))
