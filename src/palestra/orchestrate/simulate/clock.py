"""Simulated time: what happens next."""

from collections.abc import Callable
from heapq import heappop, heappush


class Clock:
    """Calls what was planned, in order of time; of the same time, in the order it was planned."""

    def __init__(self):
        self.now = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, time: float, call: Callable[[], None]) -> None:
        self._number += 1
        heappush(self._planned, (time, self._number, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    def tick(self) -> bool:
        """Make the next thing happen. False, if nothing is planned any more."""
        if not self._planned:
            return False
        self.now, _, call = heappop(self._planned)
        call()
        return True
