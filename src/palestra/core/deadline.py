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
    """`asyncio.timeout` that counts no time in which the event loop was blocked: others' work ends nobody's wait.

    Use: `async with Unhurried(seconds) as limit: ...`. Errors: TimeoutError; `limit.expired` tells it from others.
    """

    def __init__(self, seconds: float):
        self._left_s, self._slice_s = seconds, max(seconds / _SLICES, _SLICE_S)
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
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
        slice_s = min(self._slice_s, self._left_s)
        self._timer = asyncio.get_running_loop().call_later(slice_s, self._beat, slice_s)

    def _beat(self, slice_s: float) -> None:
        """Late or not, one slice has passed."""
        self._left_s -= slice_s
        if self._left_s > 0:
            self._arm()
        else:
            self._scope.reschedule(asyncio.get_running_loop().time())


_SLICES, _SLICE_S = 20, 0.02
