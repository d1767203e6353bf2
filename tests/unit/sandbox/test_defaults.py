"""`Sandbox.create` and `run_code` without a host at hand: it comes by itself, and ends with the event loop."""

import subprocess
import sys

import pytest

from palestra.core.errors import UserError
from palestra.sandbox import IsolationError, Sandbox, close_hosts, run_code

_SCRIPT = """
import asyncio
from palestra.sandbox import run_code
print(asyncio.run(run_code("print(6 * 7)", backend="unsafe", min_isolation=0)).stdout, end="")
"""


def test_nothing_is_left_when_the_loop_ends() -> None:
    """With warnings as errors: an open socket or a process that runs on would be told on stderr."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", _SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


async def test_many_at_once_by_label() -> None:
    plain = {"backend": "unsafe", "min_isolation": 0}
    made = await Sandbox.bulk_create(3, labels=["three"], timeout_s=60, **plain)
    other = await Sandbox.create(labels=["other"], timeout_s=60, **plain)
    assert {box.id for box in await Sandbox.list(labels=["three"], **plain)} == {box.id for box in made}
    assert await Sandbox.bulk_delete(labels=["three"], **plain) == 3
    assert [box.id for box in await Sandbox.list(**plain)] == [other.id]
    await close_hosts()


async def test_options_that_there_are_not() -> None:
    with pytest.raises(UserError, match="no option 'memroy_mb'; did you mean 'memory_mb'"):
        await Sandbox.create(memroy_mb=64)
    with pytest.raises(UserError, match="there is no sandbox 'moat'"):
        await run_code("print(1)", backend="moat")
    await close_hosts()


async def test_an_error_of_whoever_listens_is_theirs_and_harms_no_sandbox() -> None:
    def deaf(name: str, piece: bytes) -> None:
        raise LookupError("not for me")

    box = await Sandbox.create(backend="unsafe", timeout_s=60)
    with pytest.raises(LookupError, match="not for me"):
        await box.exec("echo words", timeout_s=10, on_output=deaf)
    assert (await box.exec("echo on", timeout_s=10)).stdout == "on\n"
    await close_hosts()


async def test_a_key_is_free_again_when_its_sandbox_is_gone() -> None:
    first = await Sandbox.create(backend="unsafe", timeout_s=60, key="one")
    assert (await Sandbox.create(backend="unsafe", timeout_s=60, key="one")).id == first.id
    await first.delete()
    assert (await Sandbox.create(backend="unsafe", timeout_s=60, key="one")).id != first.id
    await close_hosts()


async def test_a_name_needs_no_more_isolation_than_it_has_unless_that_is_asked_for() -> None:
    assert (await run_code("print(1)", backend="unsafe")).stdout == "1\n"
    with pytest.raises(IsolationError, match="isolates by none, less than min_isolation=process"):
        await run_code("print(1)", backend="unsafe", min_isolation="process")
    with pytest.raises(UserError, match="must be one of none, process, namespaces, kernel"):
        await run_code("print(1)", min_isolation="much")
    with pytest.raises(UserError, match="'unsafe' knows no without"):
        await run_code("print(1)", backend="unsafe", without=["seccomp"])
    await close_hosts()
