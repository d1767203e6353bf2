"""Attacks on the backend `local` that reach for its agent, its host's knowledge of an end, or a life after it.

Each was found to work against walls without what keeps it out now.
"""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from palestra.core.errors import UserError
from palestra.sandbox import Host, Limits, Options, Result, Sandbox, SandboxStartError
from palestra.sandbox.agent import children_of
from palestra.sandbox.backends.base import Started
from palestra.sandbox.backends.local import Local

pytestmark = pytest.mark.slow
ENDS_WITHIN_S = 30.0
SMALL = Limits(memory_mb=128, disk_mb=32, inodes=8192, processes=64)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host(Options(backend="local"), warm=0)
    try:
        await host.open()
    except SandboxStartError as error:
        pytest.skip(str(error))
    yield host
    await host.close()


CHANGE = """
import os, resource
acts = dict(
    limit=lambda: resource.prlimit(1, resource.RLIMIT_AS, (1, 1)),
    idle=lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
    nice=lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
    nice_all=lambda: os.setpriority(os.PRIO_USER, 0, 19),
    pinned=lambda: os.sched_setaffinity(1, {0}),
)
for name, act in acts.items():
    try:
        act()
        print(name)
    except PermissionError:
        pass
resource.prlimit(0, resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))
os.sched_setaffinity(0, os.sched_getaffinity(0))
os.nice(1)
"""


async def test_a_program_changes_neither_limits_nor_share_of_the_agent(host: Host):
    """One that could would end its sandbox as if the machine had failed, and be played again instead of scored."""
    async with await host.create(limits=SMALL, timeout_s=60) as box:
        done = await box.exec(["python3", "-c", CHANGE])
        assert (done.stdout, done.stderr, done.exit_code) == ("", "", 0)
        assert (await box.exec("echo well")).stdout == "well\n"
    alone = await host.run_code(CHANGE.replace("(1, 1)", "(2**40, 2**40)").replace("PRIO_USER, 0", "PRIO_PROCESS, 0"))
    assert alone.stdout.split() == ["limit", "idle", "nice", "nice_all", "pinned"]  # it is the first itself


DEEP = """
import os
for _ in range(3000):
    os.mkdir("d")
    os.chdir("d")
"""


async def test_directories_too_deep_are_an_error_of_their_files_and_not_of_the_sandbox(host: Host):
    async with await host.create(limits=SMALL, timeout_s=60) as box:
        assert (await box.exec(["python3", "-c", DEEP])).exit_code == 0
        with pytest.raises(OSError, match="recursion"):
            await box.remove("d")
        assert (await box.exec("echo well")).stdout == "well\n"


async def test_what_a_program_cannot_be_given_is_no_failure_of_the_program(host: Host):
    """Nothing of it has run: it would be scored for what its host did."""
    large = Limits(memory_mb=512, disk_mb=256)
    with pytest.raises(ValueError, match="67108876 bytes of code, input and 0 files"):
        await host.run_code("print('ran')", stdin=bytes(2**26), limits=large)
    with pytest.raises(ValueError, match="12000 files"):
        await host.run_code("print('ran')", files={f"{number:0100}": b"" for number in range(12_000)}, limits=large)
    for files in ({"a": b"x", "a/b": b"y"}, {"a": bytes(2**25 + 1)}):
        with pytest.raises(ValueError, match=r"its files and input: .*(File exists|File too large|No space)"):
            await host.run_code("print('ran')", files=files, limits=SMALL)
    with pytest.raises(ValueError, match=r"File too large|No space"):
        await host.run_code("print('ran')", stdin=bytes(2**25 + 1), limits=SMALL)
    forged = "import os\nfor fd in range(3, 1024):\n  try: os.write(fd, b'x')\n  except OSError: pass\nos._exit = print"
    assert (await host.run_code(forged, limits=SMALL)).status in ("ok", "failed")  # it cannot say so itself


HOST = """
import asyncio
from palestra.sandbox import Host, Options

async def main():
    async with Host(Options(backend="local"), warm=0) as host:
        on_output = lambda name, piece: print(piece.decode(), flush=True)
        await host.run_code({code!r}, timeout_s=60, on_output=on_output)

asyncio.run(main())
"""
FORGETFUL = """
import os, sys, threading
line = "import time; print('became another', flush=True); time.sleep(600)"
threading.Thread(target=lambda: os.execv(sys.executable, ["another", "-c", line, "MARK"])).start()
threading.Event().wait()
"""


def _pids_of(mark: str) -> set[int]:
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if place.read_bytes().startswith(b"another\0") and mark.encode() in place.read_bytes():
                found.add(int(place.parent.name))
        except OSError:
            pass
    return found


async def test_a_program_that_forgets_its_parent_ends_with_a_host_that_was_killed(host: Host):
    """A thread that becomes another program is the first process from then on, and no signal of its parent's end is
    meant for it.
    """
    mark = f"mark-{os.getpid()}"
    code = HOST.format(code=FORGETFUL.replace("MARK", mark))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"became another\n"
        fds = [os.pidfd_open(pid) for pid in _pids_of(mark)]
        running.kill()
    try:
        left = [fd for fd in fds if not select.select([fd], [], [], ENDS_WITHIN_S)[0]]
        assert (len(fds), left) == (1, [])
    finally:
        for fd in fds:
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            os.close(fd)


