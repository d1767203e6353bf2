"""Whether a process that ended is started again, how soon, and what is told of it.

What served once and died, however, is started again, and so is what was killed. A first start that fails is not: it
would fail again. A storm is not: too many ends within a while, starts that fail in a row, the same error in a row. An
end that was planned says nothing against a process.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.5, 30.0
_LIVED_WELL_S = 60.0  # a life this long, or one killed at its work, starts the back-off from its beginning
_FAILED_STARTS = 2  # in a row
_SAME_WORDS = 4  # in a row: one more than it takes to find a task that is to blame


@dataclass(frozen=True)
class Limits:
    """`max_restarts` of one process within `window_s`; more are a storm."""

    max_restarts: int
    window_s: float


@dataclass(frozen=True, kw_only=True)
class End:
    """How one life of a process ended. `said` is the error it told of itself, "" if it died without a word."""

    why: str
    ended_at: float
    was_ready: bool
    lived_s: float
    was_killed: bool = False  # by SIGKILL: it had no choice
    was_planned: bool = False
    said: str = ""


class Lives:
    """The lives of one process. `number` is that of the life that runs, or is to begin."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._limits, self._clock = limits, clock
        self.number = 0
        self._ends: deque[float] = deque()  # within the window
        self._failed_starts = 0  # in a row
        self._short = 0  # lives in a row
        self._words: deque[str] = deque(maxlen=_SAME_WORDS)

    def ended(self, end: End) -> str | None:
        """None, if it may be started again; else why not, in words, "" for a first start and where none is allowed."""
        if end.was_planned:
            self._short = 0
            return None
        failed_at_first = self.number == 0 and not end.was_ready and not end.was_killed
        self._note(end)
        if failed_at_first or self._limits.max_restarts == 0:
            return ""
        if self._failed_starts >= _FAILED_STARTS:
            return f"{self._failed_starts} starts in a row failed"
        if end.said and list(self._words) == [end.said] * _SAME_WORDS:
            return f"the same error {_SAME_WORDS} times in a row"
        if len(self._ends) > self._limits.max_restarts:
            return (
                f"{len(self._ends)} ends within {self._limits.window_s:.0f} s, "
                f"launch.max_restarts={self._limits.max_restarts}"
            )
        return None

    def begin_next(self) -> None:
        self.number += 1

    @property
    def back_off_s(self) -> float:
        return min(_BACK_OFF_S * 2 ** (self._short - 1), _LONGEST_BACK_OFF_S) if self._short else _BACK_OFF_S

    def _note(self, end: End) -> None:
        now = self._clock()
        self._ends.append(now)
        while now - self._ends[0] > self._limits.window_s:
            self._ends.popleft()
        self._failed_starts = 0 if end.was_ready else self._failed_starts + 1
        lived_well = end.was_ready and (end.lived_s >= _LIVED_WELL_S or end.was_killed)
        self._short = 1 if lived_well else self._short + 1
        self._words.append(end.said)
