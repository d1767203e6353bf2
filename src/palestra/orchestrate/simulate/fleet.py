"""Engines as the loop sees them: a group goes to the engine with the fewest calls, and stays there."""

from functools import partial

import numpy as np

from palestra.orchestrate.simulate.clock import Clock
from palestra.orchestrate.simulate.curves import EngineCurve
from palestra.orchestrate.simulate.engine import Engine, Request


class Fleet:
    def __init__(self, clock: Clock, curve: EngineCurve, size: int):
        self._clock = clock
        self.engines = [Engine(curve) for _ in range(size)]
        self._in_flight = np.zeros(size, np.int64)
        self._changed: set[int] = set()  # engines whose next end was not planned yet

    def least_busy(self) -> int:
        return int(self._in_flight.argmin())

    def ask(self, index: int, request: Request) -> None:
        engine = self.engines[index]
        engine.admit(self._clock.now, request)
        self._in_flight[index] = engine.in_flight
        self._changed.add(index)

    def stop(self, index: int, seconds: float, version: int, *, recompute: bool) -> None:
        self.engines[index].stop(self._clock.now, seconds, version, recompute=recompute)
        self._changed.add(index)

    def lend(self, seconds: float) -> None:
        """All devices, to the trainer."""
        for index, engine in enumerate(self.engines):
            engine.lend(self._clock.now, seconds)
            self._changed.add(index)

    def advance(self) -> None:
        """Bring all accounts up to now."""
        for engine in self.engines:
            engine.advance(self._clock.now)

    def plan(self) -> None:
        """What ends next, after everything that happens now."""
        for index in self._changed:
            engine = self.engines[index]
            if (end := engine.next_end()) is not None:
                self._clock.at(end, partial(self._ends, index, engine.stamp))
        self._changed.clear()

    def _ends(self, index: int, stamp: int) -> None:
        """Unless something came in between: then another call was planned."""
        engine = self.engines[index]
        if engine.stamp == stamp:
            request = engine.end_next(self._clock.now)
            self._in_flight[index] = engine.in_flight
            self._changed.add(index)
            request.ends()
