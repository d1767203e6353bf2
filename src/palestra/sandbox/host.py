"""Sandboxes of one process: which backend, which are there, how long they live, and the pool of those that are warm.

Consumes: requests of this process. Produces: sandboxes, results. Waits for: agents to be ready, programs to end, each
with a deadline. Ends when: it is closed; with it, or with this process, all its sandboxes end.
"""

import asyncio
import collections
import difflib
import itertools
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self
from weakref import WeakKeyDictionary

from msgspec import Struct, structs

from palestra.core.clock import unix_now
from palestra.core.deadline import Unhurried, within
from palestra.core.errors import DeadlineError, UserError
from palestra.sandbox.backends.base import Backend, Started
from palestra.sandbox.backends.choose import open_backend
from palestra.sandbox.backends.interpreter import Interpreter
from palestra.sandbox.box import OnOutput, Sandbox, encoded, result
from palestra.sandbox.cgroups import Cgroup
from palestra.sandbox.egress import Egress
from palestra.sandbox.ports import Forwarding
from palestra.sandbox.records import (
    MOST_OUTPUT,
    Isolation,
    Limits,
    Port,
    Result,
    SandboxFullError,
    SandboxGoneError,
    SandboxStartError,
)

READY_S = 30.0
_CALL_S = 30.0
_LOG_LINES = 1000
_LONGEST_S = 24 * 3600.0
_MOST_POOLS = 8


class Options(Struct, frozen=True, kw_only=True):
    """Of a host. `backend`: a name, an address of a service (http://...), or None for the best that works here.

    `image`: see `images`. `packages`: installed here, and shown to programs. `preload`: modules that waiting
    interpreters have imported. `without`: walls taken away, for tests.
    """

    backend: str | None = None
    min_isolation: Isolation | None = None  # None: namespaces, or what a backend has that was named
    image: str | None = None
    packages: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


_DEFAULT, _LIMITS = Options(), Limits()


