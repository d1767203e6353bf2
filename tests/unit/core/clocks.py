"""Clocks that a test moves: however long a process stands still meanwhile, it is in no number, and timers ring in their
order."""

import asyncio
from types import SimpleNamespace

import pytest

from palestra.core import ledger

_TURNS = 10  # of the loop, in which what rang has had its consequences


class LedgerClock:
    """In place of both clocks that `core.ledger` reads; `unix` began at 1,000 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(ledger, "time", SimpleNamespace(perf_counter=self.time, monotonic=self.time))
        monkeypatch.setattr(ledger, "unix_now", self.unix)

    def time(self) -> float:
        return self.now

    def unix(self) -> float:
        return 1_000.0 + self.now

    def burn(self, seconds: float) -> None:
        self.now += seconds


class LoopClock:
    """Of the running loop, from here on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: self.now)

    async def pass_by(self, seconds: float) -> None:
        """What rings at the end of it, has rung."""
        self.now += seconds
        for _ in range(_TURNS):
            await asyncio.sleep(0)
