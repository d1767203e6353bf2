"""Backends whose sandboxes have a keeper each: a small process of ours that starts the agent and ends all of it.

The keeper ends when its host closes their socket, or is gone; with it ends whatever came from it.
"""

import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError
from palestra.sandbox.backends.base import Started
from palestra.sandbox.backends.interpreter import Interpreter
from palestra.sandbox.backends.local import _asked, _base_python
from palestra.sandbox.cgroups import MEGABYTE, Cgroup, Cgroups
from palestra.sandbox.link import Link
from palestra.sandbox.records import Isolation, Limits, SandboxStartError
from palestra.sandbox.users import users

SOURCE = str(Path(__file__).resolve().parents[3])
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from palestra.sandbox.keeper import main; main(sys.argv[2])"
_CLOSE_S, _REAP_S = 10.0, 5.0
_names = itertools.count(1)


@dataclass
class Kept:
    """One sandbox, from its keeper's start to its end. `uid` is 0 for this process's own user."""

    directory: str
    uid: int
    group: Cgroup | None
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

    def home_of(self, kept: Kept) -> str:
        return self.home

    async def start(self, limits: Limits) -> Started:
        kept = self._admitted(limits)
        ours, link = socket.socketpair()
        kept.control, control = socket.socketpair()
        try:
            with link, control:
                self._spawn(limits, kept, link, control)
        except OSError as error:
            ours.close()
            kept.control.close()
            self._free(kept)
            raise SandboxStartError(f"the keeper of a sandbox cannot be started: {error}") from error
        made = Started(Link(ours), kill=kept.kill, has_killed=_asked(kept.group), home=self.home_of(kept))
        kept.started = made
        assert kept.process is not None
        made.pid = kept.process.pid
        kept.pidfd = os.pidfd_open(kept.process.pid)
        self._kept[kept.process.pid] = kept
        self._loop.add_reader(kept.pidfd, self._on_ended, kept)
        return made

    def _admitted(self, limits: Limits) -> Kept:
        """Errors: SandboxStartError."""
        uid = users().take() if self.has_users else 0
        try:
            group = self._cgroups.take(limits) if self._cgroups else None
            directory = tempfile.mkdtemp(prefix=f"palestra-{self.name}-")
        except OSError as error:
            users().give_back(uid)
            raise SandboxStartError(f"no cgroup or directory for a sandbox: {error}") from error
        return Kept(os.path.realpath(directory), uid, group)

    def _spawn(self, limits: Limits, kept: Kept, link: socket.socket, control: socket.socket) -> None:
        groups = kept.group.fds if kept.group else []
        plan = {
            "directory": kept.directory,
            "uid": kept.uid,
            "link": link.fileno(),
            "control": control.fileno(),
            "groups": groups,
            "watched_bytes": 0 if kept.group else (limits.memory_mb + limits.disk_mb) * MEGABYTE,
            **self.plan(limits, kept),
        }
        kept.process = subprocess.Popen(
            [_base_python(), "-I", "-S", "-c", _BOOT, SOURCE, json.dumps(plan)],
            env={},
            pass_fds=[link.fileno(), control.fileno(), *groups],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if kept.group is not None:
            kept.group.joined()

    def _on_ended(self, kept: Kept) -> None:
        self._loop.remove_reader(kept.pidfd)
        os.close(kept.pidfd)
        assert kept.process is not None
        assert kept.started is not None
        kept.process.wait(timeout=_REAP_S)  # it has ended: this only takes its status
        del self._kept[kept.process.pid]
        kept.kill()
        kept.started.set_ended("it has ended")
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
