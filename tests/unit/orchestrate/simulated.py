"""An engine in discrete steps: a pool of keys and values, running requests that grow by a token a step, and preemption.

As vLLM schedules: first come, first served; when the pool is full the request admitted last is preempted, gives its
room back and computes its prefix again later; no request is admitted in a step that preempted one.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from palestra.orchestrate.admission import Admission, Reading, begin
from palestra.wire.policy import EngineLoad

Law = Callable[[random.Random, float], tuple[int, int]]
"""Prompt and reply tokens of a rollout that starts at a moment."""


@dataclass(eq=False)
class Request:
    prompt: int
    reply: int
    sampled: int = 0  # when it was admitted last
    admitted_at: int = 0  # in steps

    def tokens(self, step: int) -> int:
        return self.prompt + self.sampled + step - self.admitted_at


@dataclass
class SimulatedEngine:
    """`step_s` is the time of a step: fixed, per running request, per token prefilled."""

    pool_tokens: int
    max_tokens: int  # of a request
    shown: float = 1.0  # of the true cache use, in the gauge
    step_s: tuple[float, float, float] = (0.02, 0.0002, 0.0001)
    now_s: float = 0.0
    steps: int = 0
    held: int = 0
    sampled_tokens: int = 0
    preemptions: int = 0
    ended: int = 0
    running: dict[Request, None] = field(default_factory=dict)  # in the order they were admitted
    waiting: deque[Request] = field(default_factory=deque)
    _ends: list[tuple[int, int, Request]] = field(default_factory=list)
    _number: int = 0

    @property
    def rollouts(self) -> int:
        return len(self.running) + len(self.waiting)

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_use=self.shown * self.held / self.pool_tokens,
            preemptions=self.preemptions,
            prompt_tokens=0,
            sampled_tokens=self.sampled_tokens,
            safe_requests=self.pool_tokens / self.max_tokens,
        )

    def submit(self, prompt: int, reply: int) -> None:
        self.waiting.append(Request(prompt, reply))

    def step(self) -> None:
        preempted = self._make_room()
        prefilled = 0 if preempted else self._admit()
        self.steps += 1
        self.held += len(self.running)
        self.sampled_tokens += len(self.running)
        base, per_request, per_token = self.step_s
        self.now_s += base + per_request * len(self.running) + per_token * prefilled
        while self._ends and self._ends[0][0] <= self.steps:
            end, _, request = heapq.heappop(self._ends)
            if end == request.admitted_at + request.reply - request.sampled and request in self.running:
                self._leave(request)
                self.ended += 1

    def _make_room(self) -> bool:
        preempted = False
        while self.held + len(self.running) > self.pool_tokens:
            request = next(reversed(self.running))
            self._leave(request)
            request.sampled += self.steps - request.admitted_at
            self.waiting.appendleft(request)
            self.preemptions += 1
            preempted = True
        return preempted

    def _admit(self) -> int:
        """Tokens prefilled."""
        prefilled = 0
        while self.waiting:
            needed = self.waiting[0].prompt + self.waiting[0].sampled
            if self.held + len(self.running) + needed + 1 > self.pool_tokens:
                break
            request = self.waiting.popleft()
            request.admitted_at = self.steps
            self.running[request] = None
            self.held += needed
            prefilled += needed
            self._number += 1
            heapq.heappush(self._ends, (self.steps + request.reply - request.sampled, self._number, request))
        return prefilled

    def _leave(self, request: Request) -> None:
        del self.running[request]
        self.held -= request.tokens(self.steps)


@dataclass
class Controlled:
    """The limit by admission, as the reader of the gauges applies it."""

    most: int = 512
    admission: Admission | None = None
    _preemptions: int = 0

    def __call__(self, engine: SimulatedEngine) -> tuple[int, bool]:
        load = engine.load
        reading = Reading(
            kv_use=load.kv_use,
            waiting=load.waiting,
            preempted=load.preemptions - self._preemptions,
            rollouts=engine.rollouts,
            ended=engine.ended,
        )
        self._preemptions = load.preemptions
        if self.admission is None:
            self.admission = begin(reading, most=self.most, safe=load.safe_requests)
        else:
            self.admission = self.admission.next(reading)
        return self.admission.limit, self.admission.is_braked


@dataclass
class Trace:
    """What happened, second by second of the engine's time."""

    limits: list[int] = field(default_factory=list)
    kv: list[float] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    preemptions: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def note(self, engine: SimulatedEngine, limit: int) -> None:
        self.limits.append(limit)
        self.kv.append(engine.held / engine.pool_tokens)
        self.rollouts.append(engine.rollouts)
        self.tokens.append(engine.sampled_tokens)
        self.preemptions.append(engine.preemptions)
        self.ended.append(engine.ended)

    def tokens_per_s(self, since: int, until: int = -1) -> float:
        return (self.tokens[until] - self.tokens[since]) / (range(len(self.tokens))[until] - since)

    def preempted_share(self, since: int, until: int = -1) -> float:
        """Preemptions per rollout that ended."""
        return (self.preemptions[until] - self.preemptions[since]) / (self.ended[until] - self.ended[since])

    def turns(self, since: int, until: int | None = None) -> int:
        """How often the limit changed its direction."""
        moves = [after > before for before, after in pairwise(self.limits[since:until]) if after != before]
        return sum(one != other for one, other in pairwise(moves))


def simulate(
    engine: SimulatedEngine,
    law: Law,
    limit_of: Callable[[SimulatedEngine], tuple[int, bool]],
    *,
    seconds: int,
    demand: Callable[[float], float] = lambda now_s: 1e6,
    seed: int = 0,
) -> Trace:
    """A dispatcher that refills slots at once; `limit_of` is asked every second for the limit and the brake."""
    rng, trace, limit, is_braked = random.Random(seed), Trace(), 1, False
    while engine.now_s < seconds:
        if engine.now_s >= len(trace.limits):
            limit, is_braked = limit_of(engine)
            trace.note(engine, limit)
        while not is_braked and engine.rollouts < min(limit, demand(engine.now_s)):
            engine.submit(*law(rng, engine.now_s))
        engine.step()
    return trace


def fixed(limit: int) -> Callable[[SimulatedEngine], tuple[int, bool]]:
    return lambda engine: (limit, False)


def log_normal(median: float, *, sigma: float = 1.0, cap: float = 16.0, prompt: int = 20) -> Law:
    """Replies of a log-normal law, cut at `cap` medians."""

    def law(rng: random.Random, now_s: float) -> tuple[int, int]:
        return prompt, max(1, int(median * min(cap, rng.lognormvariate(0.0, sigma))))

    return law
