"""What every backend does, and what those that isolate keep out: the same programs in each that works here.

`unsafe` is the negative control: what the others keep out, is there for it.
"""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from palestra.sandbox import (
    Host,
    Isolation,
    Limits,
    Options,
    Sandbox,
    SandboxGoneError,
    SandboxStartError,
    UnsupportedError,
)
from palestra.sandbox.agent import children_of
from palestra.sandbox.backends.choose import BACKENDS, ELSEWHERE
from palestra.sandbox.backends.local import Local
from palestra.sandbox.check import at_best

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECRET = "the-secret-of-the-host-7341"
HAVE_PORTS = {"local", "bwrap", "oci", "unsafe"}
ENDS_WITHIN_S, GONE_S = 1.0, 30.0
SOURCE = str(Path(__file__).resolve().parents[3] / "src")


def _options(name: str) -> Options:
    return Options(backend=name, min_isolation=Isolation.NONE)


@pytest.fixture(params=[name for name in BACKENDS if name not in ELSEWHERE])
async def host(request, monkeypatch) -> AsyncIterator[Host]:
    monkeypatch.setenv("PALESTRA_SECRET", SECRET)
    host = Host(_options(request.param), warm=0)
    try:
        await host.open()
    except SandboxStartError as error:
        pytest.skip(str(error))
    yield host
    await host.close()


@pytest.fixture
def secret_file() -> Iterator[Path]:
    """Everybody may read it, and write beside it."""
    with tempfile.TemporaryDirectory(prefix="everybodys-") as directory:
        os.chmod(directory, 0o777)
        place = Path(directory) / "secret"
        place.write_text(SECRET)
        place.chmod(0o644)
        yield place


def _is_control(host: Host) -> bool:
    return host.backend.isolation is Isolation.NONE


def _ended_after(pids: set[int]) -> float:
    """How long from now all of them took; they all end."""
    began, left = time.monotonic(), set()
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(began + GONE_S - time.monotonic(), 0) * 1000):
            left.add(pid)
        os.close(fd)
    assert left == set()
    return time.monotonic() - began


