"""One engine: its requests share it evenly, at a speed that depends on their number.

Instead of moving every request at every event, the engine keeps one clock, `served`: the tokens that a request would
have got that was there from the beginning. A request that comes at 700 and wants 50 ends when the clock shows 750,
however its neighbours come and go meanwhile.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from palestra.orchestrate.simulate.curves import EngineCurve


@dataclass(slots=True)
class Request:
    """One turn of a rollout at an engine. `begins` is told when it leaves the queue, `ends` when it is served."""

    prompt_tokens: int
    sampled_tokens: float
    begins: Callable[["Engine"], None]
    ends: Callable[[], None]
    context_tokens: int = 0  # in the cache already, from earlier turns


@dataclass(slots=True)
class Spent:
    """Seconds of an engine by cause. What is left of the wall clock it was idle."""

    generate: float = 0.0
    prefill: float = 0.0
    publish: float = 0.0
    lent: float = 0.0  # the trainer has the device


@dataclass(slots=True)
class Engine:
    """`stamp` changes whenever `next_end` may have."""

    curve: EngineCurve
    version: int = 0
    stamp: int = 0
    spent: Spent = field(default_factory=Spent)
    served: float = 0.0
    _at: float = 0.0
    _held_until: float = 0.0  # publishes and prefills: nothing is sampled before
    _running: list[tuple[float, int, float, Request]] = field(default_factory=list)  # by the clock at their end
    _queue: deque[Request] = field(default_factory=deque)
    _order: count = field(default_factory=count)
    _speed: list[float] = field(default_factory=lambda: [0.0])  # of each request, by their number

    @property
    def in_flight(self) -> int:
        return len(self._running) + len(self._queue)

    def advance(self, now: float) -> None:
        begin = max(self._at, min(self._held_until, now))
        if self._running:
            self.served += (now - begin) * self._rate()
            self.spent.generate += now - begin
        self._at = now

    def hold(self, now: float, seconds: float) -> None:
        """Nothing is sampled for `seconds` more."""
        self.advance(now)
        self._held_until = max(self._held_until, now) + seconds
        self.stamp += 1

    def stop(self, now: float, seconds: float, version: int, *, recompute: bool) -> None:
        """A publish. What is sampled from here on is of `version`; with `recompute` running requests are prefilled
        again."""
        self.hold(now, seconds)
        self.spent.publish += seconds
        self.version = version
        if recompute:
            self._prefill(now, sum(self._context(start, request) for _, _, start, request in self._running))

    def lend(self, now: float, seconds: float) -> None:
        """The trainer computes on the engine's device."""
        self.hold(now, seconds)
        self.spent.lent += seconds

    def admit(self, now: float, request: Request) -> None:
        self.advance(now)
        if self.curve.max_running is not None and len(self._running) >= self.curve.max_running:
            self._queue.append(request)
        else:
            self._begin(now, request)

    def next_end(self) -> float | None:
        """When the next request ends, if nothing comes in between."""
        if not self._running:
            return None
        left = max(self._running[0][0] - self.served, 0.0)
        return max(self._at, self._held_until) + left / self._rate()

    def end_next(self, now: float) -> Request:
        """The request whose end is now."""
        self.advance(now)
        end, _, _, request = heappop(self._running)
        self.served = max(self.served, end)  # not a rounding error short of it
        self.stamp += 1
        if self._queue:
            self._begin(now, self._queue.popleft())
        return request

    def _begin(self, now: float, request: Request) -> None:
        request.begins(self)
        self._prefill(now, request.prompt_tokens)
        heappush(self._running, (self.served + request.sampled_tokens, next(self._order), self.served, request))
        self.stamp += 1

    def _prefill(self, now: float, tokens: float) -> None:
        if self.curve.prefill_tokens_per_s is not None and tokens:
            seconds = tokens / self.curve.prefill_tokens_per_s
            self.hold(now, seconds)
            self.spent.prefill += seconds

    def _context(self, start: float, request: Request) -> float:
        """Tokens of a running request that the cache holds."""
        return request.context_tokens + request.prompt_tokens + self.served - start

    def _rate(self) -> float:
        while len(self._speed) <= len(self._running):
            self._speed.append(self.curve.per_request(len(self._speed)))
        return self._speed[len(self._running)]
