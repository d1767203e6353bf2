"""One sandbox, as whoever uses it sees it: programs, files, processes, ports. The same here and over HTTP."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol, Self

from palestra.sandbox.records import MOST_OUTPUT, File, Port, Result, SandboxGoneError

Command = str | Sequence[str]
"""A line for the shell, or a program with its arguments."""
OnOutput = Callable[[str, bytes], None]
"""Called with `stdout` or `stderr`, and what came on it."""

_CHUNK = 2**22
_DOWNLOAD_BYTES = 2**30
_WAIT_S = 10.0


class Connection(Protocol):
    """How its requests reach a sandbox."""

    id: str
    home: str

    async def call(
        self, header: dict[str, Any], body: bytes = b"", *, on_stream: OnOutput | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Errors: SandboxGoneError, OSError, ValueError."""
        ...

    async def set_timeout(self, seconds: float) -> None: ...

    async def expose(self, port: int) -> Port: ...

    async def logs(self) -> str: ...

    async def delete(self) -> None: ...


class Sandbox:
    """Made by `Sandbox.create` or a `Host`. It ends by `delete`, by leaving `async with`, or when its time is over.

    A program that fails is a `Result`; a sandbox that fails is a `SandboxError`. Relative paths begin at `home`.
    """

    def __init__(self, connection: Connection):
        self._connection = connection

    @property
    def id(self) -> str:
        return self._connection.id

    @property
    def home(self) -> str:
        return self._connection.home

    @staticmethod
    def create(**options: Any) -> "Creating":
        """`await` it, or use it as `async with`. Options: those of `Limits`, of `host.Options`, and of `Host.create`.

        Errors: SandboxStartError, SandboxFullError; UserError, for too little isolation, or a wrong option.
        """
        from palestra.sandbox.host import create

        return Creating(create(**options))

    @staticmethod
    async def list(*, labels: Sequence[str] = (), **options: Any) -> "Sequence[Sandbox]":
        """Those that were made with the same options of `host.Options`, and have all of `labels`."""
        from palestra.sandbox.host import default_host

        return await (await default_host(options)).list(labels=labels)

    @staticmethod
    async def bulk_create(count: int, **options: Any) -> "Sequence[Sandbox]":
        """All, or none and the error of the first that failed. Options and errors: as of `create`."""
        from palestra.sandbox.host import bulk_create

        return await bulk_create(count, **options)

    @staticmethod
    async def bulk_delete(*, labels: Sequence[str], **options: Any) -> int:
        """As `list` finds them; how many they were. Errors: UserError, for no labels."""
        from palestra.sandbox.host import default_host

        return await (await default_host(options)).bulk_delete(labels=labels)

    # --- programs

    async def exec(
        self,
        command: Command,
        *,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        stdin: str | bytes = "",
        timeout_s: float = 30.0,
        max_output: int = MOST_OUTPUT,
        on_output: OnOutput | None = None,
    ) -> Result:
        """A program to its end. What it leaves running in the background goes on, until the sandbox ends.

        `max_output`: bytes that are kept of each stream, from its beginning. One that takes longer than `timeout_s` is
        killed, with all that came from it.
        A program or a `cwd` that there is not is exit code 127, one that may not be used 126. Errors: SandboxGoneError.
        """
        header = {**_program(command, cwd, env), "do": "exec", "timeout_s": timeout_s, "most": max_output}
        return result(
            *await self._connection.call(
                {**header, "stream": on_output is not None}, encoded(stdin), on_stream=on_output
            )
        )

    async def open_process(
        self, command: Command, *, cwd: str = "", env: Mapping[str, str] | None = None, buffer: int = MOST_OUTPUT
    ) -> "Process":
        """A program to talk to: it waits while `buffer` bytes of its output are not read. Errors: as of `exec`, and
        OSError, if no program can be made of it.
        """
        return await self._open(command, cwd, env, most=buffer, blocks=True)

    async def background(
        self, command: Command, *, cwd: str = "", env: Mapping[str, str] | None = None, keep: int = MOST_OUTPUT
    ) -> "Process":
        """A program that nobody waits for, such as a server. The last `keep` bytes of its output can be read."""
        return await self._open(command, cwd, env, most=keep, blocks=False)

    async def _open(self, command, cwd, env, *, most: int, blocks: bool) -> "Process":
        header = {**_program(command, cwd, env), "do": "open", "most": most, "blocks": blocks}
        answer, _ = await self._connection.call(header)
        if "unstarted" in answer:
            raise OSError(answer["unstarted"], answer["message"])
        return Process(self._connection, int(answer["process"]), int(answer["pid"]))

    async def processes(self) -> Sequence["Process"]:
        """Those that were opened and not forgotten; also what has ended."""
        answer, _ = await self._connection.call({"do": "processes"})
        return [Process(self._connection, p["process"], p["pid"]) for p in answer["processes"]]

    # --- files

    async def write(self, path: str, content: str | bytes, *, offset: int | None = None, mode: int = 0o644) -> None:
        """With the directories above it. `offset`: into what is there already. Errors: OSError."""
        data = encoded(content)
        for at in range(0, max(len(data), 1), _CHUNK):
            begin = offset if at == 0 else (offset or 0) + at
            header = {"do": "write", "path": path, "mode": mode}
            await self._connection.call(
                header if begin is None else {**header, "offset": begin}, data[at : at + _CHUNK]
            )

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Of a regular file, `length` bytes or its rest. Errors: OSError; ValueError, for more than 1 GiB."""
        pieces, at, left = [], offset, _DOWNLOAD_BYTES if length is None else length
        while left > 0:
            wanted = min(left, _CHUNK)
            answer, piece = await self._connection.call({"do": "read", "path": path, "offset": at, "length": wanted})
            if length is None and answer["size"] - offset > _DOWNLOAD_BYTES:
                raise ValueError(f"{path} has {answer['size']} bytes; read it in parts, by offset and length")
            pieces.append(piece)
            at, left = at + len(piece), left - len(piece)
            if len(piece) < wanted:
                break
        return b"".join(pieces)

    async def list_files(self, path: str = "", *, recursive: bool = False, most: int = 10_000) -> Sequence[File]:
        """Paths are relative to `path`, in order; links are named, not followed.

        Errors: OSError; ValueError, for more than `most`.
        """
        answer, _ = await self._connection.call({"do": "list", "path": path, "is_deep": recursive, "most": most})
        if answer["is_cut"]:
            raise ValueError(f"{path or self.home} has more than {most} files, or more than 1 MiB of their names")
        found = [File(path=p, kind=k, size=s, mode=m, changed=c) for p, k, s, m, c in answer["files"]]
        return sorted(found, key=lambda file: file.path)

    async def remove(self, path: str) -> None:
        """A file, or a directory with all in it. Errors: OSError."""
        await self._connection.call({"do": "remove", "path": path})

    async def upload_dir(self, source: str | Path, path: str = "") -> None:
        """The regular files below `source`; links to files are followed, those to directories not. Errors: OSError."""
        for directory, _, names in os.walk(source):
            for name in sorted(names):
                file = Path(directory) / name
                if file.is_file():
                    inside = PurePosixPath(path) / file.relative_to(source).as_posix()
                    content = await asyncio.to_thread(file.read_bytes)
                    await self.write(str(inside), content, mode=file.stat().st_mode & 0o777)

    async def download(self, path: str, target: str | Path, *, max_bytes: int = _DOWNLOAD_BYTES) -> Sequence[Path]:
        """A file, or a directory: its regular files alone, written below `target`; no links, pipes or devices.

        Errors: OSError; ValueError, for more than `max_bytes`, and before anything is written, or for a name that leads
        out of `target`.
        """
        top = Path(target)
        try:
            files = [f for f in await self.list_files(path, recursive=True) if f.kind == "file"]
            places = [(str(PurePosixPath(path) / f.path), _inside(top, f.path), f.size) for f in files]
        except NotADirectoryError:
            name = PurePosixPath(path).name
            size = (await self._connection.call({"do": "read", "path": path, "length": 0}))[0]["size"]
            places = [(path, _inside(top, name), size)]
        total = sum(size for _, _, size in places)
        if total > max_bytes:
            raise ValueError(f"{path} has {total} bytes; at most {max_bytes} were asked for")
        for inside, place, size in places:
            content = await self.read(inside, 0, size)
            await asyncio.to_thread(_write, place, content)
        return [place for _, place, _ in places]

    # --- the sandbox

    async def set_timeout(self, seconds: float) -> None:
        """It ends so long from now. Errors: UserError, for more than its host allows."""
        await self._connection.set_timeout(seconds)

    async def expose_port(self, port: int) -> Port:
        """Where programs reach a TCP port that is listened to on 127.0.0.1 in there: on this machine, or the service's.

        Errors: OSError, if nobody listens; UnsupportedError.
        """
        return await self._connection.expose(port)

    async def logs(self) -> str:
        """What was done in it, a line each, newest last."""
        return await self._connection.logs()

    async def delete(self) -> None:
        """With all that runs in it, and all its files. Deleting it twice is fine."""
        await self._connection.delete()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.delete()


class Creating:
    """A sandbox that is being made: `box = await it`, or `async with it as box`."""

    def __init__(self, making):
        self._making = making

    def __await__(self) -> Generator[Any, None, Sandbox]:
        return self._making.__await__()

    async def __aenter__(self) -> Sandbox:
        self._box = await self._making
        return self._box

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._box.delete()


class Process:
    """A program that runs in a sandbox while others do. `number` is its name here, `pid` the kernel's in there."""

    def __init__(self, connection: Connection, number: int, pid: int):
        self._connection, self.number, self.pid = connection, number, pid
        self._at = {"stdout": 0, "stderr": 0}
        self._waited = bytearray(), bytearray()  # what a wait read that ended before the program did
        self._end: Result | None = None

    @property
    def has_ended(self) -> bool:
        """As far as `read` has heard."""
        return self._end is not None

    async def send(self, data: str | bytes, *, eof: bool = False) -> None:
        """To its input. Errors: BrokenPipeError, if it reads no more."""
        await self._connection.call({"do": "input", "process": self.number, "eof": eof}, encoded(data))

    async def send_eof(self) -> None:
        await self.send(b"", eof=True)

    async def read(self, *, wait_s: float = _WAIT_S) -> tuple[bytes, bytes]:
        """What came on stdout and stderr since the last time, within `wait_s`; nothing, if nothing came."""
        header = {"do": "output", "process": self.number, "wait_s": wait_s, **self._at}
        answer, body = await self._connection.call(header)
        cut = int(answer["stdout_bytes"])
        out, err = body[:cut], body[cut:]
        self._at = {"stdout": answer["stdout"] + len(out), "stderr": answer["stderr"] + len(err)}
        if answer["ended"] is not None:
            self._end = result(answer["ended"], b"")
        return out, err

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        """`("stdout", b"...")` and `("stderr", b"...")` as they come, until it ends and all is read."""
        while self._end is None:
            for name, piece in zip(("stdout", "stderr"), await self.read(), strict=True):
                if piece:
                    yield name, piece

    async def logs(self) -> tuple[str, str]:
        """All that is kept of stdout and stderr, whoever read it."""
        answer, body = await self._connection.call({"do": "output", "process": self.number})
        cut = int(answer["stdout_bytes"])
        return body[:cut].decode("utf-8", "replace"), body[cut:].decode("utf-8", "replace")

    async def signal(self, number: int) -> None:
        """To it and its process group; nothing, if it has ended."""
        await self._connection.call({"do": "signal", "process": self.number, "number": int(number)})

    async def kill(self) -> None:
        """With all that came from it."""
        await self._connection.call({"do": "signal", "process": self.number, "tree": True})

    async def wait(self, timeout_s: float = 3600.0) -> Result:
        """Its end, with what was not read of its output. Errors: TimeoutError; it goes on, and nothing is lost."""
        out, err = self._waited
        async with asyncio.timeout(timeout_s):
            while self._end is None:
                piece = await self.read()
                out += piece[0]
                err += piece[1]
        end, self._waited = self._end, (bytearray(), bytearray())
        return Result(
            exit_code=end.exit_code,
            signal=end.signal,
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
            truncated=end.truncated,
            oom=end.oom,
            wall_s=end.wall_s,
            cpu_s=end.cpu_s,
            max_rss=end.max_rss,
        )

    async def forget(self) -> None:
        """Kill it, if it runs, and keep nothing of it."""
        try:
            await self._connection.call({"do": "forget", "process": self.number})
        except (ProcessLookupError, SandboxGoneError):
            pass