def _named(marker: str) -> set[int]:
    """Processes of this machine that have it among their arguments."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in place.read_bytes():
                found.add(int(place.parent.name))
        except OSError:
            pass
    return found


# --- what each does


async def test_programs_have_input_output_and_an_end(host: Host):
    async with await host.create() as box:
        told = await box.exec("cat; echo $GREETING >&2; exit 7", stdin="in\n", env={"GREETING": "hello"})
        assert (told.exit_code, told.stdout, told.stderr, told.status) == (7, "in\n", "hello\n", "failed")
        assert (await box.exec(["python3", "-c", "print(6 * 7)"])).stdout == "42\n"
        assert (await box.exec("kill -9 $$")).signal == 9
        assert (await box.exec(["no-such-program"])).exit_code == 127
        flood = await box.exec("head -c 3000000 /dev/zero | tr '\\0' x", max_output=1000)
        assert (len(flood.stdout), flood.truncated, flood.exit_code) == (1000, True, 0)
    assert (await host.run_code("print(int(input()) + 1)", stdin="41")).stdout == "42\n"


async def test_files_are_written_read_listed_and_removed(host: Host):
    content = bytes(range(256)) * 300
    async with await host.create() as box:
        await box.write("a/b.bin", content)
        assert await box.read("a/b.bin", 200, 300) == content[200:500]
        assert (await box.exec("wc -c < a/b.bin; pwd")).stdout == f"{len(content)}\n{box.home}\n"
        assert [(f.path, f.kind, f.size) for f in await box.list_files("a")] == [("b.bin", "file", len(content))]
        await box.remove("a")
        assert await box.list_files() == []
        with pytest.raises(FileNotFoundError):
            await box.read("a/b.bin")


async def test_a_program_that_is_late_ends_with_all_that_it_started(host: Host):
    async with await host.create() as box:

        async def attempt() -> float:
            began = time.monotonic()
            late = await box.exec("(sleep 100 & sleep 100) ; echo never", timeout_s=0.5)
            took = time.monotonic() - began
            assert late.timed_out
            assert took >= 0.5
            assert (await box.exec("echo still here")).stdout == "still here\n"
            return took

        await at_best(0.5 + 0.2, attempt)


async def test_what_takes_too_much_memory_is_killed(host: Host):
    async with await host.create(limits=Limits(memory_mb=64, disk_mb=16)) as box:
        greedy = "x = []\nwhile True: x.append(b'a' * (1 << 20))"
        assert (await box.exec(["python3", "-c", greedy])).status == "oom"
    async with await host.create(limits=Limits(memory_mb=64, disk_mb=16)) as box:
        assert (await box.exec(["python3", "-c", "print(len(b'a' * (16 << 20)))"])).stdout == "16777216\n"


async def test_a_talk_with_a_program(host: Host):
    async with await host.create() as box:
        process = await box.open_process("while read x; do echo $((2 * x)); done")
        await process.send("21\n")
        assert (await process.read(wait_s=60))[0] == b"42\n"
        await process.kill()
        assert (await process.wait(60)).signal == 9


SERVER = "import http.server as h; h.HTTPServer(('127.0.0.1', {0}), h.SimpleHTTPRequestHandler).serve_forever()"
CONNECT = "until python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {0}))'; do :; done"


async def test_ports_are_passed_or_refused(host: Host):
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    async with await host.create() as box:
        await box.background(["python3", "-c", SERVER.format(number)])
        if host.backend.name != "process":  # which has no sockets at all
            assert (await box.exec(CONNECT.format(number))).exit_code == 0
        if host.backend.name not in HAVE_PORTS:
            with pytest.raises(UnsupportedError, match="'local' and 'bwrap' have"):
                await box.expose_port(number)
            assert (await box.exec("echo as before")).stdout == "as before\n"
            return
        port = await box.expose_port(number)
        reader, writer = await asyncio.open_connection(port.host, port.host_port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.readline(), 60)
        writer.close()
        await writer.wait_closed()


async def test_the_time_of_a_one_shot_program_counts_from_when_it_has_its_interpreter():
    """Planted: a zygote that stands still for longer than the program may take."""
    async with contextlib.AsyncExitStack() as closing:
        try:
            host = await closing.enter_async_context(Host(_options("local"), warm=0))
        except SandboxStartError as error:
            pytest.skip(str(error))
        assert isinstance(host.backend, Local)
        (zygote,) = children_of(host.backend._process.pid)
        os.kill(zygote, signal.SIGSTOP)
        running = asyncio.create_task(host.run_code("print(1)", timeout_s=3.0))
        await asyncio.sleep(4.0)
        os.kill(zygote, signal.SIGCONT)
        told = await asyncio.wait_for(running, 60)
        assert (told.stdout, told.timed_out) == ("1\n", False)
        assert told.wall_s < 3.0


# --- their ends

DAEMONS = (
    "setsid sh -c 'sleep {0}; :' >/dev/null 2>&1 & "
    "python3 -c 'import os,time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep({0})' & "
    "sleep 0.3; echo started"
)


@pytest.fixture
def own_directory(monkeypatch) -> Iterator[Path]:
    """For what sandboxes keep there, of all users: whoever tests beside us has another."""
    with tempfile.TemporaryDirectory(prefix="own-") as directory:
        os.chmod(directory, 0o711)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


async def test_delete_kills_daemons_and_leaves_no_files(host: Host, own_directory: Path):
    marker = _marker(1)

    async def attempt() -> float:
        before = children_of(os.getpid())
        box = await host.create()
        told = await box.exec(DAEMONS.format(marker))
        assert told.stdout == "started\n"
        there = (children_of(os.getpid()) | _named(marker)) - before
        assert there
        await box.delete()
        took = await asyncio.to_thread(_ended_after, there)
        assert _named(marker) == set()
        with pytest.raises(SandboxGoneError):
            await box.exec("true")
        return took

    await at_best(ENDS_WITHIN_S, attempt)
    await host.close()
    assert list(own_directory.glob(f"palestra-{host.backend.name}-*/home")) == []


async def test_a_hung_agent_is_no_obstacle_to_an_end(host: Host):
    async def attempt() -> float:
        before = children_of(os.getpid())
        box = await host.create()
        there = children_of(os.getpid()) - before
        agents = {pid for pid in there if not children_of(pid)}  # and of gVisor, its kernel
        for pid in agents:
            os.kill(pid, signal.SIGSTOP)
        await box.delete()
        return await asyncio.to_thread(_ended_after, there)

    await at_best(ENDS_WITHIN_S, attempt)


HOST = """
import asyncio, sys
from palestra.sandbox import Host, Isolation, Options

async def main():
    host = await Host(Options(backend=sys.argv[1], min_isolation=Isolation.NONE), warm=0).open()
    boxes = [await host.create() for _ in range(2)]
    for box in boxes:
        print((await box.exec(sys.argv[2])).stdout, end="", flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


async def test_a_host_that_is_killed_leaves_nothing(host: Host, own_directory: Path):
    name, marker = host.backend.name, _marker(2)
    await host.close()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")])}
    environment["TMPDIR"] = str(own_directory)
    argv = [sys.executable, "-c", HOST, name, DAEMONS.format(marker)]

    async def attempt() -> float:
        with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(2):
                assert await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 60) == "started\n"
            there = children_of(process.pid) | _named(marker) - {process.pid}
            assert len(there) >= 2
            process.kill()
            took = await asyncio.to_thread(_ended_after, there)
        assert _named(marker) == set()
        assert list(own_directory.glob(f"palestra-{name}-*")) == []
        return took

    await at_best(ENDS_WITHIN_S, attempt)


