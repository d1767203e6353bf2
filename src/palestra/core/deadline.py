"""Waits that end: each has a deadline and says what it waited for."""

import asyncio
from collections.abc import Awaitable
from types import TracebackType
from typing import Self, TypeVar

from palestra.core.errors import DeadlineError

T = TypeVar("T")


async def within(seconds: float, awaited: Awaitable[T], *, waiting_for: str, hint: str = "") -> T:
    """Await at most `seconds`. Errors: DeadlineError naming what was waited for."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            return await awaited
    except TimeoutError:
        if scope.expired():
            raise DeadlineError(waiting_for, seconds, hint=hint) from None
        raise


class Unhurried:
    """`asyncio.timeout` that counts no time in which the event loop was blocked for long, for more than a twentieth of
    `seconds` at once: others' work ends nobody's wait.

    Use: `async with Unhurried(seconds) as limit: ...`. Errors: TimeoutError; `limit.expired` tells it from others.
    """

    def __init__(self, seconds: float):
        self._seconds, self._slice_s = seconds, max(seconds / _SLICES, _SLICE_S)
        self._due = self._end = 0.0
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._due = asyncio.get_running_loop().time()
        self._end = self._due + self._seconds
        self._arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._scope.__aexit__(kind, error, traceback)

    @property
    def expired(self) -> bool:
        return self._scope.expired()

    def _arm(self) -> None:
        self._due = min(self._due + self._slice_s, self._end)
        self._timer = asyncio.get_running_loop().call_at(self._due, self._beat)

    def _beat(self) -> None:
        """What it is late by counts up to a slice; beyond that, the loop was blocked."""
        now = asyncio.get_running_loop().time()
        blocked_s = max(now - self._due - self._slice_s, 0.0)
        self._due, self._end = self._due + blocked_s, self._end + blocked_s
        if self._due < self._end:
            self._arm()
        else:
            self._scope.reschedule(now)


_SLICES, _SLICE_S = 20, 0.02
