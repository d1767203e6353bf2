"""Backends whose sandboxes have a keeper each: a small process of ours that starts the agent and ends all of it.

The keeper ends when its host closes their socket, or is gone; with it ends whatever came from it.
"""

import asyncio
import fcntl
import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError
from palestra.sandbox import keeper
from palestra.sandbox.backends.base import Started
from palestra.sandbox.backends.interpreter import Interpreter
from palestra.sandbox.backends.local import SOURCE, base_python
from palestra.sandbox.cgroups import Cgroup, Cgroups
from palestra.sandbox.link import Link
from palestra.sandbox.records import Isolation, Limits, SandboxGoneError, SandboxStartError
from palestra.sandbox.users import users

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from palestra.sandbox.keeper import main; main(sys.argv[2])"
_OPEN_S, _CLOSE_S, _REAP_S = 30.0, 10.0, 5.0
_YOUNG_S = 60.0  # until then, a directory may not have its keeper yet
_NOTHING: dict[str, Any] = {
    "argv": [],  # what starts the agent; none: the keeper's child becomes it
    "is_detached": False,  # `argv` ends at once, and leaves the agent to the keeper
    "drops_user": False,
    "cleanup": [],  # programs that end what is not the keeper's
    "environment": {},
    "limits": None,
    "shown": [],
    "root": None,
    "tools": [],
}
_names = itertools.count(1)


@dataclass
class Kept:
    """One sandbox, from its keeper's start to its end. `uid` is 0 for this process's own user."""

    directory: str
    uid: int
    group: Cgroup | None
    number: int
    process: subprocess.Popen[bytes] | None = None
    control: socket.socket | None = None
    pidfd: int = -1
    started: Started | None = None

    def kill(self) -> None:
        if self.control is not None:
            self.control.close()


