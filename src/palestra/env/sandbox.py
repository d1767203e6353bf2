"""Where code that a model wrote runs: what environments ask of it, and a backend without any walls."""

import asyncio
import atexit
import mmap
import os
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from msgspec import Struct

from palestra.core.deadline import Unhurried, within
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.guard import Guard
from palestra.core.process import die_with_parent
from palestra.core.records import Task

MOST_OUTPUT = 2**20  # bytes that are kept of each stream
_GONE_S = 10.0
_NUMBER_BYTES = 8  # of a process
_LARGEST_FILE = 256 * 2**20  # bytes


class Ran(Struct, frozen=True, kw_only=True):
    """What a program did. One that took too long was killed, and has no exit code."""

    exit_code: int | None
    stdout: str
    stderr: str

    @property
    def is_too_slow(self) -> bool:
        return self.exit_code is None


class Sandbox(Protocol):
    """One rollout's. Paths are relative to the directory that programs start in.

    A program that fails is an answer; a sandbox that fails is an InfrastructureError.
    """

    async def run(self, command: str | Sequence[str], *, stdin: str = "", timeout_s: float = 30.0) -> Ran:
        """A line for the shell, or a program with its arguments, to its end."""
        ...

    async def write(self, path: str, content: str | bytes) -> None: ...

    async def read(self, path: str) -> bytes:
        """Errors: OSError, if there is no such file."""
        ...

    async def close(self) -> None: ...


MakeSandbox = Callable[[Task], Awaitable[Sandbox]]


class Unsafe:
    """A directory of its own, and nothing that keeps a program in it: for code that one would run by hand.

    Programs, with all that they started and did not part from, end with the process that started them, and their
    directories with them, however it ends.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._running: set[asyncio.subprocess.Process] = set()

    @classmethod
    async def make(cls, task: Task) -> "Unsafe":
        """Errors: InfrastructureError, for a task that wants an image."""
        if task.image is not None:
            raise InfrastructureError(f"the sandbox 'unsafe' has no images; task {task.key!r} wants {task.image!r}")
        return cls(Path(tempfile.mkdtemp(dir=_home()[1])))

    async def run(self, command: str | Sequence[str], *, stdin: str = "", timeout_s: float = 30.0) -> Ran:
        """Streams are files: a program that floods them, or leaves others behind that hold them, ends as any other.

        `timeout_s` counts no time in which the event loop was blocked: whoever ended meanwhile was not too slow.
        """
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        guard, number = _home()[0], mmap.mmap(-1, _NUMBER_BYTES)
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin.encode("utf-8", "replace"))
            given.seek(0)
            try:
                process = await asyncio.create_subprocess_exec(
                    *words,
                    cwd=self._directory,
                    env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._directory), "LANG": "C.UTF-8"},
                    stdin=given,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                    preexec_fn=partial(_begin, guard, number),
                )
            except BaseException as error:
                guard.ended(int.from_bytes(number[:], "little"))
                if isinstance(error, OSError | ValueError | subprocess.SubprocessError):  # no program can be made of it
                    code = 127 if isinstance(error, FileNotFoundError) else 126
                    return Ran(exit_code=code, stdout="", stderr=str(error))
                raise
            self._running.add(process)
            is_late = False
            try:
                async with Unhurried(timeout_s):
                    await process.wait()
            except TimeoutError:
                is_late = True
            finally:
                await self._end(process)
            if is_late and process.returncode == -signal.SIGKILL:  # else it had ended, and nobody had seen it
                return Ran(exit_code=None, stdout=_told(out), stderr=f"{_told(err)}\nkilled after {timeout_s:g} s")
            return Ran(exit_code=process.returncode, stdout=_told(out), stderr=_told(err))

    async def write(self, path: str, content: str | bytes) -> None:
        """Errors: OSError, for a path that a file stands in the way of, or something that is no regular file."""
        data = content.encode("utf-8", "replace") if isinstance(content, str) else content
        await asyncio.to_thread(_write, self._inside(path), data)

    async def read(self, path: str) -> bytes:
        """Of a regular file, its first `MOST_OUTPUT` bytes. Errors: OSError, if there is none."""
        return await asyncio.to_thread(_read, self._inside(path))

    async def close(self) -> None:
        for process in list(self._running):
            await self._end(process)
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    def _inside(self, path: str) -> Path:
        """Errors: ValueError, for a path that leads out of the directory."""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r} leads out of the sandbox; give a path relative to its directory")
        return self._directory / path

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """With all that it started and did not part from."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._running.discard(process)
        _home()[0].ended(process.pid)
        await within(_GONE_S, process.wait(), waiting_for=f"process {process.pid} to be gone")


@cache
def _home() -> tuple[Guard, Path]:
    """Of this process: who ends what its sandboxes leave behind, and the directory that they lie in."""
    guard, directory = Guard(), Path(tempfile.mkdtemp(prefix="palestra-unsafe-"))
    guard.remove(directory)
    atexit.register(guard.close)
    return guard, directory


def _begin(guard: Guard, number: mmap.mmap) -> None:
    """In the new process: it dies with the thread that started it, and no file of its grows beyond bounds. Before it is
    a program it is watched, and its number is told to whoever started it, who may be gone, or hear of a failure alone.
    """
    number[:] = os.getpid().to_bytes(_NUMBER_BYTES, "little")
    guard.watch(os.getpid())
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    die_with_parent(os.getppid())


def _told(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read(MOST_OUTPUT).decode("utf-8", "replace")


def _write(place: Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        _require_regular(place)
    place.write_bytes(data)


def _read(place: Path) -> bytes:
    _require_regular(place)
    with place.open("rb") as file:
        return file.read(MOST_OUTPUT)


def _require_regular(place: Path) -> None:
    """Errors: FileNotFoundError, of anything else, such as a pipe, which would hold up a thread for ever."""
    if not stat.S_ISREG(place.stat().st_mode):
        raise FileNotFoundError(f"{place.name} is no regular file")


BACKENDS: dict[str, MakeSandbox] = {"unsafe": Unsafe.make}
"""By `env.sandbox`."""


def backend(name: str | None) -> MakeSandbox | None:
    """Errors: UserError, if there is none of this name."""
    if name is not None and name not in BACKENDS:
        raise UserError(f"there is no sandbox {name!r}; there is: {', '.join(BACKENDS)}")
    return None if name is None else BACKENDS[name]
