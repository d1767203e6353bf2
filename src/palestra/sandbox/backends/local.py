"""The backend `local`: Linux namespaces, made by a zygote of our own. No binaries, and no root needed."""

import asyncio
import collections
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, UserError
from palestra.sandbox import kernel
from palestra.sandbox.backends.base import Started
from palestra.sandbox.backends.interpreter import Interpreter
from palestra.sandbox.backends.root import Root
from palestra.sandbox.cgroups import Cgroup, Cgroups, sweep
from palestra.sandbox.link import Link
from palestra.sandbox.records import Isolation, Limits, SandboxStartError
from palestra.sandbox.users import users
from palestra.sandbox.zygote import HOME

LAYERS = ("uid", "network", "read_only", "no_capabilities", "seccomp", "landlock", "cgroup", "watchdog")
SOURCE = str(Path(__file__).resolve().parents[3])
_OPEN_S, _CLOSE_S, _ROOM_S = 60.0, 10.0, 30.0
_MOST_MESSAGE = 65_536
_BOOT = "import os, sys; sys.path[:0] = [os.getcwd()]; from palestra.sandbox.zygote import main; main(int(sys.argv[1]))"


class Local:
    """`without` takes walls away, by their names in `LAYERS`: for tests that prove that each is needed."""

    name, isolation, home, ends_by_programs = "local", Isolation.NAMESPACES, HOME, False
    grace_s = 5.0

    def __init__(self, root: Root, *, preload: Sequence[str] = (), without: Sequence[str] = ()):
        self._root, self._preload, self._without = root, tuple(preload), frozenset(without)
        self._numbers, self._started = itertools.count(1), dict[int, Started | Interpreter]()
        self._groups_of: dict[int, Cgroup] = {}
        self._doomed = collections.deque[int]()
        self._waiting: list[asyncio.Future[None]] = []  # until the zygote takes more
        self._is_root = os.geteuid() == 0
        self._user_of: dict[int, int] = {}
        self.layers: tuple[str, ...] = ()

    async def open(self) -> None:
        """Errors: SandboxStartError, where the kernel does not let us; UserError, for `preload` in vain."""
        if self._root.has_own_python and self._preload:
            raise UserError(
                f"preload={list(self._preload)}: programs are run by the image's python3, which starts anew"
            )
        sweep()
        self._cgroups = Cgroups() if "cgroup" not in self._without else None
        self._directory = tempfile.mkdtemp(prefix="palestra-root-")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        argv = [base_python(), "-I", "-S", "-c", _BOOT, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                argv,
                env={},
                cwd=SOURCE,  # which no argument tells: programs can read those
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._socket, self._loop = ours, asyncio.get_running_loop()
        ours.send(json.dumps(self._plan()).encode())
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(ours.fileno(), self._on_message)
        try:
            await within(_OPEN_S, self._opened, waiting_for="the zygote of the sandboxes to be ready")
        except BaseException:
            await self.close()
            raise
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)  # a mount of the zygote's is on it there, not here
        version = self._cgroups.version if self._cgroups else 0
        missing = set(self._without) | (set() if self._is_root else {"uid"})
        missing |= set() if kernel.landlock_version() else {"landlock"}
        counting = (f"cgroup_v{version}",) if version else () if "watchdog" in missing else ("watchdog",)
        walls = [layer for layer in LAYERS if layer not in (*missing, "cgroup", "watchdog")]
        self.layers = ("namespaces", *walls, *counting)

    @property
    def is_broken(self) -> bool:
        return self._socket.fileno() < 0 or self._process.poll() is not None

    def _plan(self) -> dict:
        root = self._root
        return {
            "directory": self._directory,
            "is_root": self._is_root,
            "binds": root.binds,
            "links": root.links,
            "hidden": root.hidden,
            "etc": root.etc,
            "environment": root.environment,
            "path": root.path,
            "has_own_python": root.has_own_python,
            "preload": self._preload,
            "read_only": "read_only" not in self._without,
            "own_network": "network" not in self._without,
            "seccomp": "seccomp" not in self._without,
            "no_capabilities": "no_capabilities" not in self._without,
            "landlock": "landlock" not in self._without and "read_only" not in self._without,
        }

    async def start(self, limits: Limits) -> Started:
        ours, theirs = socket.socketpair()
        with theirs:
            number, group = self._admitted(limits, ours)
            has_killed = group.has_killed if group is not None else lambda: False
            started = Started(Link(ours), kill=lambda: self._kill(number), has_killed=has_killed, group=group)
            self._started[number] = started
            await self._ask(number, limits, group, [theirs.fileno()], program=False)
        return started

    async def interpreter(self, limits: Limits) -> Interpreter | None:
        if self._root.has_own_python:
            return None  # ours has its memory from here, and would find its files of there
        ours, theirs = socket.socketpair()
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
        try:
            with theirs:
                number, group = self._admitted(limits, ours)
                (out, out_there), (err, err_there) = pipes
                os.set_blocking(out, False)
                os.set_blocking(err, False)
                made = Interpreter(ours, out, err, kill=lambda: self._kill(number))
                self._started[number] = made
                await self._ask(number, limits, group, [theirs.fileno(), out_there, err_there], program=True)
        except BaseException:
            ours.close()
            for fd, _ in pipes:
                os.close(fd)
            raise
        finally:
            for _, fd in pipes:
                os.close(fd)
        return made

    def _admitted(self, limits: Limits, ours: socket.socket) -> tuple[int, Cgroup | None]:
        """Its number, and what counts it. Errors: SandboxStartError, and `ours` is closed."""
        try:
            if self._process.poll() is not None:
                raise SandboxStartError(f"the zygote of the sandboxes has ended with {self._process.returncode}")
            user = users().take()
        except SandboxStartError:
            ours.close()
            raise
        try:
            group = self._cgroups.take(limits) if self._cgroups else None
        except OSError as error:
            ours.close()
            users().give_back(user)
            raise SandboxStartError(f"no cgroup for a sandbox: {error}") from error
        number = next(self._numbers)
        if group is not None:
            self._groups_of[number] = group
        self._user_of[number] = user
        return number, group

    async def _ask(self, number: int, limits: Limits, group: Cgroup | None, fds: list[int], *, program: bool) -> None:
        """Of the zygote, when it takes more. Errors: SandboxStartError."""
        watched = limits.held_bytes
        wish = {
            "start": number,
            "program": program,
            "uid": 0 if "uid" in self._without else self._user_of.get(number, 0),
            "disk_bytes": limits.disk_bytes,
            "inodes": limits.inodes,
            "processes": limits.processes,
            "watched_bytes": 0 if group or "watchdog" in self._without else watched,
        }
        data, passed = json.dumps(wish).encode(), [*fds, *(group.fds if group else [])]
        try:
            while not self._sent(data, passed):
                await within(_ROOM_S, self._room(), waiting_for="the zygote of the sandboxes to take a request")
        except (OSError, DeadlineError) as error:
            self._on_ended(number, "the zygote does not answer")
            raise SandboxStartError(f"the zygote of the sandboxes does not take more: {error}") from error
        except BaseException:
            self._on_ended(number, "nobody waits for it")
            raise

    def _sent(self, data: bytes, fds: list[int]) -> bool:
        """Errors: OSError, if nobody is there."""
        try:
            socket.send_fds(self._socket, [data], fds)
        except BlockingIOError:
            return False
        return True

    async def _room(self) -> None:
        room: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(room)
        self._loop.add_writer(self._socket.fileno(), self._on_writable)
        await room

    def _kill(self, number: int) -> None:
        if number not in self._started:
            return
        self._doomed.append(number)
        self._tell_doomed()

    def _tell_doomed(self) -> None:
        """The zygote, now or when it takes more: a program that waits for nothing ends in no other way."""
        try:
            while self._doomed:
                self._socket.send(json.dumps({"kill": self._doomed[0]}).encode())
                self._doomed.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket.fileno(), self._on_writable)
        except OSError:
            self._doomed.clear()  # the zygote is gone, and all its sandboxes with it

    def _on_writable(self) -> None:
        """What is to end goes first: it makes room."""
        self._loop.remove_writer(self._socket.fileno())
        self._tell_doomed()
        if not self._doomed:
            self._let_wait_no_more()

    def _let_wait_no_more(self) -> None:
        for room in self._waiting:
            if not room.done():
                room.set_result(None)
        self._waiting.clear()

    def _on_message(self) -> None:
        """All that is there: a burst of ends costs one turn of the loop."""
        while True:
            try:
                data = self._socket.recv(_MOST_MESSAGE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self._on_gone()
                return
            message = json.loads(data)
            if "ended" in message:
                self._on_ended(message["ended"], "it has ended", message if "status" in message else None)
            elif not self._opened.done():
                if "missing" in message:
                    reason = f"preload={list(self._preload)} of a sandbox: {message['missing']}; name what is there"
                    self._opened.set_exception(UserError(reason))
                elif "failed" in message:
                    reason = f"the kernel does not let the backend 'local' work: {message['failed']}"
                    self._opened.set_exception(SandboxStartError(reason))
                else:
                    self._opened.set_result(None)

    def _on_gone(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._let_wait_no_more()
        if not self._opened.done():
            stderr = self._process.stderr
            said = stderr.read().decode("utf-8", "replace").strip().splitlines() if stderr else []
            reason = said[-1] if said else "without a word"
            self._opened.set_exception(SandboxStartError(f"the zygote of the sandboxes ended at its start: {reason}"))
        for number in list(self._started):
            self._on_ended(number, "the zygote of the sandboxes has ended")

    def _on_ended(self, number: int, reason: str, end: dict[str, Any] | None = None) -> None:
        started = self._started.pop(number, None)
        group = self._groups_of.pop(number, None)
        is_killed = group is not None and group.has_killed()
        if isinstance(started, Interpreter):
            started.set_ended(None if end is None else {**end, "oom": end["oom"] or is_killed})
        elif started is not None:
            started.cpu_s = end["cpu_s"] if end else None
            started.set_ended(reason, is_killed=is_killed)
        users().give_back(self._user_of.pop(number, 0))
        if group is not None and self._cgroups is not None:
            self._cgroups.give_back(group)

    async def close(self) -> None:
        """All its sandboxes end."""
        waiting = [started.ended for started in self._started.values()]
        for number in list(self._started):
            self._kill(number)
        if waiting:
            try:
                await within(_CLOSE_S, asyncio.wait(waiting), waiting_for=f"{len(waiting)} sandboxes to end")
            except DeadlineError:
                pass  # the zygote's end is theirs
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self._process.kill()
        await asyncio.to_thread(self._process.wait, _CLOSE_S)
        if self._process.stderr:
            self._process.stderr.close()
        for number in list(self._started):
            self._on_ended(number, "its host was closed")
        if self._cgroups is not None:
            self._cgroups.close()


def base_python() -> str:
    """Not a virtual environment's, whose packages no sandbox sees."""
    return getattr(sys, "_base_executable", None) or sys.executable
