"""Work aside: limits in CPU time, processes that die, and an event loop that goes on meanwhile."""

import asyncio
import contextlib
import mmap
import multiprocessing
import os
import re
import time
import types

import pytest

from palestra.core.errors import InfrastructureError, UserError
from palestra.env.aside import TooSlowError, aside, limited
from palestra.env.load import OF_FILES
from palestra.env.mathematics import math_equal

pytestmark = pytest.mark.slow


def burn(cpu_s: float) -> str:
    began = time.process_time()
    while time.process_time() - began < cpu_s:
        pass
    return "burnt"


def backtrack() -> None:
    """In C, where no signal handler gets in between."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def die() -> None:
    os._exit(3)


def refuse() -> None:
    raise ValueError("no number")


async def test_the_event_loop_goes_on_while_work_is_done_aside():
    """The planted fault: the same work in the loop's own thread. Of that thread's time: a machine's pauses are none
    of the loop's."""

    async def longest_pause_s(work) -> float:
        longest, done = 0.0, asyncio.ensure_future(work)
        while not done.done():
            began = time.thread_time()
            await asyncio.sleep(0.001)
            longest = max(longest, time.thread_time() - began)
        return longest

    async def in_the_loop() -> None:
        burn(0.5)

    await aside(burn, 0.0)  # its process has started
    held_up_s = await longest_pause_s(in_the_loop())
    assert held_up_s >= 0.45
    assert await longest_pause_s(aside(burn, 0.5)) < held_up_s / 2


async def test_what_uses_too_much_cpu_time_is_stopped_and_what_only_waits_is_not():
    with pytest.raises(TooSlowError, match=r"burn used more than 0\.3 s of CPU time"):
        await limited(0.3, burn, 60.0)
    await limited(0.3, time.sleep, 0.8)


async def test_code_that_heeds_no_signal_is_ended_by_the_kernel():
    with pytest.raises(TooSlowError, match="backtrack used more than 1 s"):
        await limited(1.0, backtrack)
    assert await aside(burn, 0.0) == "burnt"


async def test_a_process_that_dies_is_infrastructure_and_another_takes_its_place():
    with pytest.raises(InfrastructureError, match="die: its process ended with 3"):
        await aside(die)
    assert await aside(burn, 0.0) == "burnt"


class OddError(Exception):
    """Cannot be made from its words alone, so it cannot be sent."""

    def __init__(self, one: str, other: str):
        super().__init__(f"{one} and {other}")


def refuse_oddly() -> None:
    raise OddError("this", "that")


def fill_memory(size: int) -> int:
    return len(mmap.mmap(-1, size))  # untouched: the machine need not have it


async def test_an_error_that_cannot_be_sent_is_told_in_words_and_breaks_nothing():
    with pytest.raises(RuntimeError, match="OddError: this and that"):
        await aside(refuse_oddly)
    assert await aside(burn, 0.0) == "burnt"


async def test_memory_is_limited():
    assert await aside(fill_memory, 1 << 30) == 1 << 30
    with pytest.raises(OSError, match="Cannot allocate memory"):
        await aside(fill_memory, 6 << 30)


async def test_a_timeout_of_the_functions_own_is_its_own():
    with pytest.raises(TimeoutError, match="mine"):
        await aside(own_timeout)


def own_timeout() -> None:
    raise TimeoutError("mine")


async def test_processes_that_are_gone_are_replaced():
    await aside(burn, 0.0)
    for child in multiprocessing.active_children():
        child.terminate()
    await asyncio.sleep(0.5)
    with contextlib.suppress(InfrastructureError):  # whoever comes first may hear of it
        await aside(burn, 0.0)
    assert await aside(burn, 0.0) == "burnt"


async def test_a_function_of_a_single_file_is_refused_before_a_process_looks_for_it():
    strange = types.FunctionType(burn.__code__, {"__name__": f"{OF_FILES}x"}, "burn")
    with pytest.raises(UserError, match="make a package"):
        await aside(strange, 0.0)


async def test_what_the_function_raises_is_raised():
    with pytest.raises(ValueError, match="no number"):
        await aside(refuse)


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("42", "42", True),
        ("42.0", "42", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\boxed{\frac{2}{4}}", r"\frac12", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("41", "42", False),
        ("", "42", False),
        ("I do not know", "42", False),
        (r"\frac{1}{", "0.5", False),
        ("9" * 9_000, "42", False),
        ("9**9**9**9", "42", False),
    ],
)
async def test_mathematical_equality(answer, gold, equal):
    assert await math_equal(answer, gold) is equal