# --- what is kept out


async def test_the_environment_of_the_host_stays_there(host: Host):
    argv, environment = ["sleep", "60"], {"PATH": os.defpath, "PALESTRA_SECRET": SECRET}
    with subprocess.Popen(argv, env=environment) as neighbour:
        async with await host.create() as box:
            await _has_nothing_of_the_host(box, is_control=_is_control(host))
        neighbour.kill()


async def _has_nothing_of_the_host(box: Sandbox, *, is_control: bool) -> None:
    own = await box.exec("env; cat /proc/1/environ /proc/self/environ; true")
    assert SECRET not in own.stdout
    assert {"PATH", "HOME", "LANG"} <= {line.partition("=")[0] for line in own.stdout.splitlines()}
    assert "PALESTRA" not in own.stdout
    everybodys = (await box.exec(f"cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -c {SECRET}")).stdout
    assert (everybodys != "0\n") == is_control


async def test_files_of_the_host_are_neither_read_nor_written(host: Host, secret_file: Path):
    async with await host.create() as box:
        read = await box.exec(["cat", str(secret_file)])
        written = await box.exec(f"echo x > {secret_file.parent}/new")
        assert (read.exit_code == 0, written.exit_code == 0) == (_is_control(host), _is_control(host))
        assert (secret_file.parent / "new").exists() == _is_control(host)
        if not _is_control(host):
            with pytest.raises(OSError, match=r"."):
                await box.read(str(secret_file))


async def test_settings_of_the_kernel_are_not_writable(host: Host):
    async with await host.create() as box:
        writable = (await box.exec("test -w /proc/sys/kernel/core_pattern && echo yes")).stdout == "yes\n"
        assert writable == (_is_control(host) and os.geteuid() == 0)
        for place in ("/usr/x", "/etc/x", "/x"):
            told = await box.exec(["python3", "-c", f"open({place!r}, 'ab').close(); import os; os.unlink({place!r})"])
            assert (told.exit_code == 0) == (_is_control(host) and os.geteuid() == 0), place


async def test_programs_have_no_rights(host: Host):
    async with await host.create() as box:
        lines = (await box.exec("cat /proc/self/status")).stdout.splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert (int(status["CapEff"], 16) == 0) or (_is_control(host) and os.geteuid() == 0)
        if host.backend.isolation is not Isolation.KERNEL:  # whose kernel keeps the two to itself
            expected = ("0", "0") if _is_control(host) else ("1", "2")
            assert (status["NoNewPrivs"], status["Seccomp"]) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make others")
async def test_root_inside_or_outside_runs_no_program(host: Host):
    """Not even one that is nobody in there may be root out here, who may write the kernel's settings."""
    async with await host.create() as box:
        await box.background(["sleep", _marker(4)])
        assert (await box.exec("id -u")).stdout != "0\n" or _is_control(host)
        outside = {Path(f"/proc/{pid}").stat().st_uid for pid in _named(_marker(4))}
        if host.backend.isolation is not Isolation.KERNEL:  # whose programs this machine does not see
            assert len(outside) == 1
            assert (outside == {0}) == _is_control(host)


async def test_the_network_of_the_host_is_out_of_reach(host: Host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        async with await host.create() as box:
            told = await box.exec(
                ["python3", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('in')"]
            )
            assert (told.stdout == "in\n") == _is_control(host)


async def test_sandboxes_do_not_meet(host: Host):
    """Neither the files nor the processes of one are within reach of another."""
    async with await host.create() as one, await host.create() as other:
        await one.write("mine", SECRET)
        sleeper = await one.background(["sleep", _marker(3)])
        seen = sleeper.pid if host.backend.isolation < Isolation.NAMESPACES else next(iter(_named(_marker(3))), 2)
        found = await other.exec(f"cat {one.home}/mine; kill -9 {seen}")
        assert (SECRET in found.stdout) == _is_control(host)
        if _is_control(host):
            assert (await sleeper.wait(30)).signal == 9
        is_alive = (await one.exec(f"kill -0 {sleeper.pid}")).exit_code == 0
        assert is_alive != _is_control(host)


def _marker(number: int) -> str:
    """Seconds to sleep, that no other program of this machine has among its arguments."""
    return f"{number}{os.getpid()}.{number}25"
