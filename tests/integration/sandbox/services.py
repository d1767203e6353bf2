"""Services of sandboxes for tests: in this process, or one of their own that can be killed."""

import asyncio
import hashlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web

from palestra.sandbox import Sandbox
from palestra.sandbox.client import RemoteHost
from palestra.sandbox.host import Host
from palestra.sandbox.service import Service, Settings
from palestra.sandbox.tenants import Tenant, Tenants
from tests.integration.engines import python_module

WAIT_S = 60.0
ALICE, BOB = "token-of-alice", "token-of-bob"


def tenant(name: str, **limits: Any) -> Tenant:
    digest = hashlib.sha256(f"token-of-{name}".encode()).hexdigest()
    return Tenant(name=name, token_sha256=digest, **limits)


@dataclass
class Running:
    """A service in this process, and somebody who asks it without our client."""

    url: str
    service: Service
    host: Host
    session: aiohttp.ClientSession

    def remote(self, token: str = ALICE) -> RemoteHost:
        return RemoteHost(self.url, token)

    async def ask(
        self, method: str, path: str, *, token: str | None = ALICE, key: str | None = None, **more: Any
    ) -> tuple[int, Any]:
        """Status, and what the JSON says; the body itself, where it is none."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        headers |= {} if key is None else {"Idempotency-Key": key}
        async with self.session.request(method, self.url + path, headers=headers, **more) as answer:
            self.headers = answer.headers
            return answer.status, await (answer.json() if answer.content_type == "application/json" else answer.read())

    async def metric(self, name: str) -> float:
        text = (await self.ask("GET", "/metrics", token=None))[1].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@asynccontextmanager
async def serving(*tenants: Tenant, **settings: Any) -> AsyncIterator[Running]:
    """With the local backend; it ends with everything that it made."""
    settings = {"most_memory_mb": 10**6, "running": 4} | settings
    wished, host = Settings(**settings), Host(warm=2, running=settings["running"])
    await host.open()
    async with Service(wished, Tenants(tenants or (tenant("alice"), tenant("bob"))), host) as service:
        runner = web.AppRunner(service.app(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as session:
            yield Running(f"http://127.0.0.1:{runner.addresses[0][1]}", service, host, session)
        await host.close()
        await runner.cleanup()


@dataclass
class Process:
    """A service in a process of its own."""

    url: str
    token: str
    process: subprocess.Popen[bytes]

    def family(self) -> list[psutil.Process]:
        """Its zygote, and every process of its sandboxes: those that come from it."""
        return psutil.Process(self.process.pid).children(recursive=True)


@asynccontextmanager
async def process(*words: str) -> AsyncIterator[Process]:
    """`palestra serve sandbox`, which is killed at the end, if it still runs."""
    command = python_module("palestra.launch.cli", "serve", "sandbox", "--port", "0", *words)
    running = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert running.stderr is not None
    try:
        line = (await asyncio.to_thread(running.stderr.readline)).decode()
        assert " answers; sandboxes: local" in line, line
        token = ALICE if "--tokens" in words else (await asyncio.to_thread(running.stderr.readline)).decode()
        yield Process(line.split()[0], token.partition("=")[2].strip() or token, running)
    finally:
        if running.poll() is None:
            running.kill()
        running.wait(WAIT_S)
        running.stderr.close()


def tokens_file(directory: Path, *names: str) -> Path:
    path = directory / "tokens.toml"
    rows = [f'[tenants.{name}]\ntoken_sha256 = "{tenant(name).token_sha256}"\n' for name in names]
    path.write_text("".join(rows))
    return path


class Heard:
    """For `on_output`: the pieces of what a program said."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, bytes]] = []
        self._first = asyncio.Event()

    def __call__(self, name: str, piece: bytes) -> None:
        self.pieces.append((name, piece))
        self._first.set()

    async def first(self) -> None:
        await asyncio.wait_for(self._first.wait(), WAIT_S)


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    """Errors: TimeoutError."""
    async with asyncio.timeout(WAIT_S):
        while True:
            said = holds()
            if said if isinstance(said, bool) else await said:
                return
            await asyncio.sleep(0.05)


async def until_there(box: Sandbox, *names: str) -> None:
    """These files, which programs in the sandbox make when they begin."""

    async def are_there() -> bool:
        return set(names) <= {file.path for file in await box.list_files()}

    await until(are_there)


async def until_ended(family: list[psutil.Process]) -> None:
    await until(lambda: not alive(family))


def alive(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run; what is dead, and not yet waited for, does not."""
    return [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