class KeptBackend:
    """What they share. Each says in `plan` what its keepers start."""

    name: str
    isolation: Isolation
    home = "/home/user"
    has_users = has_cgroups = True
    ends_by_programs = False
    grace_s = 5.0

    def __init__(self):
        self._kept: dict[int, Kept] = {}
        self._loop = asyncio.get_running_loop()
        name = f"palestra-{self.name}{next(_names)}-{os.getpid()}"
        self._cgroups = Cgroups(name) if self.has_cgroups else None
        self.layers: tuple[str, ...] = ()

    @property
    def counts(self) -> str:
        """The name of the wall that counts memory."""
        version = self._cgroups.version if self._cgroups else 0
        return f"cgroup_v{version}" if version else "watchdog"

    def plan(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        """What `keeper.become` needs. The keeper's own part is added to it."""
        raise NotImplementedError

    def counted(self, limits: Limits) -> Limits:
        """What its cgroup bounds."""
        return limits

    def asked(self, kept: Kept) -> Callable[[], bool]:
        """Whether the kernel killed in it since that was last asked."""
        return kept.group.has_killed if kept.group is not None else lambda: False

    async def open(self) -> None:
        """Makes one, to see that they can be made. Errors: SandboxStartError."""
        await asyncio.to_thread(sweep, self.name)
        try:
            made = await self.start(Limits())
            try:
                await within(_OPEN_S, asyncio.shield(made.link.ready), waiting_for=f"a first sandbox of {self.name}")
            finally:
                made.link.close("it was only a try")
                made.kill()
            await within(_CLOSE_S, asyncio.shield(made.ended), waiting_for=f"a first sandbox of {self.name} to end")
        except (SandboxStartError, SandboxGoneError, DeadlineError) as error:
            await self.close()
            raise SandboxStartError(f"the sandbox {self.name!r} does not work here: {error}") from None

    def home_of(self, kept: Kept) -> str:
        return self.home

    async def start(self, limits: Limits) -> Started:
        kept = self._admitted(limits)
        ours, link = socket.socketpair()
        kept.control, control = socket.socketpair()
        try:
            with link, control:
                lock = os.open(kept.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._spawn(limits, kept, link, control, lock)
                finally:
                    os.close(lock)
        except OSError as error:
            ours.close()
            kept.control.close()
            self._free(kept)
            raise SandboxStartError(f"the keeper of a sandbox cannot be started: {error}") from error
        home, group = self.home_of(kept), kept.group
        made = Started(Link(ours), kill=kept.kill, has_killed=self.asked(kept), home=home, group=group)
        kept.started = made
        assert kept.process is not None
        kept.pidfd = os.pidfd_open(kept.process.pid)
        self._kept[kept.process.pid] = kept
        self._loop.add_reader(kept.pidfd, self._on_ended, kept)
        return made

    def _admitted(self, limits: Limits) -> Kept:
        """Errors: SandboxStartError."""
        uid = users().take() if self.has_users else 0
        try:
            group = self._cgroups.take(self.counted(limits)) if self._cgroups else None
            directory = tempfile.mkdtemp(prefix=f"palestra-{self.name}-")
        except OSError as error:
            users().give_back(uid)
            raise SandboxStartError(f"no cgroup or directory for a sandbox: {error}") from error
        return Kept(os.path.realpath(directory), uid, group, next(_names))

    def _spawn(self, limits: Limits, kept: Kept, link: socket.socket, control: socket.socket, lock: int) -> None:
        groups = kept.group.fds if kept.group else []
        plan = {
            "directory": kept.directory,
            "uid": kept.uid,
            "link": link.fileno(),
            "control": control.fileno(),
            "lock": lock,  # held for as long as the keeper is there
            "groups": groups,
            "watched_bytes": 0 if kept.group else limits.held_bytes,
            **_NOTHING,
            **self.plan(limits, kept),
        }
        kept.process = subprocess.Popen(
            [base_python(), "-I", "-S", "-c", _BOOT, SOURCE, json.dumps(plan)],
            env={},
            pass_fds=[link.fileno(), control.fileno(), lock, *groups],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _on_ended(self, kept: Kept) -> None:
        self._loop.remove_reader(kept.pidfd)
        os.close(kept.pidfd)
        assert kept.process is not None
        assert kept.started is not None
        kept.process.wait(timeout=_REAP_S)  # it has ended: this only takes its status
        del self._kept[kept.process.pid]
        kept.kill()
        kept.started.set_ended("it has ended", is_killed=self.asked(kept)())
        self._free(kept)

    def _free(self, kept: Kept) -> None:
        users().give_back(kept.uid)
        if kept.group is not None and self._cgroups is not None:
            self._cgroups.give_back(kept.group)
        if os.path.lexists(kept.directory):  # its keeper could not, or never was
            shutil.rmtree(kept.directory, ignore_errors=True)

    async def interpreter(self, limits: Limits) -> Interpreter | None:
        return None

    async def close(self) -> None:
        """All its sandboxes end."""
        waiting = [kept.started.ended for kept in self._kept.values() if kept.started is not None]
        for kept in self._kept.values():
            kept.kill()
        if waiting:
            try:
                await within(_CLOSE_S, asyncio.wait(waiting), waiting_for=f"{len(waiting)} sandboxes to end")
            except DeadlineError:
                pass  # their keepers go on without us
        for kept in tuple(self._kept.values()):
            self._loop.remove_reader(kept.pidfd)
            os.close(kept.pidfd)
        self._kept.clear()
        if self._cgroups is not None:
            self._cgroups.close()


def sweep(name: str) -> int:
    """Remove directories of this user's sandboxes that have lost their keepers; how many they were."""
    count = 0
    for place in Path(tempfile.gettempdir()).glob(f"palestra-{name}-*"):
        try:
            about = place.lstat()
            if about.st_uid != os.geteuid() or time.time() - about.st_mtime < _YOUNG_S:
                continue
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                keeper.remove_tree(place)
                count += 1
            finally:
                os.close(fd)
        except OSError:
            continue  # it has a keeper, or is gone by now
    return count
