"""The whole SDK over HTTP, clients that vanish, and services that are killed or told to end."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from palestra.core.errors import UserError
from palestra.sandbox import IsolationError, Limits, Sandbox, SandboxGoneError, SandboxUnreachableError
from palestra.sandbox.client import RemoteHost
from palestra.sandbox.host import Options, close_hosts, run_code
from palestra.sandbox.records import Isolation
from tests.integration.sandbox.services import (
    ALICE,
    WAIT_S,
    Heard,
    Process,
    Running,
    alive,
    process,
    serving,
    tokens_file,
    until,
    until_ended,
    until_there,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="the backend local is Linux's"),
]

SMALL = Limits(memory_mb=64, disk_mb=16)
AWAITS_GO = "until [ -e go ]; do sleep 0.05; done"  # a file that the test writes


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


# --- the SDK


async def test_programs_are_as_in_a_host_of_ones_own(running: Running):
    async with running.remote() as host, await host.create(limits=SMALL) as box:
        assert box.home == "/home/user"
        end = await box.exec("cat; echo b >&2; exit 3", stdin=b"\xff\x00a")
        assert (end.exit_code, end.stdout, end.stderr) == (3, "\ufffd\x00a", "b\n")
        assert (await box.exec(["nothing-like-it"])).exit_code == 127
        assert (await box.exec("sleep 9", timeout_s=0.2)).status == "timed_out"
        assert (await box.exec("yes | head -c 5000000", max_output=1000)).stdout == "y\n" * 500
        line, heard = f"echo one; {AWAITS_GO}; echo two", Heard()
        saying = asyncio.create_task(box.exec(line, timeout_s=60, on_output=heard))
        await heard.first()
        await box.write("go", "")
        assert (await saying).stdout == "one\ntwo\n"
        assert heard.pieces == [("stdout", b"one\n"), ("stdout", b"two\n")]
        assert "exit code 3" in await box.logs()


async def test_files_are_as_in_a_host_of_ones_own(running: Running, tmp_path: Path):
    async with running.remote() as host, await host.create(limits=SMALL) as box:
        big = bytes(range(256)) * 20_000  # more than one piece
        await box.write("deep/er/big", big, mode=0o600)
        assert await box.read("deep/er/big") == big
        assert [(f.path, f.size, f.mode) for f in await box.list_files("deep/er")] == [("big", len(big), 0o600)]
        await box.download("deep", tmp_path)
        assert (tmp_path / "er/big").read_bytes() == big
        await box.remove("deep")
        with pytest.raises(FileNotFoundError):
            await box.read("deep/er/big")
        await box.write("a", "")
        await box.write("b", "")
        with pytest.raises(ValueError, match="more than 1 files"):
            await box.list_files(most=1)


async def test_processes_are_talked_to(running: Running):
    async with running.remote() as host, await host.create(limits=SMALL) as box:
        cat = await box.open_process("cat")
        await cat.send("hello")
        assert await cat.read() == (b"hello", b"")
        await cat.send_eof()
        assert (await cat.wait()).exit_code == 0
        sleeper = await box.background(["sleep", "60"])
        assert len(await box.processes()) == 2
        await sleeper.signal(signal.SIGTERM)
        assert (await sleeper.wait()).signal == signal.SIGTERM
        await sleeper.forget()
        with pytest.raises(BrokenPipeError):
            await cat.send("x")
        with pytest.raises(OSError, match="nothing-like-it"):
            await box.open_process(["nothing-like-it"])


async def test_a_port_is_answered(running: Running):
    async with running.remote() as host, await host.create(limits=SMALL) as box:
        with pytest.raises(ConnectionRefusedError):
            await box.expose_port(8080)
        await box.write("page", "in here")
        server = await box.background(["python3", "-u", "-m", "http.server", "8080", "--bind", "127.0.0.1"])
        await server.read()
        where = await box.expose_port(8080)
        async with running.session.get(f"http://{where.host}:{where.host_port}/page") as answer:
            assert await answer.text() == "in here"


async def test_one_shots_are_as_in_a_host_of_ones_own(running: Running):
    async with running.remote() as host:
        code = "import sys\nprint(sys.stdin.buffer.read(), open('a/b', 'rb').read())"
        end = await host.run_code(code, stdin=b"\xff", files={"a/b": b"\xfe"})
        assert end.stdout == "b'\\xff' b'\\xfe'\n"
        said: list[bytes] = []
        end = await host.run_code("print(1); 1/0", on_output=lambda name, piece: said.append(piece))
        assert end.exit_code == 1
        assert sorted(b"".join(said)) == sorted((end.stdout + end.stderr).encode())
        assert (await host.run_code("while True: pass", timeout_s=0.3)).status == "timed_out"
        assert (await host.run_code("x = bytearray(2**30)", limits=SMALL)).status in ("oom", "failed")
        with pytest.raises(ValueError, match="leads out"):
            await host.run_code("", files={"../x": ""})
        with pytest.raises(UserError, match="timeout_s"):
            await host.run_code("", timeout_s=1e5)


async def test_a_lifetime_ends_and_can_be_moved_but_not_beyond_what_may_be():
    async with serving(most_lifetime_s=60) as running, running.remote() as host:
        box, other = await host.create(limits=SMALL, timeout_s=60), await host.create(limits=SMALL, timeout_s=0.5)
        with pytest.raises(UserError, match="may live for"):
            await box.set_timeout(61)
        with pytest.raises(UserError, match="more than the 60"):
            await host.create(timeout_s=61)
        assert box.id in running.host.boxes
        await box.set_timeout(0.5)
        await until(lambda: not running.host.boxes)
        for one in (box, other):
            with pytest.raises(SandboxGoneError, match=r"its time of 0\.5 s is over"):
                await one.exec("true")
        assert await host.list() == []


async def test_many_are_made_listed_and_deleted_at_once(running: Running):
    async with running.remote() as host:
        made = await host.bulk_create(3, limits=SMALL, labels=["x", "y z&"])
        await host.create(limits=SMALL, labels=["x"])
        assert {box.id for box in await host.list(labels=["x", "y z&"])} == {box.id for box in made}
        assert len(await host.list()) == 4
        assert await host.bulk_delete(labels=["y z&"]) == 3
        assert len(await host.list()) == 1
        with pytest.raises(UserError, match="labels"):
            await host.bulk_delete(labels=[])


async def test_the_sdk_takes_an_address_for_a_backend(running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PALESTRA_SANDBOX_TOKEN", ALICE)
    try:
        assert (await run_code("print(2)", backend=running.url)).stdout == "2\n"
        async with Sandbox.create(backend=running.url, memory_mb=64, disk_mb=16) as box:
            assert (await box.exec("echo 3")).stdout == "3\n"
            assert box.id in running.host.boxes
    finally:
        await close_hosts()


# --- what is refused before anything is asked


async def test_a_token_is_needed_and_it_is_told_where_from(running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PALESTRA_SANDBOX_TOKEN", raising=False)
    with pytest.raises(UserError, match="PALESTRA_SANDBOX_TOKEN"):
        RemoteHost(running.url)
    with pytest.raises(UserError, match="no tenant has this token"):
        await running.remote("wrong").open()


async def test_a_service_that_isolates_too_little_is_refused(running: Running):
    options = Options(min_isolation=Isolation.KERNEL)
    with pytest.raises(IsolationError, match="less than min_isolation=kernel"):
        await RemoteHost(running.url, ALICE, options=options).open()
    with pytest.raises(UserError, match="packages is chosen where the service is started"):
        RemoteHost(running.url, ALICE, options=Options(packages=("numpy",)))


# --- what goes wrong


async def test_a_client_that_vanishes_leaves_nothing_after_the_lifetime(running: Running):
    host = await running.remote().open()
    box = await host.create(limits=SMALL, timeout_s=60)
    entry = running.host.boxes[box.id]
    mid = [
        asyncio.create_task(box.exec(f"touch {name}; sleep 60", timeout_s=60, on_output=on))
        for name, on in (("quiet", None), ("heard", lambda *_: None))
    ]
    await until_there(box, "quiet", "heard")
    for task in mid:
        task.cancel()
    await asyncio.gather(*mid, return_exceptions=True)
    await host.close()
    assert not entry.ended.done()  # it does not end with its client
    await entry.set_timeout(0.2)
    await asyncio.wait_for(asyncio.shield(entry.ended), WAIT_S)
    assert running.host.boxes == {}
    assert (await running.ask("GET", f"/v1/sandboxes/{box.id}"))[0] == 410
    assert await running.metric("palestra_sandbox_live") == 0


async def test_a_sandbox_that_ends_mid_program_is_told_in_a_stream_too(running: Running):
    async with running.remote() as host:
        for on_output in (None, lambda *_: None):
            box = await host.create(limits=SMALL)
            line = "echo 1; touch begun; sleep 120"
            task = asyncio.create_task(box.exec(line, timeout_s=120, on_output=on_output))
            await until_there(box, "begun")
            await box.delete()
            with pytest.raises(SandboxGoneError, match="it was deleted"):
                await asyncio.wait_for(task, WAIT_S)


async def test_a_service_that_is_not_there_is_an_error_of_the_machine():
    with pytest.raises(SandboxUnreachableError, match="cannot be reached"):
        await RemoteHost("http://127.0.0.1:9", "x").open()


async def test_a_creation_whose_answer_is_lost_is_made_once(running: Running):
    """Behind a proxy that ends the first connection on which the service says that it made one."""
    lost, port = 0, int(running.url.rpartition(":")[2])

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal lost
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        while data := await reader.read(65_536):
            far_writer.write(data)
            answer = await far_reader.read(65_536)
            if b"201 Created" in answer and lost == 0:
                lost += 1
                break
            writer.write(answer)
        for one in (writer, far_writer):
            one.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    async with server, RemoteHost(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", ALICE) as host:
        box = await host.create(limits=SMALL)
        assert lost == 1
        assert list(running.host.boxes) == [box.id]


# --- processes of their own


async def test_what_is_killed_leaves_nobody_and_loses_no_account(tmp_path: Path):
    words = ["--data", str(tmp_path / "data"), "--tokens", str(tokens_file(tmp_path, "alice"))]
    async with process(*words) as service, RemoteHost(service.url, ALICE) as host:
        boxes = await host.bulk_create(3, limits=SMALL)
        await boxes[0].background("sleep 600 & sleep 600")
        for _ in range(5):
            await host.run_code("print(1)")
        asked = time.monotonic()
        used = await host.usage()
        assert used["programs"] == {"ok": 5, "opened": 1}
        family = await _settled_family(service)
        service.process.kill()
        service.process.wait(WAIT_S)
        more_s = 3 * (time.monotonic() - asked)  # of sandboxes, if a beat came in between
        await until_ended(family)
        with pytest.raises(SandboxUnreachableError):
            await host.usage()
    async with process(*words) as again, RemoteHost(again.url, ALICE) as host:
        later = await host.usage()
        assert later["programs"] == used["programs"]
        assert later["sandboxes"] == used["sandboxes"] == 8
        assert used["sandbox_s"] - 1e-3 <= later["sandbox_s"] <= used["sandbox_s"] + more_s + 1e-3
        assert await host.list() == []


async def _settled_family(service: Process) -> list[psutil.Process]:
    """The zygote, agents, programs; also interpreters that wait. Not what only begins or ends others."""
    family: list[psutil.Process] = []

    def is_settled() -> bool:
        nonlocal family
        before, family = family, service.family()
        return len(family) >= 1 + 3 + 2 and alive(family) == family == before

    await until(is_settled)
    return family


async def test_who_is_told_to_end_lets_programs_end_and_begins_none():
    async with process("--drain-s", "60") as service, RemoteHost(service.url, service.token) as host:
        box, heard = await host.create(limits=SMALL), (Heard(), Heard())
        code = "import time; print('begun', flush=True); time.sleep(3); print(7)"
        running = [
            asyncio.create_task(host.run_code(code, timeout_s=60, on_output=heard[0])),
            asyncio.create_task(box.exec(f"echo begun; {AWAITS_GO}; echo 8", timeout_s=60, on_output=heard[1])),
        ]
        for one in heard:
            await one.first()
        family = service.family()
        service.process.send_signal(signal.SIGTERM)
        await _until_not_ready(service)
        for begin in (host.create(limits=SMALL), host.run_code("print(1)"), box.exec("true"), box.background("true")):
            with pytest.raises(SandboxUnreachableError, match="about to end"):
                await begin
        await box.write("go", "")  # the service waits for the program that waits for it
        assert [end.stdout for end in await asyncio.gather(*running)] == ["begun\n7\n", "begun\n8\n"]
        assert await asyncio.to_thread(service.process.wait, WAIT_S) == 0
        await until_ended(family)


async def _until_not_ready(service: Process) -> None:
    async with aiohttp.ClientSession() as session:

        async def is_refused() -> bool:
            async with session.get(service.url + "/ready") as answer:
                return answer.status == 503

        await until(is_refused)


async def test_programs_that_do_not_end_in_time_end_with_the_service():
    async with process("--drain-s", "0.5") as service, RemoteHost(service.url, service.token) as host:
        box = await host.create(limits=SMALL)
        running = asyncio.create_task(box.exec("touch begun; sleep 60", timeout_s=60))
        await until_there(box, "begun")
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(SandboxGoneError, match="its host was closed"):
            await running
        assert await asyncio.to_thread(service.process.wait, WAIT_S) == 0
        assert time.monotonic() - began < 25  # the program takes 60, and without the option it had 30
