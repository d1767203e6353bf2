"""Whether a rollout makes progress.

Consumes: beats (tokens that arrived, calls, replies). Produces: word when none came for `quiet_s`.
Waits for: a timer of the event loop, set anew from the last beat when it rings. Ends when: stopped.
"""

import asyncio
from collections.abc import Callable
from typing import Self


class Pulse:
    """Of one rollout in flight, as a context. `is_quiet` from `quiet_s` after a beat until the next one."""

    def __init__(self, quiet_s: float, on_quiet: Callable[[], None]):
        self._quiet_s, self._on_quiet = quiet_s, on_quiet
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.is_quiet = False
        self._last = self._loop.time()

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def beat(self) -> None:
        self._last, self.is_quiet = self._loop.time(), False
        if self._timer is None:
            self._set(self._quiet_s)

    def _set(self, after_s: float) -> None:
        self._timer = self._loop.call_later(after_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if (left_s := self._last + self._quiet_s - self._loop.time()) > 0:
            self._set(left_s)
        else:
            self.is_quiet = True
            self._on_quiet()
