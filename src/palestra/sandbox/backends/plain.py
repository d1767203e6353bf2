"""The backends `unsafe` and `process`: programs among the other processes of this machine, in a directory of their own.

Both see the Python that runs us, with what is installed into it.
"""

import os
import stat
import sys
from pathlib import Path
from typing import Any

from palestra.sandbox import kernel
from palestra.sandbox.backends.kept import Kept, KeptBackend
from palestra.sandbox.backends.root import system_root
from palestra.sandbox.records import Isolation, Limits, SandboxStartError
from palestra.sandbox.zygote import DEVICES

_ETC = ("passwd", "group", "hosts", "nsswitch.conf")
_PATH = ("/usr/local/bin", "/usr/bin", "/bin")


class Plain(KeptBackend):
    ends_by_programs = True  # they are of the agent's own user, and may kill it

    def __init__(self):
        super().__init__()
        self._pythons = list(dict.fromkeys([sys.prefix, os.path.realpath(sys.base_prefix)]))
        self._shown = [(closed, place) for place in self._pythons for closed in [_closed_above(place)] if closed]
        self._path = ":".join(dict.fromkeys([*(f"{place}/bin" for place in self._pythons), *_PATH]))

    def home_of(self, kept: Kept) -> str:
        return f"{kept.directory}/home"

    def plan(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        home, temporary = self.home_of(kept), f"{kept.directory}/tmp"
        for place in (home, temporary):
            os.mkdir(place, 0o700)
            if kept.uid:
                os.chown(place, kept.uid, kept.uid)
        if kept.uid:
            os.chmod(kept.directory, 0o711)
        environment = {"PATH": self._path, "HOME": home, "LANG": "C.UTF-8", "TMPDIR": temporary}
        return {"home": home, "environment": environment, "shown": self._shown, **self.walls(limits, kept)}

    def walls(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        return {"is_walled": False, "readable": [], "writable": []}


class Unsafe(Plain):
    """Nothing is between a program and this machine but good manners: for programs that you would run by hand.

    What a sandbox started ends with it, and its directory; what uses more memory than its limit is killed.
    """

    name, isolation = "unsafe", Isolation.NONE
    has_users = has_cgroups = False

    def __init__(self):
        super().__init__()
        self.layers = (self.counts,)


class Process(Plain):
    """Programs read the system's files and Python's, write their own directory, and have no sockets but pairs.

    Started by root, each sandbox is a user of its own; by anybody else, it is that user, whom landlock keeps from other
    files and processes. A file is at most `disk_mb`; how many files there are, and their sum, nothing bounds. Only a
    user of its own is held to a number of processes, or a cgroup.
    """

    name, isolation = "process", Isolation.PROCESS

    def __init__(self):
        """Errors: SandboxStartError, where the kernel has too few walls."""
        super().__init__()
        self._has_landlock = kernel.landlock_version() > 0
        if not self._has_landlock and os.geteuid() != 0:
            raise SandboxStartError("this kernel has no landlock, which 'process' needs unless root starts it")
        uid, landlock = ("uid",) if os.geteuid() == 0 else (), ("landlock",) if self._has_landlock else ()
        self.layers = (*uid, "no_capabilities", "seccomp", *landlock, self.counts)
        system = [source for source, _ in system_root().binds]
        etc, devices = [f"/etc/{name}" for name in _ETC], [f"/dev/{name}" for name in DEVICES]
        self._readable = [*system, *self._pythons, *etc, *devices, "/proc"] if self._has_landlock else []

    def walls(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        own = [f"{kept.directory}/home", f"{kept.directory}/tmp"]
        return {
            "is_walled": True,
            "limits": {
                "files": 1024,
                "processes": limits.processes if kept.uid else None,
                "file_bytes": limits.disk_bytes,
            },
            "readable": self._readable,
            "writable": [*own, "/dev/null", "/dev/zero", "/dev/full"],
        }


def _closed_above(place: str) -> str:
    """The topmost directory on the way there that only some may enter; empty, if there is none."""
    parents = reversed(Path(os.path.realpath(place)).parents)
    return next((str(one) for one in parents if not one.stat().st_mode & stat.S_IXOTH), "")