def result(header: Mapping[str, Any], body: bytes) -> Result:
    """Of what an agent says about a program that ended, or could not begin."""
    if "unstarted" in header:
        code = 127 if header["unstarted"] == 2 else 126
        return Result(exit_code=code, stderr=str(header.get("message")))
    cut = int(header.get("stdout_bytes", 0))
    known = {name: header[name] for name in _RESULT if name in header}
    out, err = body[:cut].decode("utf-8", "replace"), body[cut:].decode("utf-8", "replace")
    return Result(stdout=out, stderr=err, **known)


_RESULT = ("exit_code", "signal", "truncated", "timed_out", "oom", "wall_s", "cpu_s", "max_rss")


def _program(command: Command, cwd: str, env: Mapping[str, str] | None) -> dict[str, Any]:
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else [str(word) for word in command]
    return {"argv": argv, "cwd": cwd, "env": dict(env or {})}


def encoded(content: str | bytes) -> bytes:
    return content.encode("utf-8", "replace") if isinstance(content, str) else bytes(content)


def _inside(top: Path, name: str) -> Path:
    """Errors: ValueError, for a name that leads out."""
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or not parts:
        raise ValueError(f"the sandbox names a file {name!r}, which leads out of {top}")
    return top.joinpath(*parts)


def _write(place: Path, content: bytes) -> None:
    """Links that are there already are not followed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
