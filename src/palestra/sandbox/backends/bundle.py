"""The backends `gvisor` and, with runc or crun, `oci`: a bundle of the Open Container Initiative for each sandbox.

The bundle's root is the keeper's tree of mounts, which nobody else sees; what is writable are file systems in memory.
"""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import structs

from palestra.sandbox import kernel
from palestra.sandbox.backends.bwrap import PLACES, Rooted
from palestra.sandbox.backends.kept import Kept
from palestra.sandbox.backends.root import Root
from palestra.sandbox.cgroups import KillCount
from palestra.sandbox.records import MEGABYTE, Isolation, Limits, SandboxStartError

_CGROUPS = Path("/sys/fs/cgroup")
_NAMESPACES = ("pid", "network", "ipc", "uts", "mount")
_MASKED = ("acpi", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_SENTRY_MB = 128  # gVisor's own memory, beyond that of the programs
_NOSUID = ["nosuid", "nodev"]


class Bundle(Rooted):
    """`user` is who programs are, in there."""

    user = 1000

    def __init__(self, program: str, root: Root):
        super().__init__(root)
        self._program = program

    def linux(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        """What is not the same for all runtimes."""
        raise NotImplementedError

    def write_bundle(self, limits: Limits, kept: Kept, argv: list[str]) -> None:
        config = {
            "ociVersion": "1.0.2",
            "process": self._process(limits, argv),
            "root": {"path": f"{kept.directory}/root", "readonly": True},
            "hostname": "sandbox",
            "mounts": _mounts(self.home, self.user, limits),
            "linux": self.linux(limits, kept),
        }
        Path(f"{kept.directory}/config.json").write_text(json.dumps(config), encoding="utf-8")

    def _process(self, limits: Limits, argv: list[str]) -> dict[str, Any]:
        environment = {**self._root.environment, "HOME": self.home}
        size, files = limits.disk_bytes, 1024
        bounds = (("CORE", 0), ("NOFILE", files), ("FSIZE", size), ("MEMLOCK", MEGABYTE), ("NPROC", limits.processes))
        return {
            "terminal": False,
            "user": {"uid": self.user, "gid": self.user},
            "args": argv,
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": self.home,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")},
            "rlimits": [{"type": f"RLIMIT_{name}", "hard": most, "soft": most} for name, most in bounds],
            "noNewPrivileges": True,
        }