class Box:
    """A sandbox's entry at its host: the connection of `Sandbox`."""

    def __init__(self, id: str, started: Started, limits: Limits, backend: Backend, labels: Sequence[str]):
        self.id, self.home, self.labels = id, started.home or backend.home, tuple(labels)
        self.limits, self.created = limits, unix_now()
        self.cpu_s, self.reason, self._is_ended = 0.0, "its agent has ended", False
        self._started, self._backend = started, backend
        self._lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._timer: asyncio.TimerHandle | None = None
        self.expires = 0.0
        self._ports: dict[int, Forwarding] = {}
        self._egress: Egress | None = None
        started.link.closed.add_done_callback(lambda _: self._on_closed())

    @property
    def is_gone(self) -> bool:
        return self._started.link.closed.done()

    @property
    def ended(self) -> asyncio.Future[None]:
        return self._started.ended

    @property
    def group(self) -> Cgroup | None:
        """What counts it, where that is ours."""
        return self._started.group

    @property
    def total_cpu_s(self) -> float:
        """Of programs that were waited for; when it has ended, of all that ended before it, where the backend tells."""
        return self.cpu_s if self._started.cpu_s is None else self._started.cpu_s

    async def call(
        self, header: dict[str, Any], body: bytes = b"", *, on_stream: OnOutput | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """A program whose sandbox dies of its memory, or that starves the agent, is answered as a program is."""
        is_program, was_gone = header["do"] == "exec", self.is_gone
        limit = _patience(header, self._backend.grace_s)
        try:
            async with Unhurried(limit) as patience:
                answer, data, passed = await self._started.link.call(header, body, on_stream=on_stream)
        except TimeoutError:
            if not patience.expired:
                raise  # of the sandbox's own files
            self.end("its programs let its agent say nothing")
            if is_program:
                return self._noted(header, {"timed_out": True, "wall_s": limit}), b""
            raise SandboxGoneError(f"sandbox {self.id} did not answer within {limit:g} s, and was deleted") from None
        except SandboxGoneError as error:
            if is_program and not was_gone and self._started.has_killed():
                return self._noted(header, {"oom": True, "signal": 9}), b""
            if is_program and not was_gone and not self._is_ended and self._backend.ends_by_programs:
                return self._noted(header, {"signal": 9}), b""
            raise SandboxGoneError(f"sandbox {self.id}: {error}") from None
        if passed is not None:
            os.close(passed)  # of a request that only this process makes
        if is_program:
            answer["oom"] = bool(answer.get("oom")) or self._started.has_killed()
            self.cpu_s += float(answer.get("cpu_s", 0))
            self._noted(header, answer)
        return answer, data

    def _noted(self, header: Mapping[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        words = " ".join(header.get("argv", ()))[:200]
        end = result(answer, b"")
        told = end.status if end.exit_code is None else f"exit code {end.exit_code}"
        self._lines.append(f"{unix_now():.3f} {words}: {told} after {end.wall_s:.3f} s")
        return answer

    async def set_timeout(self, seconds: float) -> None:
        """Errors: UserError."""
        if not 0 < seconds <= _LONGEST_S:
            raise UserError(f"timeout_s={seconds:g} of a sandbox must be above 0 and at most {_LONGEST_S:g}")
        if self._timer is not None:
            self._timer.cancel()
        self.expires = unix_now() + seconds
        reason = f"its time of {seconds:g} s is over"
        self._timer = asyncio.get_running_loop().call_later(seconds, self.end, reason)

    async def expose(self, port: int) -> Port:
        """Errors: OSError, UnsupportedError."""
        if port not in self._ports:
            forwarding = await Forwarding.open(self._started.link, port, backend=self._backend.name)
            if self.is_gone or port in self._ports:
                forwarding.close()  # meanwhile it ended, or somebody else asked
            else:
                self._ports[port] = forwarding
        if self.is_gone:
            raise SandboxGoneError(f"sandbox {self.id} has ended")
        return self._ports[port].where

    async def allow(self, hosts: Sequence[str]) -> None:
        """Errors: UnsupportedError."""
        self._egress = await Egress.open(self._started.link, hosts, backend=self._backend.name)
        if self.is_gone:
            self._egress.close()

    async def logs(self) -> str:
        return "\n".join(self._lines)

    async def delete(self) -> None:
        self.end("it was deleted")

    def end(self, reason: str) -> None:
        """At once; what it held is given back when the kernel is done with it."""
        if not self.is_gone:
            self.reason, self._is_ended = reason, True
        self._lines.append(f"{unix_now():.3f} ended: {reason}")
        self._started.link.close(reason)
        self._started.kill()

    def _on_closed(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for forwarding in self._ports.values():
            forwarding.close()
        if self._egress is not None:
            self._egress.close()


class Host:
    """Use: `async with Host(Options(...)) as host`, or `await host.open()` and `await host.close()`.

    `most`: sandboxes at once. `starting`: of them, in the making. `running`: one-shot programs at once; others wait for
    their turn, in which their time does not begin. `warm`: interpreters that wait, for one-shot programs.
    """

    def __init__(
        self,
        options: Options = _DEFAULT,
        *,
        most: int = 2048,
        starting: int | None = None,
        running: int | None = None,
        warm: int | None = None,
    ):
        cores = os.cpu_count() or 1
        self.options, self.most = options, most
        self._starting = asyncio.Semaphore(starting or 2 * cores)
        self._running = asyncio.Semaphore(running or 2 * cores)
        self._warm = 2 * cores if warm is None else warm
        self._boxes: dict[str, Box] = {}
        self._by_key: dict[str, asyncio.Future[Box]] = {}
        self._names = itertools.count(1)
        self._num_making = 0
        self._pools: collections.OrderedDict[Limits, Pool] = collections.OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> Self:
        """Errors: UserError, for a backend or an image that there is not; IsolationError; SandboxStartError."""
        self.backend = await open_backend(self.options)
        return self

    @property
    def is_broken(self) -> bool:
        """No sandbox will ever start again; those that were there have ended."""
        return getattr(self.backend, "is_broken", False)

    @property
    def boxes(self) -> dict[str, Box]:
        """By id, those that are there."""
        return self._boxes

    async def create(
        self,
        *,
        limits: Limits = _LIMITS,
        timeout_s: float = 3600.0,
        labels: Sequence[str] = (),
        egress: Sequence[str] = (),
        key: str | None = None,
    ) -> Sandbox:
        """`timeout_s`: its lifetime. `key`: asked for again with the same, it is the same sandbox.
        `egress`: hosts that it may reach, by HTTP and HTTPS through a proxy.

        Errors: SandboxFullError, SandboxStartError, UserError.
        """
        if key is None:
            return Sandbox(await self._made(limits, timeout_s, labels, egress))
        if key in self._by_key and self._is_known(key):
            return Sandbox(await asyncio.shield(self._by_key[key]))
        self._forget_gone_keys()
        self._by_key[key] = asyncio.ensure_future(self._made(limits, timeout_s, labels, egress))
        try:
            return Sandbox(await asyncio.shield(self._by_key[key]))
        except BaseException:
            if key in self._by_key and self._by_key[key].done():
                self._by_key.pop(key)
            raise

    def _forget_gone_keys(self) -> None:
        for key in [key for key in self._by_key if not self._is_known(key)]:
            del self._by_key[key]

    def _is_known(self, key: str) -> bool:
        made = self._by_key[key]
        return not made.done() or (made.exception() is None and not made.result().is_gone)

    async def _made(self, limits: Limits, timeout_s: float, labels: Sequence[str], egress: Sequence[str]) -> Box:
        if len(self._boxes) + self._num_making >= self.most:
            raise SandboxFullError(f"there are {self.most} sandboxes already, as many as may be; delete some, or wait")
        id = f"{next(self._names)}-{secrets.token_hex(8)}"
        self._num_making += 1
        try:
            async with self._starting:
                started = await self._ready(limits)
        finally:
            self._num_making -= 1
        box = self._boxes[id] = Box(id, started, limits, self.backend, labels)
        started.link.closed.add_done_callback(lambda _: self._boxes.pop(id, None))
        try:
            await box.set_timeout(timeout_s)
            if egress:
                await box.allow(egress)
        except BaseException:
            await box.delete()
            raise
        return box

    async def _ready(self, limits: Limits) -> Started:
        started = await self.backend.start(limits)
        try:
            await within(READY_S, asyncio.shield(started.link.ready), waiting_for="a sandbox's agent to be ready")
        except (SandboxGoneError, DeadlineError) as error:
            started.kill()
            raise SandboxStartError(f"{self.backend.name}: {error}") from None
        except BaseException:
            started.kill()
            raise
        return started

    async def run_code(
        self,
        code: str | bytes,
        *,
        stdin: str | bytes = "",
        files: Mapping[str, str | bytes] | None = None,
        timeout_s: float = 10.0,
        limits: Limits = _LIMITS,
        max_output: int = MOST_OUTPUT,
        on_output: OnOutput | None = None,
    ) -> Result:
        """A Python program in a sandbox of its own, which ends with it. `timeout_s` counts the program alone.

        Errors: SandboxError: of the machine, not of the program. ValueError: of `files` and `stdin`, too large for it,
        or names that cannot be there together.
        """
        text, given = code if isinstance(code, bytes) else code.encode("utf-8", "surrogatepass"), encoded(stdin)
        contents = {_relative(path): encoded(content) for path, content in (files or {}).items()}
        pool = self._pool(limits)
        async with self._running:
            waiting = await pool.take()
            if waiting is None:
                return await self._run_by_agent(text, given, contents, timeout_s, limits, max_output, on_output)
            try:
                end = await waiting.run(
                    text, stdin=given, files=contents, timeout_s=timeout_s, most=max_output, on_output=on_output
                )
            finally:
                waiting.close()
                self.keep(asyncio.create_task(pool.refill()))
        return result(*end)

    def _pool(self, limits: Limits) -> "Pool":
        """The one that was not used for longest makes room for another: what waits holds memory."""
        pool = self._pools.get(limits)
        if pool is None:
            if len(self._pools) >= _MOST_POOLS:
                self._pools.popitem(last=False)[1].close()
            pool = self._pools[limits] = Pool(self, limits, self._warm)
        self._pools.move_to_end(limits)
        return pool

    async def _run_by_agent(self, text, given, contents, timeout_s, limits, max_output, on_output) -> Result:
        """Where no interpreter waits."""
        async with Sandbox(await self._made(limits, timeout_s + 2 * READY_S, (), ())) as box:
            try:
                for path, content in {**contents, "main.py": text}.items():
                    await box.write(path, content)
            except OSError as error:
                raise ValueError(f"the program's files have no room or no place: {error}") from error
            return await box.exec(
                ["python3", "main.py"], stdin=given, timeout_s=timeout_s, max_output=max_output, on_output=on_output
            )

    async def list(self, *, labels: Sequence[str] = ()) -> Sequence[Sandbox]:
        """Those that have all of `labels`."""
        return [Sandbox(box) for box in self._boxes.values() if set(labels) <= set(box.labels) and not box.is_gone]

    async def bulk_create(self, count: int, **options: Any) -> Sequence[Sandbox]:
        """All, or none and the error of the first that failed."""
        made = await asyncio.gather(*(self.create(**options) for _ in range(count)), return_exceptions=True)
        failed = [one for one in made if isinstance(one, BaseException)]
        boxes = [one for one in made if isinstance(one, Sandbox)]
        if failed:
            for box in boxes:
                await box.delete()
            raise failed[0]
        return boxes

    async def bulk_delete(self, *, labels: Sequence[str]) -> int:
        """Those that have all of `labels`; how many they were. Errors: UserError, for none at all."""
        if not labels:
            raise UserError("name the labels of the sandboxes to delete; to end all, close their host")
        doomed = await self.list(labels=labels)
        for box in doomed:
            await box.delete()
        return len(doomed)

    def keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        for pool in self._pools.values():
            pool.close()
        for box in tuple(self._boxes.values()):
            box.end("its host was closed")
        await self.backend.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Pool:
    """Interpreters that wait in sandboxes of the same limits; what is taken is replaced."""

    def __init__(self, host: Host, limits: Limits, size: int):
        self._host, self._limits, self._size = host, limits, size
        self._ready: collections.deque[Interpreter] = collections.deque()
        self._is_closed = False

    async def take(self) -> Interpreter | None:
        """None where the backend has none. Errors: SandboxStartError."""
        while self._ready:
            waiting = self._ready.popleft()
            if not waiting.ended.done():
                return waiting
            waiting.close()
        return await self._host.backend.interpreter(self._limits)

    async def refill(self) -> None:
        """When a program has ended: to make another would slow down one that runs."""
        while not self._is_closed and len(self._ready) < self._size:
            try:
                made = await self._host.backend.interpreter(self._limits)
            except SandboxStartError:
                return  # whoever needs one makes it, and hears the reason
            if made is None:
                return
            if self._is_closed:
                made.close()
                return
            self._ready.append(made)

    def close(self) -> None:
        self._is_closed = True
        for waiting in self._ready:
            waiting.close()
        self._ready.clear()


# --- without a host at hand

_Hosts = dict[Options, "asyncio.Future[Any]"]
_hosts: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[_Hosts, AsyncGenerator[None]]] = WeakKeyDictionary()


async def host_of(options: Options) -> Any:
    """The host of this event loop with these options, opened when first asked for, and again when its backend is
    broken; it ends with this process."""
    hosts = await _hosts_here()
    if options not in hosts:
        hosts[options] = asyncio.ensure_future(_opened(options))
    try:
        host = await asyncio.shield(hosts[options])
    except BaseException:
        if options in hosts and hosts[options].done():
            hosts.pop(options)
        raise
    if not getattr(host, "is_broken", False):
        return host
    if hosts.get(options) is not None and hosts[options].done() and hosts[options].result() is host:
        del hosts[options]  # by the first who sees it
        await host.close()
    return await host_of(options)


async def _opened(options: Options) -> Any:
    if options.backend is not None and options.backend.startswith(("http://", "https://")):
        from palestra.sandbox.client import RemoteHost

        return await RemoteHost(options.backend, options=options).open()
    return await Host(options).open()


async def _hosts_here() -> _Hosts:
    loop = asyncio.get_running_loop()
    if loop not in _hosts:
        hosts: _Hosts = {}
        until = _until_the_loop_ends(hosts)
        await anext(until)
        _hosts[loop] = hosts, until
    return _hosts[loop][0]


async def _until_the_loop_ends(hosts: _Hosts) -> AsyncGenerator[None]:
    """`asyncio.run` ends what is suspended in its loop, and this ends the hosts."""
    try:
        yield
    finally:
        opened = [host for host in hosts.values() if not host.done() or host.exception() is None]
        hosts.clear()
        for host in opened:
            await (await host).close()


async def close_hosts() -> None:
    """Of this event loop: all sandboxes that `create` and `run_code` made in it end. So they do with the loop."""
    here = _hosts.pop(asyncio.get_running_loop(), None)
    if here is not None:
        await here[1].aclose()


async def create(**options: Any) -> Sandbox:
    """Behind `Sandbox.create`."""
    mine, limits, rest = _parted(options)
    return await (await host_of(mine)).create(limits=limits, **rest)


async def bulk_create(count: int, **options: Any) -> Sequence[Sandbox]:
    """Behind `Sandbox.bulk_create`."""
    mine, limits, rest = _parted(options)
    return await (await host_of(mine)).bulk_create(count, limits=limits, **rest)


async def default_host(options: dict[str, Any]) -> Any:
    """Of these options. Errors: UserError, for options that are not a host's."""
    return await host_of(_parted(options)[0])


async def run_code(code: str | bytes, **options: Any) -> Result:
    """`Host.run_code` of this event loop's host: `run_code(code, stdin=..., files=..., timeout_s=4, memory_mb=256)`."""
    mine, limits, rest = _parted(options)
    return await (await host_of(mine)).run_code(code, limits=limits, **rest)


_REST = (
    *("limits", "timeout_s", "labels", "egress", "key"),  # of `Host.create`
    *("stdin", "files", "max_output", "on_output"),  # of `Host.run_code`
)


def _parted(options: dict[str, Any]) -> tuple[Options, Limits, dict[str, Any]]:
    """Errors: UserError, for options that there are not, and for values that none has."""
    known = [*Options.__struct_fields__, *Limits.__struct_fields__, *_REST]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise UserError(f"a sandbox has no option {name!r}{meant}")
    of_host = {name: options.pop(name) for name in Options.__struct_fields__ if name in options}
    for name in ("packages", "preload", "without"):
        if name in of_host:
            of_host[name] = tuple(of_host[name])
    of_box = {name: options.pop(name) for name in Limits.__struct_fields__ if name in options}
    if isinstance(least := of_host.get("min_isolation"), str):
        if least.upper() not in Isolation.__members__:
            known = ", ".join(level.name.lower() for level in Isolation)
            raise UserError(f"min_isolation={least!r} of a sandbox must be one of {known}")
        of_host["min_isolation"] = Isolation[least.upper()]
    limits = options.pop("limits", Limits())
    return Options(**of_host), structs.replace(limits, **of_box) if of_box else limits, options


def _patience(header: Mapping[str, Any], grace_s: float) -> float:
    """Seconds until an agent must have answered."""
    if header["do"] == "exec":
        return float(header.get("timeout_s") or 0) + grace_s
    return float(header.get("wait_s", 0)) + max(_CALL_S, grace_s)


def _relative(path: str) -> str:
    """Errors: ValueError, for a path that leads out of where programs start."""
    if path.startswith("/") or ".." in path.split("/") or not path:
        raise ValueError(f"{path!r} leads out of the directory of the program; give a path relative to it")
    return path
