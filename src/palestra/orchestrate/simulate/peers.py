"""The trainer and the publisher: what happens to a batch until its weights are in every engine."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from palestra.orchestrate.simulate.clock import Clock
from palestra.orchestrate.simulate.curves import PublishCurve, TrainerCurve
from palestra.orchestrate.simulate.fleet import Fleet
from palestra.orchestrate.simulate.rules import Rules
from palestra.wire.weights.manifest import KEPT_VERSIONS


@dataclass(frozen=True, slots=True)
class Shipped:
    step: int
    tokens: int


class Trainer:
    """Trains what it is sent, in order; stages and saves when that is due.

    `trained` is told when a step is done, `staged` when a version is; `computes` hears of a step that begins, and how
    long it takes.
    """

    def __init__(
        self,
        clock: Clock,
        curve: TrainerCurve,
        rules: Rules,
        *,
        trained: Callable[[Shipped], None],
        staged: Callable[[int], None],
        computes: Callable[[float], None],
    ):
        self._clock, self._curve, self._rules = clock, curve, rules
        self._trained, self._staged, self._computes = trained, staged, computes
        self.version = 0
        self._batches: deque[Shipped] = deque()
        self._kept = [0]  # versions that engines may still need
        self._is_busy = False
        self._idle_since, self._waited_s = 0.0, 0.0
        self._to_stage: Shipped | None = None  # waits for engines to load a version

    @property
    def waited_s(self) -> float:
        return self._waited_s + (0.0 if self._is_busy else self._clock.now - self._idle_since)

    def has_room(self, step: int) -> bool:
        """One batch may wait while another is trained."""
        return step - self.version < 2

    def receive(self, batch: Shipped) -> None:
        self._batches.append(batch)
        if not self._is_busy:
            self._train()

    def loaded(self, version: int) -> None:
        self._kept = [kept for kept in self._kept if kept >= version]
        if (batch := self._to_stage) is not None and len(self._kept) < KEPT_VERSIONS:
            self._to_stage = None
            self._waited_s += self._clock.now - self._idle_since
            self._stage(batch)

    def _train(self) -> None:
        batch = self._batches.popleft()
        self._waited_s += self._clock.now - self._idle_since
        self._is_busy = True
        seconds = self._curve.step_s(batch.tokens, self._rules.trainer_gpus)
        self._computes(seconds)
        self._clock.after(seconds, lambda: self._done(batch))

    def _done(self, batch: Shipped) -> None:
        self.version = batch.step + 1
        if not self._rules.schedule.publishes(batch.step):
            self._save(batch)
        elif len(self._kept) >= KEPT_VERSIONS:
            self._to_stage, self._idle_since = batch, self._clock.now
        else:
            self._stage(batch)
        self._trained(batch)

    def _stage(self, batch: Shipped) -> None:
        self._kept.append(batch.step + 1)

        def done() -> None:
            self._staged(batch.step + 1)
            self._save(batch)

        self._clock.after(self._curve.stage_s, done)

    def _save(self, batch: Shipped) -> None:
        if self._rules.schedule.saves(batch.step):
            self._clock.after(self._curve.checkpoint_s, self._next)
        else:
            self._next()

    def _next(self) -> None:
        self._is_busy, self._idle_since = False, self._clock.now
        if self._batches:
            self._train()


class Publisher:
    """Brings the newest staged version to the engines, `at_once` at a time. `loaded` is told when all have it."""

    def __init__(self, clock: Clock, curve: PublishCurve, rules: Rules, fleet: Fleet, *, loaded: Callable[[int], None]):
        self._clock, self._curve, self._rules, self._fleet, self._loaded = clock, curve, rules, fleet, loaded
        self._newest: int | None = None
        self._left: list[int] = []  # engines whose turn has not come
        self._under_way = 0

    @property
    def is_waiting(self) -> bool:
        """A version is staged and none is being published."""
        return self._newest is not None and not self._under_way

    @property
    def is_publishing(self) -> bool:
        return self._under_way > 0

    def stage(self, version: int) -> None:
        self._newest = version

    def start(self) -> None:
        assert self._newest is not None
        version, self._newest = self._newest, None
        self._left = list(range(len(self._fleet.engines)))[::-1]
        for _ in range(min(self._rules.at_once, len(self._left))):
            self._under_way += 1
            self._to_next(version)

    def _to_next(self, version: int) -> None:
        self._fleet.stop(self._left.pop(), self._curve.stop_s, version, recompute=self._rules.recompute)
        self._clock.after(self._curve.stop_s + self._curve.probe_s, lambda: self._arrived(version))

    def _arrived(self, version: int) -> None:
        if self._left:
            self._to_next(version)
            return
        self._under_way -= 1
        if not self._under_way:
            self._loaded(version)
