"""What is asked of sandboxes, what they answer, and their errors."""

from enum import IntEnum

from msgspec import Struct

from palestra.core.errors import InfrastructureError, UserError

MEGABYTE = 2**20
MOST_OUTPUT = 2**20  # bytes that are kept of each stream


class Isolation(IntEnum):
    """What stands between a program and this machine; each level has what those below have."""

    NONE = 0  # nothing: as if run by hand
    PROCESS = 1  # another user or landlock, seccomp, limits: it sees this machine's processes, not its files
    NAMESPACES = 2  # a file system, processes, network and users of its own, on this machine's kernel
    KERNEL = 3  # a kernel of its own


class Limits(Struct, frozen=True, kw_only=True):
    """Of one sandbox. `disk_mb` is all that it can write, in memory: what is held is both together."""

    memory_mb: int = 512
    disk_mb: int = 256
    inodes: int = 65_536
    processes: int = 128
    cpus: float | None = None  # of one core; None: as many as there are

    @property
    def disk_bytes(self) -> int:
        return self.disk_mb * MEGABYTE

    @property
    def held_bytes(self) -> int:
        """Of all that it holds: memory and files."""
        return (self.memory_mb + self.disk_mb) * MEGABYTE

    def __post_init__(self) -> None:
        for name, least in (("memory_mb", 16), ("disk_mb", 1), ("inodes", 64), ("processes", 4)):
            if not least <= getattr(self, name) <= 2**22:
                raise UserError(f"{name}={getattr(self, name)} of a sandbox must be from {least} to {2**22}")
        if self.cpus is not None and not 0.01 <= self.cpus <= 1024:
            raise UserError(f"cpus={self.cpus} of a sandbox must be from 0.01 to 1024, or None")


class Result(Struct, frozen=True, kw_only=True):
    """What a program did. It has an exit code, or the signal that ended it, or was killed for its time or memory."""

    exit_code: int | None = None
    signal: int | None = None
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    timed_out: bool = False
    oom: bool = False
    wall_s: float = 0.0
    cpu_s: float = 0.0
    max_rss: int = 0  # bytes, of the largest of its processes

    @property
    def status(self) -> str:
        """`ok`, `failed`, `timed_out` or `oom`."""
        if self.timed_out:
            return "timed_out"
        if self.exit_code == 0:
            return "ok"  # also where a process of its own was killed for its memory, and it did not mind
        return "oom" if self.oom else "failed"


class File(Struct, frozen=True, kw_only=True):
    path: str
    kind: str  # file, directory, link, other
    size: int  # bytes
    mode: int
    changed: float  # Unix time


class Port(Struct, frozen=True, kw_only=True):
    """Where a port of a sandbox is answered on this machine."""

    port: int
    host: str
    host_port: int


class SandboxError(InfrastructureError):
    """A sandbox that failed: of the machine, never of the program in it. Whoever needs an answer starts over."""


class SandboxStartError(SandboxError):
    """It could not be made: of the backend, or of limits of this machine."""


class SandboxGoneError(SandboxError):
    """It is no more: deleted, its lifetime over, or killed. Of whoever uses it after that, or of the machine."""


class SandboxFullError(SandboxError):
    """The service has as many as it may have. Of the load; later there is room."""


class SandboxUnreachableError(SandboxError):
    """The service that has it does not answer, or is about to end. Of the network, or of the service's machine."""


class UnsupportedError(UserError):
    """What this backend cannot do. Of whoever chose it; the message names one that can."""


class IsolationError(UserError):
    """No backend here isolates as much as was asked for. Of whoever set `min_isolation`, or of this machine."""