def _mounts(home: str, user: int, limits: Limits) -> list[dict[str, Any]]:
    bounds = [f"size={limits.disk_bytes}", f"nr_inodes={limits.inodes}", f"uid={user}", f"gid={user}"]
    private = [(home, [*bounds, "mode=0755"]), *((place, [*bounds, "mode=1777"]) for place in PLACES)]
    devices = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]}
    proc = {"destination": "/proc", "type": "proc", "source": "proc", "options": [*_NOSUID, "noexec"]}
    return [
        proc,
        devices,
        *(
            {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": [*_NOSUID, *options]}
            for place, options in private
        ),
    ]


class Gvisor(Bundle):
    """A kernel of its own, in user space. Its cgroup, where there is one, counts that kernel too."""

    name, isolation = "gvisor", Isolation.KERNEL
    ends_by_programs = True  # its kernel lets them kill the first process, and ends where it is out of threads

    def __init__(self, root: Root):
        """Errors: SandboxStartError, where there is no runsc."""
        found = shutil.which("runsc", path=_search())
        if found is None:
            raise SandboxStartError("there is no `runsc`; install gVisor, or Debian's package `runsc`")
        super().__init__(found, root)
        self.layers = ("kernel", "network", "read_only", "no_capabilities", self.counts)

    def counted(self, limits: Limits) -> Limits:
        return structs.replace(
            limits, memory_mb=limits.memory_mb + _SENTRY_MB, processes=4 * limits.processes + 4 * _SENTRY_MB
        )

    def linux(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        return {"namespaces": [{"type": kind} for kind in _NAMESPACES]}

    def plan(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        watched = limits.held_bytes
        root = self.root(kept)
        self.write_bundle(limits, kept, self.agent(limits, watched))
        flags = ["--root", f"{kept.directory}/state", "--network=none", "--ignore-cgroups"]
        flags += ["--rootless"] if os.geteuid() != 0 else []
        return {
            "root": root,
            "argv": [self._program, *flags, "run", "--bundle", kept.directory, f"palestra-{os.getpid()}-{kept.number}"],
            "environment": {"PATH": _search()},
        }


class Runc(Bundle):
    """By runc or crun, which make the cgroups themselves. Root inside is nobody outside, and neither is the user."""

    name, isolation, has_cgroups = "oci", Isolation.NAMESPACES, False

    def __init__(self, program: str, root: Root):
        super().__init__(program, root)
        if os.geteuid() != 0:
            raise SandboxStartError("runc needs root here; `podman` and the sandboxes 'local' and 'bwrap' do not")
        self._version = 2 if (_CGROUPS / "cgroup.controllers").exists() else 1
        self._has_cgroups = self._version == 2 or (_CGROUPS / "memory").is_dir()
        counts = f"cgroup_v{self._version}" if self._has_cgroups else "watchdog"
        self.layers = ("uid", "namespaces", "network", "read_only", "no_capabilities", "seccomp", counts)

    def asked(self, kept: Kept) -> Callable[[], bool]:
        top = _CGROUPS if self._version == 2 else _CGROUPS / "memory"
        return KillCount(top / _name(kept), self._version).has_grown

    def linux(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        maps = [{"containerID": 0, "hostID": kept.uid + 1, "size": 1}]
        maps += [{"containerID": self.user, "hostID": kept.uid, "size": 1}]
        memory = limits.held_bytes
        resources: dict[str, Any] = {"memory": {"limit": memory}, "pids": {"limit": limits.processes + 2}}
        if limits.cpus is not None:
            resources["cpu"] = {"quota": max(int(limits.cpus * 100_000), 1000), "period": 100_000}
        return {
            "namespaces": [{"type": kind} for kind in (*_NAMESPACES, "user", "cgroup")],
            "uidMappings": maps,
            "gidMappings": maps,
            "cgroupsPath": f"/{_name(kept)}",
            "resources": {**resources, "devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": [f"/proc/{name}" for name in _MASKED],
            "readonlyPaths": [f"/proc/{name}" for name in _READ_ONLY],
            "seccomp": _seccomp(uncounted_memory=self._has_cgroups),
        }

    def plan(self, limits: Limits, kept: Kept) -> dict[str, Any]:
        watched = 0 if self._has_cgroups else limits.held_bytes
        root = self.root(kept)
        self.write_bundle(limits, kept, self.agent(limits, watched))
        command, name = [self._program, "--root", f"{kept.directory}/state"], _name(kept)
        return {
            "root": root,
            "argv": [*command, "run", "--detach", "--no-new-keyring", "--bundle", kept.directory, name],
            "is_detached": True,
            "cleanup": [[*command, "delete", "--force", name]],
            "environment": {"PATH": _search()},
        }


def _name(kept: Kept) -> str:
    """Of a container and its cgroup, as `cgroups.sweep` knows them."""
    return f"palestra-oci{kept.number}-{os.getpid()}"


def find_runc() -> str | None:
    return shutil.which("runc", path=_search()) or shutil.which("crun", path=_search())


def _search() -> str:
    """Programs of the system's administrator are among them, which a user's PATH leaves out."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def _seccomp(*, uncounted_memory: bool) -> dict[str, Any]:
    """What `kernel.seccomp_program` is, in words."""
    by_error: dict[int, list[str]] = {}
    for name, error in kernel.refused_calls(uncounted_memory=uncounted_memory).items():
        by_error.setdefault(error, []).append(name)
    rules = [_refusal(names, error) for error, names in by_error.items()]
    flags = [1 << bit for bit in range(32) if kernel.NAMESPACES & 1 << bit]
    rules += [_refusal(["clone"], errno.EPERM, 0, "SCMP_CMP_MASKED_EQ", flag, flag) for flag in flags]
    most = max(kernel.FAMILIES)
    unknown = [family for family in range(most) if family not in kernel.FAMILIES]
    rules += [_refusal(["socket"], errno.EAFNOSUPPORT, 0, "SCMP_CMP_EQ", family) for family in unknown]
    rules.append(_refusal(["socket"], errno.EAFNOSUPPORT, 0, "SCMP_CMP_GT", int(most)))
    rules += [_refusal(["socketpair"], errno.EAFNOSUPPORT, 0, "SCMP_CMP_EQ", 0)]
    rules += [_refusal(["socketpair"], errno.EAFNOSUPPORT, 0, "SCMP_CMP_GT", int(socket.AF_UNIX))]
    rules += [_refusal(list(kernel.OF_OTHERS), errno.EPERM, 0, "SCMP_CMP_EQ", 1)]
    rules += [_refusal(["setpriority"], errno.EPERM, 0, "SCMP_CMP_GT", os.PRIO_PROCESS)]
    rules += [_refusal(["setpriority"], errno.EPERM, 1, "SCMP_CMP_EQ", 1)]
    rules += [_refusal(["ioctl"], errno.EPERM, 1, "SCMP_CMP_EQ", request) for request in kernel.TERMINAL_INPUT]
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}


def _refusal(
    names: list[str], error: int, index: int | None = None, op: str = "", value: int = 0, second: int = 0
) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": error}
    if index is not None:
        rule["args"] = [{"index": index, "op": op, "value": value, "valueTwo": second}]
    return rule
