"""Whether a rollout makes progress.

Consumes: beats (tokens that arrived, calls, replies), and whether somebody is at work who cannot beat.
Produces: word when none came for `quiet_s`.
Waits for: a timer of the event loop, set anew from the last beat when it rings. Ends when: stopped.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self


class Pulse:
    """Of one rollout in flight, as a context. `is_quiet` from `quiet_s` after a beat until the next one."""

    def __init__(self, quiet_s: float, on_quiet: Callable[[], None]):
        self._quiet_s, self._on_quiet = quiet_s, on_quiet
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.is_quiet = False
        self._num_working, self._is_stopped = 0, False
        self._last = self._loop.time()

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def beat(self) -> None:
        self._last, self.is_quiet = self._loop.time(), False
        if self._timer is None and not self._is_stopped:
            self._set(self._quiet_s)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """No silence counts meanwhile: of whoever answers with one word at the end, within a deadline of its own."""
        self._num_working += 1
        self.is_quiet = False
        try:
            yield
        finally:
            self._num_working -= 1
            self.beat()

    def _set(self, after_s: float) -> None:
        self._timer = self._loop.call_later(after_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._num_working:
            return  # its end is a beat
        if (left_s := self._last + self._quiet_s - self._loop.time()) > 0:
            self._set(left_s)
        else:
            self.is_quiet = True
            self._on_quiet()
