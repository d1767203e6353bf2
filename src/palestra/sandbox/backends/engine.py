"""The backend `oci`, with podman or docker: their images, their containers."""

import os
import shutil
from typing import Any

from palestra.sandbox import agent
from palestra.sandbox.backends.bwrap import PLACES
from palestra.sandbox.backends.kept import Kept, KeptBackend
from palestra.sandbox.records import Isolation, Limits, SandboxStartError

ENGINES = ("podman", "docker")
IMAGE = "docker.io/library/python:3.12-slim"
_AGENT = "/run/agent.py"
_INHERITED = ("HOME", "PATH", "XDG_RUNTIME_DIR", "DOCKER_HOST", "DOCKER_CONFIG", "CONTAINER_HOST")


class Engine(KeptBackend):
    """`image` has a `python3` of 3.8 or newer. The engine's own user, seccomp profile and cgroups hold."""

    name, isolation = "oci", Isolation.NAMESPACES
    has_users = has_cgroups = False

    def __init__(self, program: str, image: str | None = None):
        super().__init__()
        self._program, self._image = program, image or IMAGE
        self.layers = ("namespaces", "network", "read_only", "no_capabilities", "seccomp", "cgroup")

    def plan(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        name = f"palestra-{os.getpid()}-{kept.number}"
        return {
            "argv": command(self._program, self._image, name, limits, self.home),
            "cleanup": [[self._program, "rm", "--force", name]],
            "environment": {key: os.environ[key] for key in _INHERITED if key in os.environ},
        }


def command(program: str, image: str, name: str, limits: Limits, home: str) -> list[str]:
    size = f"size={limits.disk_bytes},nr_inodes={limits.inodes}"
    memory, source = f"{limits.memory_mb + limits.disk_mb}m", os.path.realpath(agent.__file__)
    writable = [f"{home}:rw,exec,mode=0755,uid=1000,gid=1000,{size}"]
    writable += [f"{place}:rw,exec,mode=1777,{size}" for place in PLACES]
    return [
        *(program, "run", "--interactive", "--rm", "--init=false", "--pull", "missing", "--name", name),
        *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--user", "1000:1000", "--hostname", "sandbox", "--workdir", home),
        *("--memory", memory, "--memory-swap", memory, "--pids-limit", str(limits.processes + 2)),
        *("--ulimit", "core=0", "--ulimit", "nofile=1024:1024", "--ulimit", f"fsize={limits.disk_bytes}"),
        *(() if limits.cpus is None else ("--cpus", f"{limits.cpus:g}")),
        *(word for place in writable for word in ("--tmpfs", place)),
        *("--volume", f"{source}:{_AGENT}:ro", "--env", f"HOME={home}", "--env", "TMPDIR=/tmp"),
        *("--entrypoint", "python3", image, "-I", "-S", _AGENT, home),
    ]


def find_engine() -> str:
    """Errors: SandboxStartError."""
    for name in ENGINES:
        found = shutil.which(name)
        if found is not None:
            return found
    raise SandboxStartError("there is neither runc nor crun, podman or docker; install Debian's `runc` or `podman`")
