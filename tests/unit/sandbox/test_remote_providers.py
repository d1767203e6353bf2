"""The backends of providers against stand-ins of their libraries, whose calls have the signatures of prime-sandboxes
0.5.1, e2b 2.63.0, modal 1.6.4 and daytona 0.226.1, as their sources have them: none was seen at a provider.

A stand-in's sandbox is a directory of this machine, in which the commands that a provider would run are run.
"""

import asyncio
import dataclasses
import os
import signal
import sys
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from palestra.core.errors import UserError
from palestra.sandbox import Host, Isolation, Limits, SandboxGoneError, SandboxStartError, UnsupportedError, agent
from palestra.sandbox.backends import choose, providers, remote
from palestra.sandbox.host import Options

pytestmark = pytest.mark.slow

LIMITS = Limits(memory_mb=1000, disk_mb=1500, cpus=1.5)
NAMES = ["prime", "e2b", "modal", "daytona"]
WITH_ONE = pytest.mark.parametrize("far", ["modal"], indirect=True)
"""Of what is the same for all of them."""


class Far:
    """What a provider has: `made` is how a sandbox was asked for, `commands` the lines that were run."""

    def __init__(self, name: str, directory: Path):
        self.name, self.is_broken = name, False
        self.directory, self.made, self.commands, self.deleted = directory, dict[str, Any](), list[str](), list[str]()
        self.calls = list[str]()
        self.forged: str | None = None
        self.has_begun, self.has_ended = asyncio.Event(), asyncio.Event()

    async def run(self, line: str) -> tuple[int, str, str]:
        if self.is_broken:
            raise RuntimeError("502 Bad Gateway")
        self.commands.append(line)
        if self.forged is not None:
            return 0, self.forged, ""
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        shell = await asyncio.create_subprocess_shell(
            line, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self.has_begun.set()
        try:
            out, err = await shell.communicate()
        finally:
            if shell.returncode is None:
                os.killpg(shell.pid, signal.SIGKILL)
                await shell.communicate()
            self.has_ended.set()
        return shell.returncode or 0, out.decode(), err.decode()

    def write(self, path: str, content: bytes) -> None:
        self.calls.append(f"write {Path(path).name}")
        assert isinstance(content, bytes)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    def read(self, path: str) -> bytes:
        self.calls.append(f"read {Path(path).name}")
        return Path(path).read_bytes()

    def create(self, **asked: Any) -> None:
        self.made = asked

    def delete(self, id: str) -> None:
        self.deleted.append(id)


def _prime(far: Far) -> types.ModuleType:
    class CreateSandboxRequest:
        def __init__(  # a pydantic model there: more than these fields, none of them ours
            self,
            *,
            name: str,
            docker_image: str | None = None,
            cpu_cores: float = 1.0,
            memory_gb: float = 1.0,
            disk_size_gb: float | None = None,
            network_allowlist: list[str] | None = None,
            network_denylist: list[str] | None = None,
            timeout_minutes: int = 60,
            labels: list[str] | None = None,
        ):
            self.asked = {name: value for name, value in locals().items() if name != "self"}

    class AsyncSandboxClient:
        def __init__(self, api_key: str | None = None, max_connections: int = 1000):
            far.calls.append("client")

        async def create(self, request: CreateSandboxRequest) -> Any:
            far.create(**request.asked)
            return types.SimpleNamespace(id="p1")

        async def wait_for_creation(self, sandbox_id: str, max_attempts: int = 60, stability_checks: int = 1) -> None:
            far.calls.append("wait")

        async def execute_command(
            self,
            sandbox_id: str,
            command: str,
            working_dir: str | None = None,
            env: dict[str, str] | None = None,
            timeout: int | None = None,
            user: str | None = None,
        ) -> Any:
            assert isinstance(timeout, int)
            code, out, err = await far.run(command)
            return types.SimpleNamespace(stdout=out, stderr=err, exit_code=code)

        async def upload_bytes(
            self, sandbox_id: str, file_path: str, file_bytes: bytes, filename: str, timeout: int | None = None
        ) -> Any:
            far.write(file_path, file_bytes)

        async def download_file(
            self, sandbox_id: str, file_path: str, local_file_path: str, timeout: int | None = None
        ) -> None:
            Path(local_file_path).write_bytes(far.read(file_path))

        async def delete(self, sandbox_id: str) -> dict[str, Any]:
            far.delete(sandbox_id)
            return {}

        async def aclose(self) -> None:
            far.calls.append("closed")

    module = types.ModuleType("prime_sandboxes")
    vars(module).update(AsyncSandboxClient=AsyncSandboxClient, CreateSandboxRequest=CreateSandboxRequest)
    return module


def _e2b(far: Far) -> types.ModuleType:
    class CommandExitException(Exception):
        def __init__(self, stderr: str, stdout: str, exit_code: int, error: str | None):
            self.stderr, self.stdout, self.exit_code, self.error = stderr, stdout, exit_code, error

    class Commands:
        async def run(
            self,
            cmd: str,
            background: bool | None = None,
            envs: dict[str, str] | None = None,
            user: str | None = None,
            cwd: str | None = None,
            on_stdout: Any = None,
            on_stderr: Any = None,
            stdin: bool | None = None,
            timeout: float | None = 60,
            request_timeout: float | None = None,
        ) -> Any:
            code, out, err = await far.run(cmd)
            if code != 0:
                raise CommandExitException(err, out, code, None)
            return types.SimpleNamespace(stdout=out, stderr=err, exit_code=0)

    class Files:
        async def write(
            self,
            path: str,
            data: bytes,
            user: str | None = None,
            request_timeout: float | None = None,
            gzip: bool = False,
        ) -> Any:
            far.write(path, data)

        async def read(
            self,
            path: str,
            format: str = "text",
            user: str | None = None,
            request_timeout: float | None = None,
            gzip: bool = False,
        ) -> bytearray:
            assert format == "bytes"
            return bytearray(far.read(path))

    class AsyncSandbox:
        commands, files = Commands(), Files()

        @classmethod
        async def create(
            cls,
            template: str | None = None,
            timeout: int | None = None,
            metadata: dict[str, str] | None = None,
            envs: dict[str, str] | None = None,
            secure: bool | None = None,
            allow_internet_access: bool | None = None,
        ) -> "AsyncSandbox":
            far.create(template=template, timeout=timeout, allow_internet_access=allow_internet_access)
            return cls()

        async def kill(self) -> bool:
            far.delete("e1")
            return True

    module = types.ModuleType("e2b")
    vars(module).update(AsyncSandbox=AsyncSandbox, CommandExitException=CommandExitException)
    return module


def _aio(function: Any) -> Any:
    """Its library's functions block, and have their coroutines beside them."""
    return types.SimpleNamespace(aio=function)


def _modal(far: Far) -> types.ModuleType:
    async def lookup(name: str, *, client: Any = None, environment_name: Any = None, create_if_missing: bool = False):
        assert create_if_missing
        return f"app {name}"

    async def create(
        *args: str,
        app: Any = None,
        image: Any = None,
        timeout: int | None = 300,
        idle_timeout: int | None = None,
        cpu: float | tuple[float, float] | None = None,
        memory: int | tuple[int, int] | None = None,
        block_network: bool = False,
    ) -> Any:
        far.create(args=args, app=app, image=image, timeout=timeout, cpu=cpu, memory=memory, is_blocked=block_network)
        files = types.SimpleNamespace(write_bytes=_aio(write_bytes), read_bytes=_aio(read_bytes))
        return types.SimpleNamespace(exec=_aio(execute), filesystem=files, terminate=_aio(terminate))

    async def execute(
        *args: str, timeout: int | None = None, workdir: str | None = None, env: Any = None, text: bool = True
    ) -> Any:
        assert args[:2] == ("/bin/sh", "-c")
        assert text
        assert isinstance(timeout, int)
        code, out, _ = await far.run(args[2])

        async def read() -> str:
            return out

        async def wait() -> int:
            return code

        return types.SimpleNamespace(stdout=types.SimpleNamespace(read=_aio(read)), wait=_aio(wait))

    async def write_bytes(data: bytes, remote_path: str) -> None:
        far.write(remote_path, data)

    async def read_bytes(remote_path: str) -> bytes:
        return far.read(remote_path)

    async def terminate(*, wait: bool = False) -> None:
        far.delete("m1")

    module = types.ModuleType("modal")
    image = types.SimpleNamespace(from_registry=lambda tag, secret=None: f"image {tag}")
    app, sandbox = types.SimpleNamespace(lookup=_aio(lookup)), types.SimpleNamespace(create=_aio(create))
    vars(module).update(Image=image, App=app, Sandbox=sandbox)
    return module


def _daytona(far: Far) -> types.ModuleType:
    @dataclasses.dataclass
    class Resources:
        cpu: int | None = None
        memory: int | None = None
        disk: int | None = None
        gpu: int | None = None

    class CreateSandboxFromImageParams:
        def __init__(  # a pydantic model there
            self,
            *,
            image: str,
            resources: Resources | None = None,
            labels: dict[str, str] | None = None,
            ephemeral: bool | None = None,
            ttl_minutes: int | None = None,
            network_block_all: bool | None = None,
        ):
            self.asked = {name: value for name, value in locals().items() if name != "self"}

    class Process:
        async def exec(
            self, command: str, cwd: str | None = None, env: dict[str, str] | None = None, timeout: int | None = None
        ) -> Any:
            assert isinstance(timeout, int)
            code, out, err = await far.run(command)
            return types.SimpleNamespace(exit_code=code, result=err + out)

    class Files:
        async def upload_file(self, src: bytes, dst: str, timeout: int = 1800) -> None:
            far.write(dst, src)

        async def download_file(self, *args: Any) -> bytes:
            assert len(args) == 1 or isinstance(args[1], int)
            return far.read(args[0])

    class Sandbox:
        process, fs = Process(), Files()

        async def delete(self, timeout: float | None = 60, wait: bool = False) -> None:
            far.delete("d1")

    class AsyncDaytona:
        async def create(self, params: Any = None, *, timeout: float = 60) -> Sandbox:
            far.create(**params.asked)
            return Sandbox()

        async def close(self) -> None:
            far.calls.append("closed")

    module = types.ModuleType("daytona")
    vars(module).update(
        AsyncDaytona=AsyncDaytona, CreateSandboxFromImageParams=CreateSandboxFromImageParams, Resources=Resources
    )
    return module


_MAKERS = {"prime": _prime, "e2b": _e2b, "modal": _modal, "daytona": _daytona}
_PACKAGES = {"prime": "prime-sandboxes", "e2b": "e2b", "modal": "modal", "daytona": "daytona"}


@pytest.fixture(params=NAMES)
def far(request, tmp_path: Path, monkeypatch) -> Far:
    """Where a provider's sandbox has /tmp/palestra, this has a directory of its own."""
    made = Far(request.param, tmp_path)
    module = _MAKERS[request.param](made)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(remote, "DIRECTORY", str(tmp_path / "far"))
    monkeypatch.setattr(remote, "HOME", str(tmp_path / "far" / "home"))
    monkeypatch.setattr(remote.Remote, "home", str(tmp_path / "far" / "home"))
    return made


@pytest.fixture
async def host(far: Far) -> AsyncIterator[Host]:
    async with Host(Options(backend=far.name, min_isolation=Isolation.NAMESPACES, image=None)) as host:
        yield host


async def test_programs_and_files_are_as_in_every_sandbox(far: Far, host: Host) -> None:
    async with await host.create(limits=LIMITS) as box:
        streamed = list[tuple[str, bytes]]()
        end = await box.exec(
            "cat; echo wrong >&2; exit 3", stdin="ünd\n", on_output=lambda name, piece: streamed.append((name, piece))
        )
        assert (end.exit_code, end.stdout, end.stderr) == (3, "ünd\n", "wrong\n")
        assert streamed == [("stdout", "ünd\n".encode()), ("stderr", b"wrong\n")]
        assert (await box.exec(["sh", "-c", "kill -9 $$"])).signal == 9
        assert (await box.exec(["there-is-none"])).exit_code == 127
        assert (await box.exec("sleep 60", timeout_s=0.2)).timed_out
        await box.write("a/b", b"\x00\xff", mode=0o600)
        assert await box.read("a/b") == b"\x00\xff"
        assert [(file.path, file.kind) for file in await box.list_files(recursive=True)] == [
            ("a", "directory"),
            ("a/b", "file"),
        ]
        await box.remove("a")
        with pytest.raises(FileNotFoundError):
            await box.read("a/b")


async def test_what_is_long_goes_by_files(far: Far, host: Host) -> None:
    content = bytes(range(256)) * 1000
    async with await host.create() as box:
        before = len(far.calls)
        await box.write("short", b"1")
        assert far.calls[before:] == []  # the control: one command alone
        await box.write("long", content)
        assert await box.read("long") == content
        assert far.calls[before:] == ["write request-0", "read answer-0"]
        assert max(map(len, far.commands)) < 100_000  # one word of a command is at most 128 KiB
        assert not (far.directory / "far" / "request-0").exists()


@WITH_ONE
async def test_requests_at_once_do_not_mix(far: Far, host: Host) -> None:
    async with await host.create() as box:
        contents = [bytes([number]) * 60_000 for number in range(3)]
        await asyncio.gather(*(box.write(str(number), content) for number, content in enumerate(contents)))
        assert await asyncio.gather(*(box.read(str(number)) for number in range(3))) == contents


@WITH_ONE
async def test_a_program_of_code_runs_once(far: Far, host: Host) -> None:
    end = await host.run_code("print(input() + open('f').read())", stdin="a", files={"f": "b"})
    assert end.stdout == "ab\n"
    await host.close()
    assert len(far.deleted) == 1


@WITH_ONE
async def test_what_a_command_cannot_do_is_refused(far: Far, host: Host) -> None:
    async with await host.create() as box:
        for asking in (box.background("sleep 1"), box.expose_port(80), box.processes()):
            with pytest.raises(UnsupportedError, match="'local' has"):
                await asking
        assert (await box.exec("echo on")).stdout == "on\n"  # the control: it goes on
    with pytest.raises(UnsupportedError):
        await host.create(egress=["pypi.org"])


async def test_a_provider_that_fails_ends_the_sandbox(far: Far, host: Host) -> None:
    box = await host.create()
    assert (await box.exec("true")).exit_code == 0
    far.is_broken = True
    with pytest.raises(SandboxGoneError, match="502 Bad Gateway"):
        await box.exec("true")
    await asyncio.sleep(0)  # its host is told in the next turn of the loop
    assert host.boxes == {}
    await host.close()
    assert len(far.deleted) == 1


@WITH_ONE
@pytest.mark.parametrize("forged", ["", "no base 64!", "AAAA", "aGVsbG8gd29ybGQgdGhpcyBpcyBub25l"])
async def test_what_is_no_answer_ends_the_sandbox(forged: str, far: Far, host: Host) -> None:
    box = await host.create()
    far.forged = forged
    with pytest.raises(SandboxGoneError):
        await box.exec("true")
    await asyncio.sleep(0)  # its host is told in the next turn of the loop
    assert host.boxes == {}


@WITH_ONE
async def test_a_sandbox_that_ends_tells_who_waits(far: Far, host: Host) -> None:
    box = await host.create()
    far.has_begun.clear()
    far.has_ended.clear()
    waiting = asyncio.ensure_future(box.exec("sleep 3", timeout_s=60))
    await asyncio.wait_for(far.has_begun.wait(), 10)
    await box.delete()
    with pytest.raises(SandboxGoneError, match="it was deleted"):
        await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(far.has_ended.wait(), 10)


async def test_a_sandbox_that_cannot_start_is_deleted(far: Far, host: Host) -> None:
    far.is_broken = True
    with pytest.raises(SandboxStartError, match="502 Bad Gateway"):
        await host.create()
    await host.close()
    assert len(far.deleted) == 1


async def test_limits_are_asked_for_as_each_provider_counts(far: Far, host: Host) -> None:
    async with await host.create(limits=LIMITS):
        made = dict(far.made)
    if far.name == "prime":
        assert (made["cpu_cores"], made["memory_gb"], made["disk_size_gb"]) == (1.5, 2500 / 1024, 2)
        assert (made["docker_image"], made["timeout_minutes"]) == ("python:3.12-slim", 60)
        assert made["network_denylist"] == ["0.0.0.0/0"]
        assert made["name"].startswith("palestra-")
    elif far.name == "e2b":
        assert made == {"template": None, "timeout": 3600, "allow_internet_access": False}
    elif far.name == "modal":
        assert made["args"] == ("sleep", "3600")
        assert (made["app"], made["image"]) == ("app palestra", "image python:3.12-slim")
        assert (made["cpu"], made["memory"], made["timeout"], made["is_blocked"]) == (1.5, (2500, 2500), 3600, True)
    else:
        resources = made["resources"]
        assert (resources.cpu, resources.memory, resources.disk) == (2, 3, 2)
        assert (made["ttl_minutes"], made["ephemeral"], made["network_block_all"]) == (60, True, True)


@WITH_ONE
async def test_memory_is_watched_inside(far: Far, host: Host) -> None:
    grow = "x = bytearray(300_000_000)\nimport time\ntime.sleep(20)"
    async with await host.create(limits=Limits(memory_mb=64)) as box:
        assert (await box.exec(["python3", "-c", grow], timeout_s=20)).status == "oom"
    async with await host.create(limits=Limits(memory_mb=1024)) as box:
        assert (await box.exec(["python3", "-c", grow], timeout_s=1)).status == "timed_out"


# --- without a provider


@pytest.mark.parametrize("name", NAMES)
async def test_a_library_that_is_missing_is_named(name: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, {"prime": "prime_sandboxes"}.get(name, name), None)
    with pytest.raises(UserError, match=f"pip install {_PACKAGES[name]}"):
        await choose.open_backend(Options(backend=name))


@pytest.mark.parametrize("name", NAMES)
async def test_packages_are_those_of_the_image(name: str) -> None:
    with pytest.raises(UserError, match="has packages of its own"):
        await choose.open_backend(Options(backend=name, packages=("numpy",)))


@pytest.mark.parametrize("value", ["", "59", "1e3", "-60", "86401"])
def test_a_lifetime_that_is_none(value: str, monkeypatch) -> None:
    monkeypatch.setenv("PALESTRA_REMOTE_LIFETIME_S", "120")
    assert providers.lifetime_s() == 120
    monkeypatch.setenv("PALESTRA_REMOTE_LIFETIME_S", value)
    with pytest.raises(UserError, match="whole seconds from 60 to 86400"):
        providers.lifetime_s()


def test_providers_are_never_chosen_unless_by_name() -> None:
    assert set(NAMES) <= choose.ELSEWHERE <= choose._ONLY_BY_NAME
    assert set(providers.PROVIDERS) == set(NAMES)
    for name in NAMES:
        assert providers.PROVIDERS[name].isolation == choose.BACKENDS[name][0]


def test_what_is_sent_runs_where_nothing_is_installed() -> None:
    for module in (agent, remote.once):
        assert "palestra.sandbox" not in Path(str(module.__file__)).read_text().replace("palestra.sandbox`", "")
