"""The agent, as a process of its own without walls: frames, programs, files. And what comes from one is not trusted."""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palestra.sandbox import agent as agent_module
from palestra.sandbox.agent import MOST_HEADER, frame, frames
from palestra.sandbox.check import at_best
from palestra.sandbox.link import Link
from palestra.sandbox.records import SandboxGoneError


@contextlib.asynccontextmanager
async def agent(home: Path, *words: str) -> AsyncIterator[Link]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", agent_module.__file__, str(home), *words], stdin=theirs, stdout=theirs
        )
    link = Link(ours)
    await asyncio.wait_for(link.ready, 60)
    try:
        yield link
    finally:
        link.close("the test is over")
        await asyncio.to_thread(process.wait, 60)


async def ended(link: Link, **header) -> tuple[dict, str, str]:
    answer, body, _ = await asyncio.wait_for(link.call({"do": "exec", "timeout_s": 30, **header}), 60)
    cut = answer.get("stdout_bytes", 0)
    return answer, body[:cut].decode(), body[cut:].decode()


@given(
    st.lists(st.tuples(st.dictionaries(st.text(), st.integers() | st.text()), st.binary(max_size=50))),
    st.integers(1, 9),
)
def test_frames_survive_any_cut(messages: list[tuple[dict, bytes]], step: int) -> None:
    data = b"".join(frame(header, body) for header, body in messages)
    buffer, heard = bytearray(), []
    for at in range(0, len(data), step):
        buffer += data[at : at + step]
        heard += frames(buffer)
    assert heard == messages
    assert not buffer


def test_frames_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="a frame of"):
        list(frames(bytearray(struct.pack("!II", MOST_HEADER + 1, 0))))
    with pytest.raises(ValueError, match="no object"):
        list(frames(bytearray(struct.pack("!II", 2, 0) + b"[]")))
    with pytest.raises(json.JSONDecodeError):
        list(frames(bytearray(struct.pack("!II", 2, 0) + b"x{")))


async def test_a_program_to_its_end(tmp_path: Path) -> None:
    async with agent(tmp_path) as link:
        answer, out, err = await ended(link, argv=["sh", "-c", "echo out; echo err >&2; exit 3"])
        assert (answer["exit_code"], answer["signal"], out, err) == (3, None, "out\n", "err\n")
        answer, _, _ = await ended(link, argv=["sh", "-c", "kill -9 $$"])
        assert (answer["exit_code"], answer["signal"]) == (None, 9)
        answer, _, _ = await ended(link, argv=["no-such-program"])
        assert answer["unstarted"] == 2


async def test_a_flood_is_cut_and_holds_nobody_up(tmp_path: Path) -> None:
    async with agent(tmp_path) as link:
        flood = asyncio.ensure_future(ended(link, argv=["yes"], timeout_s=3600, most=1000))
        _, out, _ = await ended(link, argv=["echo", "quick"])
        assert out == "quick\n"
        assert not flood.done()
        flood.cancel()
        answer, out, _ = await ended(link, argv=["yes"], timeout_s=1.0, most=1000)
        assert (answer["timed_out"], answer["truncated"], len(out)) == (True, True, 1000)


async def test_what_outlives_its_parent_is_not_waited_for(tmp_path: Path) -> None:
    async def attempt() -> float:
        answer, out, _ = await ended(link, argv=["sh", "-c", "sleep 20 & echo here"])
        assert out == "here\n"
        return answer["wall_s"]

    async with agent(tmp_path) as link:
        await at_best(2.0, attempt)


async def test_time_ends_a_program_with_all_that_came_from_it(tmp_path: Path) -> None:
    async def attempt() -> float:
        code = "sleep 91.25 & setsid sleep 91.5 & sleep 91.75"
        answer, _, _ = await ended(link, argv=["sh", "-c", code], timeout_s=0.4)
        assert answer["timed_out"]
        assert answer["wall_s"] >= 0.4
        left = "until ! pgrep -f 'sleep 91[.]'; do sleep 0.02; done"  # what was killed may take a moment to end
        await asyncio.to_thread(subprocess.run, ["sh", "-c", left], check=True, capture_output=True, timeout=30)
        return answer["wall_s"]

    async with agent(tmp_path) as link:
        await at_best(0.6, attempt)


async def test_memory_is_watched_where_asked_for(tmp_path: Path) -> None:
    code = (
        "import time\nx = []\nfor _ in range(300): x.append(bytearray(b'x' * 2**20)); time.sleep(0.01)\ntime.sleep(5)"
    )
    hungry = [sys.executable, "-c", code]  # slowly: who watches may stand still for a while
    async with agent(tmp_path, str(120 * 2**20)) as link:
        answer, _, _ = await ended(link, argv=hungry)
        assert (answer["oom"], answer["signal"]) == (True, 9)
        assert answer["max_rss"] < 300 * 2**20
    async with agent(tmp_path, str(1000 * 2**20)) as link:
        answer, _, _ = await ended(link, argv=[sys.executable, "-c", "x = b'x' * (200 * 2**20)"])
        assert (answer["oom"], answer["exit_code"]) == (False, 0)


async def test_pipes_and_directories_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with agent(tmp_path) as link:
        for path in ("pipe", ".", "missing"):
            with pytest.raises(OSError, match=r"no regular file|Is a directory|No such file"):
                await asyncio.wait_for(link.call({"do": "read", "path": path}), 30)
        with pytest.raises(OSError, match=r"no regular file|No such device"):
            await asyncio.wait_for(link.call({"do": "write", "path": "pipe"}, b"x"), 30)


async def test_a_request_that_there_is_not_harms_nobody(tmp_path: Path) -> None:
    async with agent(tmp_path) as link:
        for header in ({"do": "nonsense"}, {"do": "exec"}, {"do": "output", "process": 7}):
            with pytest.raises((ValueError, OSError)):
                await asyncio.wait_for(link.call(header), 30)
        assert (await ended(link, argv=["echo", "well"]))[1] == "well\n"


async def heard(data: bytes) -> Link:
    """A link to somebody who sends these bytes."""
    ours, theirs = socket.socketpair()
    link = Link(ours)
    theirs.sendall(data)
    await asyncio.wait([link.closed, link.ready], return_when="FIRST_COMPLETED", timeout=30)
    theirs.close()
    return link


async def test_what_no_agent_writes_ends_its_sandbox() -> None:
    for data in (b"x" * 100, frame({"ready": True}) + struct.pack("!II", 2**31, 0), struct.pack("!II", 2, 0) + b"[]"):
        link = await heard(data)
        await asyncio.wait([link.closed], timeout=30)
        with pytest.raises(SandboxGoneError):
            await link.call({"do": "ping"})


async def test_answers_that_nobody_waits_for_are_forgotten() -> None:
    link = await heard(frame({"ready": True}) + frame({"id": 1, "exit_code": 0}) + frame({"id": [3]}))
    assert link.ready.done() or link.closed.done()
    link.close("the test is over")


async def test_output_that_was_told_is_not_kept(tmp_path: Path) -> None:
    """Also where the program's time would be over much later."""

    async def held() -> int:
        _, out, _ = await ended(link, argv=["sh", "-c", "cat /proc/$PPID/statm"], timeout_s=3600)
        return int(out.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    flood = ["sh", "-c", "head -c 4000000 /dev/zero"]
    async with agent(tmp_path) as link:
        await ended(link, argv=flood, timeout_s=3600, most=4_000_000)
        before = await held()
        for _ in range(15):
            await ended(link, argv=flood, timeout_s=3600, most=4_000_000)
        assert await held() - before < 20_000_000