async def test_arguments_of_the_first_process_do_not_tell_where_the_host_has_its_files(host: Host):
    """A program that is the first process could read them of itself, and any of the agent."""
    async with await host.create(limits=SMALL, timeout_s=60) as box:
        seen = [(await box.exec(["cat", "/proc/1/cmdline"])).stdout]
    seen.append((await host.run_code("print(open('/proc/self/cmdline').read())")).stdout)
    assert all("zygote" in one for one in seen)
    assert not [one for one in seen if str(Path(__file__).resolve().parents[3]) in one]


async def test_a_zygote_that_is_busy_hears_of_every_program_that_is_to_end(host: Host):
    """One that it did not hear of ran on, and was a failure of the machine instead of a program that took too long."""
    assert isinstance(host.backend, Local)
    (zygote,) = children_of(host.backend._process.pid)
    began = asyncio.Event()
    code = "print('begun', flush=True)\nwhile True: pass"
    running = asyncio.create_task(host.run_code(code, timeout_s=1.5, on_output=lambda *_: began.set()))
    await asyncio.wait_for(began.wait(), ENDS_WITHIN_S)
    os.kill(zygote, signal.SIGSTOP)
    try:
        while True:
            host.backend._socket.send(b'{"kill":0}')
    except BlockingIOError:
        pass
    await asyncio.sleep(1.5)
    os.kill(zygote, signal.SIGCONT)
    ended = await asyncio.wait_for(running, ENDS_WITHIN_S)
    assert (ended.status, ended.exit_code) == ("timed_out", None)


async def _begun(box: Sandbox) -> list[asyncio.Task[Result]]:
    """Three programs. Their agent takes requests in order: they run before it answers another."""
    running = [asyncio.create_task(box.exec("sleep 100", timeout_s=90)) for _ in range(3)]
    await asyncio.sleep(0)
    await box.list_files()
    return running


async def test_all_programs_of_a_sandbox_that_died_of_its_memory_are_told_so(host: Host):
    """The zygote says that it has ended after its agent was heard to be gone."""
    assert isinstance(host.backend, Local)
    (zygote,) = children_of(host.backend._process.pid)
    async with await host.create(limits=SMALL, timeout_s=120) as box:
        running = await _begun(box)
        (started,) = host.backend._started.values()
        assert isinstance(started, Started)
        counts = iter([True])  # as the kernel's counter: it has grown since it was last asked, and then not
        started._has_killed = lambda: next(counts, False)
        (agent,) = psutil.Process(zygote).children()
        os.kill(zygote, signal.SIGSTOP)
        try:
            agent.kill()
            assert [result.status for result in await asyncio.gather(*running)] == ["oom"] * 3
        finally:
            os.kill(zygote, signal.SIGCONT)


async def test_all_programs_of_a_sandbox_that_died_of_its_memory_are_told_so_by_the_zygote(host: Host):
    """The other way round: the zygote says so first."""
    assert isinstance(host.backend, Local)
    async with await host.create(limits=SMALL, timeout_s=120) as box:
        running = await _begun(box)
        (number,) = host.backend._started
        if number not in host.backend._groups_of:
            pytest.skip("nothing counts here but the zygote")
        started = host.backend._started[number]
        assert isinstance(started, Started)
        counts = iter([True])
        host.backend._groups_of[number].has_killed = lambda: next(counts, False)
        asyncio.get_running_loop().remove_reader(started.link._socket.fileno())
        started.kill()
        assert [result.status for result in await asyncio.gather(*running)] == ["oom"] * 3


async def test_a_zygote_that_is_busy_with_ends_makes_others_wait_and_fails_nobody() -> None:
    """Its socket takes some two hundred messages: a thousand ends fill it, and what is asked for then was refused."""
    async with Host(Options(backend="local")) as host:
        boxes = await host.bulk_create(600, limits=Limits(memory_mb=64, disk_mb=16))
        for box in boxes:
            await box.delete()
        done = await asyncio.gather(*(host.run_code("print(1)", timeout_s=30) for _ in range(40)))
    assert {one.stdout for one in done} == {"1\n"}


async def test_whoever_listens_to_a_one_shot_program_fails_alone(host: Host):
    def deaf(name: str, piece: bytes) -> None:
        raise LookupError("not for me")

    with pytest.raises(LookupError, match="not for me"):
        await host.run_code("print(1)", on_output=deaf)
    assert (await host.run_code("print(2)")).stdout == "2\n"


async def test_a_module_that_is_not_there_is_told_to_whoever_wants_it_loaded():
    with pytest.raises(UserError, match=r"preload=.*nmupy"):
        async with Host(Options(backend="local", preload=("nmupy",))):
            pass
