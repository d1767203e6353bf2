"""An interpreter that waits in a sandbox of its own for one program, whose end is the sandbox's.

Consumes: a program. Produces: what its agent would say of it. Waits for: that it takes its program and is ready, each
with a deadline; then its output, and its end, of which the zygote tells, at most its time. Ends when: the program has
ended, and with it all that it started.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from palestra.core.deadline import Unhurried, within
from palestra.core.errors import DeadlineError
from palestra.sandbox.agent import MOST_BODY, MOST_HEADER, frame, frames
from palestra.sandbox.records import SandboxGoneError, SandboxStartError

_CHUNK = 65_536
_SEND_S, _READY_S, _GONE_S = 30.0, 30.0, 30.0


class _Stream:
    """The first `most` bytes of what a program writes; the rest is read and forgotten."""

    def __init__(self, name: str, fd: int):
        self.name, self.fd = name, fd
        self.kept, self.most, self.is_cut = bytearray(), 0, False
        self.on_output: Callable[[str, bytes], None] | None = None
        self.error: Exception | None = None  # of whoever listens
        self.is_over = False

    def read(self) -> bool:
        """Whether there was something."""
        try:
            piece = os.read(self.fd, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return False
        self.is_over = not piece
        fits = piece[: self.most - len(self.kept)]
        self.is_cut |= len(fits) < len(piece)
        self.kept += fits
        if fits and self.on_output is not None and self.error is None:
            try:
                self.on_output(self.name, fits)
            except Exception as error:
                self.error = error
        return bool(piece)


class Interpreter:
    """`ended` is set by the backend, with `status`, `cpu_s`, `max_rss` and `oom`; None where it does not know."""

    def __init__(self, link: socket.socket, stdout: int, stderr: int, *, kill: Callable[[], None]):
        self._link, self._loop = link, asyncio.get_running_loop()
        link.setblocking(False)
        self._streams = (_Stream("stdout", stdout), _Stream("stderr", stderr))
        self.kill = kill
        self.ended: asyncio.Future[dict[str, Any] | None] = self._loop.create_future()

    async def run(
        self,
        code: bytes,
        *,
        stdin: bytes,
        files: Mapping[str, bytes],
        timeout_s: float,
        most: int,
        on_output: Callable[[str, bytes], None] | None,
    ) -> tuple[dict[str, Any], bytes]:
        """Once. `timeout_s` counts from when it has its program.

        Errors: ValueError, for files and input that it has no room for, or that are too many at once;
        SandboxStartError, if it could not be made; SandboxGoneError, if nobody knows how it ended.
        """
        header = {"code": len(code), "files": [[path, len(content)] for path, content in files.items()]}
        body = b"".join((*files.values(), code, stdin))
        said = frame(header, body)
        if len(body) > MOST_BODY or len(said) - len(body) > MOST_HEADER:
            raise ValueError(
                f"{len(body)} bytes of code, input and {len(files)} files are more than a program is given at once: "
                f"{MOST_BODY} bytes, and {MOST_HEADER} of names; create a sandbox and write them in parts"
            )
        for stream in self._streams:
            stream.most, stream.on_output = most, on_output
            self._loop.add_reader(stream.fd, self._on_readable, stream)
        await self._send(said)
        await self._ready()
        is_late, began = False, time.monotonic()
        try:
            async with Unhurried(timeout_s):
                await asyncio.shield(self.ended)
        except TimeoutError:
            is_late = not self.ended.done()
            self.kill()
            await within(_GONE_S, asyncio.shield(self.ended), waiting_for="a program that was killed to be gone")
        wall_s = time.monotonic() - began
        for stream in self._streams:
            while stream.read():
                pass
        error = next((stream.error for stream in self._streams if stream.error is not None), None)
        if error is not None:
            raise error
        return self._told(is_late, wall_s)

    async def _send(self, data: bytes) -> None:
        """Before it is ready too: then it need not rehearse."""
        sending = self._loop.sock_sendall(self._link, data)
        try:
            await within(_SEND_S, sending, waiting_for="a sandbox to take its program")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended; why, is told by how
        except DeadlineError as error:
            raise SandboxStartError(str(error)) from None

    async def _ready(self) -> None:
        """It waits for its program, or complains, or has ended: `_complaint` tells. Errors: SandboxStartError."""
        said: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._link, lambda: said.done() or said.set_result(None))
        first = asyncio.wait({said, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        try:
            await within(_READY_S, first, waiting_for="an interpreter to be ready for its program")
        except DeadlineError as error:
            raise SandboxStartError(str(error)) from None
        finally:
            self._loop.remove_reader(self._link)

    def _on_readable(self, stream: _Stream) -> None:
        stream.read()
        if stream.is_over:
            self._loop.remove_reader(stream.fd)  # every writer has closed it

    def _told(self, is_late: bool, wall_s: float) -> tuple[dict[str, Any], bytes]:
        end, reason = self.ended.result(), self._complaint()
        if reason is not None:
            raise SandboxStartError(f"a sandbox could not be made: {reason}")
        if end is None:
            raise SandboxGoneError("a sandbox was gone before anybody knew how its program ended")
        out, err = self._streams
        status = end["status"]
        is_signalled = os.WIFSIGNALED(status)
        header = {
            "exit_code": None if is_late or is_signalled else os.WEXITSTATUS(status),
            "signal": os.WTERMSIG(status) if is_signalled and not is_late else None,
            "timed_out": is_late,
            "oom": bool(end["oom"]),
            "wall_s": wall_s,
            "cpu_s": end["cpu_s"],
            "max_rss": end["max_rss"],
            "truncated": out.is_cut or err.is_cut,
            "stdout_bytes": len(out.kept),
        }
        return header, bytes(out.kept + err.kept)

    def _complaint(self) -> str | None:
        """What kept it from waiting for a program; None if it did. Errors: ValueError, of what it was given."""
        try:
            said = self._link.recv(_CHUNK)
        except (BlockingIOError, OSError):
            said = b""
        was_ready = said[:1] == b"1"
        for header, _ in frames(bytearray(said[was_ready:])):
            if was_ready:
                raise ValueError(f"a program could not be given its files and input: {header.get('failed')}")
            return str(header.get("failed"))
        return None if was_ready else "it ended before it was ready"

    def set_ended(self, end: dict[str, Any] | None) -> None:
        if not self.ended.done():
            self.ended.set_result(end)

    def close(self) -> None:
        """It ends, if it has not."""
        if self._link.fileno() < 0:
            return
        self.kill()
        self._link.close()
        for stream in self._streams:
            self._loop.remove_reader(stream.fd)
            os.close(stream.fd)
