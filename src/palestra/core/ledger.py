"""The time ledger: every second of a process is booked under exactly one cause, so the parts sum to the wall clock.

A process is always in one cause; `spend` nests, and time inside the inner cause is not booked on the outer one.
"""

import selectors
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from palestra.core.clock import unix_now

_MAX_TURNS = 100_000  # a process whose lag nobody asks for must not grow
_APART_S, _MAX_READINGS = 1e-4, 10  # of two clocks that are read one after the other


class LedgerEntry(Struct, frozen=True, kw_only=True):
    """Seconds by cause of one process since the entry before. `wall_s` is measured apart from `parts_s`.

    `started_at` (unix time) and `wall_s` place the entry on the clock all processes share.
    """

    process: str
    started_at: float
    wall_s: float
    parts_s: dict[str, float]

    @property
    def closure(self) -> float:
        """|sum of parts - wall| / wall: 0 when every second is accounted for."""
        return abs(sum(self.parts_s.values()) - self.wall_s) / self.wall_s if self.wall_s else 0.0


class Ledger:
    """Books the wall clock of one thread of one process by cause."""

    def __init__(self, process: str, cause: str = "start", *, since: float | None = None):
        """`since` is the unix time the process began at, for time spent before this object existed."""
        self.process, self.cause = process, cause
        self._parts_s: dict[str, float] = {}
        self._mark, self._started_at = _both_clocks()
        if since is not None:
            self._parts_s[cause] = self._started_at - since
            self._started_at = since

    def switch(self, cause: str) -> str:
        """End the current cause, begin `cause`; returns the cause that ended."""
        return self._switch_at(time.perf_counter(), cause)

    def _switch_at(self, now: float, cause: str) -> str:
        ended = self.cause
        self._parts_s[ended] = self._parts_s.get(ended, 0.0) + now - self._mark
        self.cause, self._mark = cause, now
        return ended

    @contextmanager
    def spend(self, cause: str) -> Iterator[None]:
        outer = self.switch(cause)
        try:
            yield
        finally:
            self.switch(outer)

    def close(self) -> LedgerEntry:
        """The entry since the last `close`; the next one begins here, in the same cause."""
        mark, now = _both_clocks()
        self._switch_at(mark, self.cause)
        entry = LedgerEntry(
            process=self.process, started_at=self._started_at, wall_s=now - self._started_at, parts_s=self._parts_s
        )
        self._parts_s, self._started_at = {}, now
        return entry


def _both_clocks() -> tuple[float, float]:
    """`time.perf_counter()` and unix time of one moment. Read again, if the process stood still between the two: what
    passed there would be booked nowhere.
    """
    for _ in range(_MAX_READINGS):
        mark, now = time.perf_counter(), unix_now()
        if time.perf_counter() - mark <= _APART_S:
            break
    return mark, now


class LedgerSelector(selectors.DefaultSelector):
    """A selector that books an event loop's sleep as `idle` and everything else as `work` (or what `spend` says).

    Use: `asyncio.SelectorEventLoop(LedgerSelector(ledger))`.
    """

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger
        self._turns_s: deque[float] = deque(maxlen=_MAX_TURNS)
        self._woke = time.perf_counter()

    def select(self, timeout: float | None = None):
        self._turns_s.append(time.perf_counter() - self._woke)
        if timeout is not None and timeout <= 0:
            ready = super().select(timeout)
        else:
            with self.ledger.spend("idle"):
                ready = super().select(timeout)
        self._woke = time.perf_counter()
        return ready

    def take_lag(self) -> list[float]:
        """Seconds of every turn of the loop since the last call, of the latest ones where there were very many."""
        taken = list(self._turns_s)
        self._turns_s.clear()
        return taken


def total(entries: list[LedgerEntry]) -> LedgerEntry:
    """One entry for all of one process's entries, in time order."""
    parts_s: dict[str, float] = {}
    for entry in entries:
        for cause, seconds in entry.parts_s.items():
            parts_s[cause] = parts_s.get(cause, 0.0) + seconds
    first = entries[0]
    return LedgerEntry(
        process=first.process,
        started_at=first.started_at,
        wall_s=sum(entry.wall_s for entry in entries),
        parts_s=parts_s,
    )
