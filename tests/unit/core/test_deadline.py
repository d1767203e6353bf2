"""Waits that end."""

import asyncio
import contextlib
import selectors
from collections.abc import Callable

import pytest

from palestra.core.deadline import Unhurried, within
from palestra.core.errors import DeadlineError, InfrastructureError


async def test_what_comes_in_time_is_returned():
    assert await within(5, asyncio.sleep(0, "reply"), waiting_for="a reply") == "reply"


async def test_a_wait_that_ends_says_what_for():
    with pytest.raises(DeadlineError) as raised:
        await within(0.01, asyncio.Event().wait(), waiting_for="engine-0 to answer", hint="see logs/engine-0.log")
    assert str(raised.value) == "waited 0.01 s for engine-0 to answer; see logs/engine-0.log"
    assert isinstance(raised.value, InfrastructureError)


async def test_a_timeout_inside_is_not_ours():
    async def inner() -> None:
        raise TimeoutError("a socket's")

    with pytest.raises(TimeoutError, match="a socket's") as raised:
        await within(5, inner(), waiting_for="x")
    assert not isinstance(raised.value, DeadlineError)


async def test_a_cancelled_wait_is_cancelled():
    task = asyncio.ensure_future(within(5, asyncio.Event().wait(), waiting_for="x"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class LateLoop(asyncio.SelectorEventLoop):
    """Its time passes by its own count: every timer is heard of `late_s` after it was due."""

    def __init__(self, late_s: float):
        self.now_s, self._late_s = 0.0, late_s
        super().__init__(LateSelector(self._pass))

    def time(self) -> float:
        return self.now_s

    def _pass(self, seconds: float) -> None:
        self.now_s += seconds + self._late_s


class LateSelector(selectors.DefaultSelector):
    def __init__(self, wait: Callable[[float], None]):
        super().__init__()
        self._wait = wait

    def select(self, timeout=None):
        if timeout:
            self._wait(timeout)
        return super().select(0)


def test_timers_that_are_a_little_late_each_do_not_make_it_longer():
    """The planted fault: slices that each begin when the last one was heard of, of which 20 take 1.8 s together."""

    async def expire() -> float:
        with pytest.raises(TimeoutError):
            async with Unhurried(1.0) as limit:
                await asyncio.Event().wait()
        assert limit.expired
        return asyncio.get_running_loop().time()

    with contextlib.closing(LateLoop(0.04)) as loop:
        assert loop.run_until_complete(expire()) == pytest.approx(1.04, abs=0.001)


def test_of_time_in_which_the_loop_was_blocked_a_slice_counts():
    async def expire(loop: LateLoop) -> float:
        loop.call_at(0.51, block, loop)
        with pytest.raises(TimeoutError):
            async with Unhurried(1.0):
                await asyncio.Event().wait()
        return loop.time()

    def block(loop: LateLoop) -> None:
        loop.now_s += 7.0

    with contextlib.closing(LateLoop(0.0)) as loop:
        assert loop.run_until_complete(expire(loop)) == pytest.approx(1.0 + 7.0 - 0.09, abs=0.001)
