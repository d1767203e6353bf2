"""The service: a `Host` over HTTP, for tenants with tokens.

Consumes: requests. Produces: sandboxes, results, accounts, metrics. Waits for: the host, whose waits have deadlines,
and for turns of programs. Ends when: it is told to; then it refuses what is new, lets programs that run end within
`drain_s`, deletes every sandbox, and is done.

`POST /v1/sandboxes/ID/call` takes one frame of the agent's and answers one, which is how `RemoteHost` speaks; the
other paths are for people and other programs. See `routes`.
"""

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.sandbox import cgroups
from palestra.sandbox.accounts import Accounts, Usage
from palestra.sandbox.admission import Admission, Turns, memory_of
from palestra.sandbox.holdings import Holdings
from palestra.sandbox.host import Host, Options
from palestra.sandbox.metrics import Metrics
from palestra.sandbox.records import Limits, Result, SandboxUnreachableError
from palestra.sandbox.tenants import Tenant, Tenants, only

_BACKLOG = 1024
_LAST_WORD_S = 5.0
_LEFT_OVER_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`most`, `most_memory_mb`: of all tenants together; None: three quarters of this machine's.

    `running`: one-shot programs at once; None: two for each core. `most_waiting`: of each tenant, for `wait_s` at most.
    """

    host: str = "127.0.0.1"
    port: int = 8002
    tokens: Path | None = None
    data: Path | None = None
    most: int = 2048
    most_memory_mb: int | None = None
    running: int | None = None
    starting: int | None = None
    most_waiting: int = 1024
    wait_s: float = 60.0
    most_lifetime_s: float = 24 * 3600.0
    most_program_s: float = 3600.0
    most_body_mb: int = 16
    drain_s: float = 30.0
    beat_s: float = 10.0


class Service:
    """The parts of one service. Use: `async with Service(...) as service`, and `service.app()`."""

    def __init__(self, settings: Settings, tenants: Tenants, host: Host):
        self.settings, self.tenants, self.host = settings, tenants, host
        self.metrics, self.accounts = Metrics(), Accounts(settings.data)
        most_memory_mb = settings.most_memory_mb or _memory_mb() * 3 // 4
        self._admission = Admission(most=settings.most, most_memory_mb=most_memory_mb)
        running = settings.running or 2 * (os.cpu_count() or 1)
        self.turns = Turns(self._admission, running=running, most_waiting=settings.most_waiting, wait_s=settings.wait_s)
        self.holdings = Holdings(
            host,
            self._admission,
            self.accounts,
            self.metrics,
            most_lifetime_s=settings.most_lifetime_s,
            on_room=self.turns.go_on,
        )
        self._is_draining = False
        self._num_running, self._idle = 0, asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> "Service":
        """Errors: UserError, for a place of accounts that cannot be used."""
        self.accounts.open()
        self._beating = asyncio.create_task(self._beat_always())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._beating.cancel()
        await self.host.close()
        self.accounts.close()

    def app(self) -> web.Application:
        from palestra.sandbox.routes import app

        return app(self)

    async def _beat_always(self) -> None:
        while True:
            await asyncio.sleep(self.settings.beat_s)
            try:
                self.holdings.beat()
            except InfrastructureError as error:
                print(f"not accounted for, tried again later: {error}", file=sys.stderr, flush=True)

    # --- programs

    def require_open(self) -> None:
        """Errors: SandboxUnreachableError."""
        if self._is_draining:
            raise SandboxUnreachableError("this service is about to end, and begins nothing new")

    def began(self) -> None:
        """A program, which `ended` follows."""
        self.require_open()
        self._num_running += 1
        self._idle.clear()

    def ended(self) -> None:
        self._num_running -= 1
        if not self._num_running:
            self._idle.set()

    def account_program(self, tenant: Tenant, end: Result) -> None:
        """In a sandbox, whose seconds are accounted for by themselves."""
        self.metrics.ended(end)
        self.accounts.add(tenant.name, Usage(programs={end.status: 1}))

    async def run(self, tenant: Tenant, limits: Limits, act: Callable[[], Awaitable[Result]]) -> Result:
        """A one-shot program, when its turn has come. Errors: RefusedError, SandboxError."""
        self.began()
        try:
            memory_mb = memory_of(limits)
            await self.turns.begin(tenant, memory_mb)
            try:
                end = await act()
            finally:
                self.turns.end(tenant, memory_mb)
            self.metrics.ended(end)
            used = Usage(
                sandboxes=1,
                sandbox_s=end.wall_s,
                memory_mb_s=end.wall_s * memory_mb,
                cpu_s=end.cpu_s,
                programs={end.status: 1},
            )
            self.accounts.add(tenant.name, used)
            return end
        finally:
            self.ended()

    async def drain(self, hurry: asyncio.Event) -> None:
        """Nothing new begins; until what runs has ended, or its time is over, or `hurry`."""
        self._is_draining = True
        self.turns.refuse_all(SandboxUnreachableError("this service is about to end; the program did not begin"))
        waits = [asyncio.ensure_future(self._idle.wait()), asyncio.ensure_future(hurry.wait())]
        try:
            first = asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            await within(self.settings.drain_s, first, waiting_for="programs to end")
        except DeadlineError:
            print(f"{self._num_running} programs did not end in time", file=sys.stderr, flush=True)
        finally:
            for wait in waits:
                wait.cancel()

    @property
    def is_draining(self) -> bool:
        return self._is_draining


def serve(settings: Settings, options: Options) -> None:
    """Until it is told to end. Errors: UserError, IsolationError, SandboxStartError."""
    asyncio.run(_serve(settings, options))


async def _serve(settings: Settings, options: Options) -> None:
    told_to_end, hurry, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if told_to_end.is_set() else told_to_end).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    tenants, token = (
        (Tenants.read(settings.tokens), "")
        if settings.tokens
        else only(most_sandboxes=settings.most, most_memory_mb=settings.most_memory_mb or _memory_mb())
    )
    num_swept = sweep()
    running = settings.running or 2 * (os.cpu_count() or 1)
    host = Host(options, most=settings.most, starting=settings.starting, running=running)
    with _listening(settings) as listening:
        await host.open()
        async with Service(settings, tenants, host) as service:
            runner = web.AppRunner(service.app(), access_log=None, shutdown_timeout=_LAST_WORD_S)
            await runner.setup()
            try:
                await web.SockSite(runner, listening, backlog=_BACKLOG).start()
                _say(settings, service, listening.getsockname()[1], token, num_swept)
                await told_to_end.wait()
                await service.drain(hurry)
            finally:
                await host.close()
                await runner.cleanup()


def _listening(settings: Settings) -> socket.socket:
    """Errors: UserError."""
    try:
        return socket.create_server((settings.host, settings.port), backlog=_BACKLOG)
    except OSError as error:
        raise UserError(
            f"--host={settings.host} --port={settings.port} cannot be listened on: {error.strerror}; give others, or "
            "--port 0 for a free one"
        ) from error


def _say(settings: Settings, service: Service, port: int, token: str, num_swept: int) -> None:
    backend = service.host.backend
    lines = [
        f"http://{settings.host}:{port} answers; sandboxes: {backend.name}, {backend.isolation.name.lower()} "
        f"({', '.join(backend.layers)})"
    ]
    if token:
        lines.append(f"PALESTRA_SANDBOX_TOKEN={token}")
    if num_swept:
        lines.append(f"swept up {num_swept} things that a service before left behind")
    if settings.host not in ("127.0.0.1", "::1", "localhost"):
        lines.append(f"{settings.host} is not this machine alone, and tokens are sent in clear text: put TLS before it")
    print("\n".join(lines), file=sys.stderr, flush=True)


def sweep() -> int:
    """What services that are gone left on this machine; how many things. Their processes ended with them."""
    count = cgroups.sweep()
    for place in Path(tempfile.gettempdir()).glob("palestra-root-*"):
        try:
            if time.time() - place.stat().st_mtime > _LEFT_OVER_S:  # younger: one that is just being opened
                place.rmdir()
                count += 1
        except OSError:
            pass  # another user's, or not empty: no leftover of ours
    return count


def _memory_mb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
