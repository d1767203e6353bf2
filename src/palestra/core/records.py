"""Records that more than one process handles. Frozen; encoded with msgpack on every wire.

Legend: T tokens of one sequence. A token's log-probability stands at the token's own position.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct, field


def is_sendable(value: Any) -> bool:
    """Whether msgpack can hold it: no integers beyond 64 bits, no halves of surrogate pairs, no thousand nestings."""
    try:
        msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError, TypeError, RecursionError):
        return False
    return True


class Span(Struct, frozen=True, array_like=True):
    """Tokens [start, end) were sampled by policy `version`; positions count from the start of what it belongs to."""

    version: int
    start: int
    end: int


class TurnSpan(Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a sample were said in this turn of the seat, counted from 0 over its forks."""

    turn: int
    start: int
    end: int


class Routes(Struct, frozen=True, array_like=True):
    """Which experts an engine chose for tokens in a row: ids of `width` bytes, little-endian, by token, layer of the
    decoder, and place among the chosen. Layers without experts have zeros. `NO_ROUTES` is of no token."""

    data: bytes = b""
    num_layers: int = 0
    num_chosen: int = 0  # experts of a token in a layer
    width: int = 1

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.num_chosen * self.width

    @property
    def num_tokens(self) -> int:
        return len(self.data) // self.token_bytes if self.data else 0

    def first(self, num_tokens: int) -> "Routes":
        """Of at most so many of the tokens."""
        return msgspec.structs.replace(self, data=self.data[: num_tokens * self.token_bytes])

    def then(self, rest: "Routes") -> "Routes":
        """And of the tokens after them. Errors: ValueError, if they are of another model."""
        if not self.data or not rest.data:
            return self if self.data else rest
        if (self.num_layers, self.num_chosen, self.width) != (rest.num_layers, rest.num_chosen, rest.width):
            raise ValueError(
                f"experts of {self.num_layers} layers x {self.num_chosen} are followed by those of "
                f"{rest.num_layers} x {rest.num_chosen}: two models"
            )
        return msgspec.structs.replace(self, data=self.data + rest.data)


NO_ROUTES = Routes()


class Sampling(Struct, frozen=True, kw_only=True):
    """How an engine samples one reply. Seeds are per request.

    With `routes_from` the reply has the experts of all tokens, those of the prompt too, from this position on.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()
    ignores_stop: bool = False  # goes on to max_tokens, whatever is sampled
    routes_from: int | None = None


class Reply(Struct, frozen=True, kw_only=True):
    """What an engine sampled for one request: ids, log-probabilities of the distribution sampled from, versions.

    `spans` cover [0, len(token_ids)). `finish_reason` is vLLM's: "stop", "length", "abort". `routes` begin where they
    were asked from; a last token, which was not computed with, has none.
    """

    token_ids: list[int]
    logprobs: list[float]
    spans: tuple[Span, ...]
    finish_reason: str
    routes: Routes = NO_ROUTES

    def after(self, start: int) -> "Reply":
        """Without its first `start` tokens, and without routes."""
        return Reply(
            token_ids=self.token_ids[start:],
            logprobs=self.logprobs[start:],
            spans=tuple(
                Span(span.version, max(span.start - start, 0), span.end - start)
                for span in self.spans
                if span.end > start
            ),
            finish_reason=self.finish_reason,
        )

    def then(self, rest: "Reply") -> "Reply":
        """This reply, which broke off, and what was sampled after it."""
        shift = len(self.token_ids)
        spans = [*self.spans]
        for span in rest.spans:
            start = shift + span.start
            if spans and spans[-1].version == span.version:
                start = spans.pop().start
            spans.append(Span(span.version, start, shift + span.end))
        return Reply(
            token_ids=[*self.token_ids, *rest.token_ids],
            logprobs=[*self.logprobs, *rest.logprobs],
            spans=tuple(spans),
            finish_reason=rest.finish_reason,
            routes=self.routes.then(rest.routes),
        )


class ChatReply(Struct, frozen=True, kw_only=True):
    """What an endpoint said that takes messages and gives no tokens: nothing to train on.

    `finish_reason` is the API's: "length" where a limit of tokens cut it.
    """

    message: dict[str, Any]
    finish_reason: str
    num_tokens: int
    num_prompt_tokens: int = 0


class Ending(StrEnum):
    """How a rollout ended. `INVALID` is never scored: retried, then masked."""

    OK = "ok"
    TRUNCATED = "truncated"  # a limit of tokens or turns interrupted it
    FAILED = "failed"  # the agent's own fault: scored
    INVALID = "invalid"  # infrastructure, or a crash in the environment or a reward


class Task(Struct, frozen=True, kw_only=True):
    """One immutable problem. `prompt` is a user's message, its texts and images, or chat messages.

    `key` is stable across runs (given, or derived from the content); `gold` is a known-good reply, if there is one.
    """

    prompt: str | Sequence[str | dict[str, Any]] = ""
    gold: Any = None
    answer: Any = None
    info: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    image: str | None = None


class Sample(Struct, frozen=True, kw_only=True):
    """One flat token sequence cut from a rollout, as the environment worker made it; rewards are not in it.

    Shapes: `token_ids`, `logprobs`, `sampled` are [T]; `logprobs` is 0 where `sampled` is 0, which nobody sampled.
    `spans` and `turns` cover the sampled tokens only, in positions of this sequence. `routes` are those of its first
    tokens, as each was when the token after it was sampled.
    """

    token_ids: list[int]
    logprobs: list[float]
    sampled: list[int]
    spans: tuple[Span, ...]
    turns: tuple[TurnSpan, ...] = ()
    routes: Routes = NO_ROUTES


class PieceCredit(Struct, frozen=True, array_like=True):
    """`amount` was earned by what the first `num_tokens` tokens of a turn of the seat say."""

    turn: int
    num_tokens: int
    amount: float


class Seat(Struct, frozen=True, kw_only=True):
    """One agent of a rollout: its training samples and its own rewards.

    `credits`: how much of these was earned by which turn; the rest is the whole rollout's. `piece_credits`: how much of
    `credits` was earned before the turn's end.
    """

    name: str = "agent"
    samples: tuple[Sample, ...] = ()
    rewards: dict[str, float] = field(default_factory=dict)
    credits: dict[int, float] = field(default_factory=dict)
    piece_credits: tuple[PieceCredit, ...] = ()

    def cuts(self, turn: int) -> dict[int, float]:
        """Of a turn: numbers of its first tokens, ascending, and how much more these earned than those before."""
        found: dict[int, float] = {}
        for piece in sorted(self.piece_credits, key=lambda piece: piece.num_tokens):
            if piece.turn == turn:
                found[piece.num_tokens] = found.get(piece.num_tokens, 0.0) + piece.amount
        return found


class RolloutRecord(Struct, frozen=True, kw_only=True):
    """One finished attempt at one task.

    `reward` is the weighted sum of `rewards`; both are empty/0 for `Ending.INVALID` (look at `ending`, never at 0).
    `seats` are those that train. `messages` is the conversation of the first one, for people to read.
    """

    rollout_id: int
    environment: str
    task: Task
    ending: Ending
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seats: tuple[Seat, ...] = ()
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)  # that the first seat was told of, as JSON schemas
    num_turns: int = 0
    num_tokens: int = 0  # said in it, over all seats
    num_prompt_tokens: int = 0  # of all its turns, each prompt in full; 0 where nobody counted them
    error: str = ""
    wall_s: float = 0.0
    engine_s: float = 0.0  # of it, waiting for replies; calls at the same time add up
    ended_at: float = 0.0  # unix time

    def unrouted(self) -> "RolloutRecord":
        """Without routes, which are many times larger than all else."""
        replace = msgspec.structs.replace
        seats = (
            replace(seat, samples=tuple(replace(sample, routes=NO_ROUTES) for sample in seat.samples))
            for seat in self.seats
        )
        return replace(self, seats=tuple(seats))

    def with_samples_of(self, other: "RolloutRecord") -> "RolloutRecord":
        """`other` is the same rollout."""
        replace = msgspec.structs.replace
        pairs = zip(self.seats, other.seats, strict=True)
        return replace(self, seats=tuple(replace(seat, samples=known.samples) for seat, known in pairs))

    @property
    def num_sampled_tokens(self) -> int:
        return sum(sum(sample.sampled) for seat in self.seats for sample in seat.samples)

    @property
    def versions(self) -> tuple[int, ...]:
        """Distinct policy versions that sampled its tokens, ascending."""
        return tuple(sorted({span.version for seat in self.seats for sample in seat.samples for span in sample.spans}))
