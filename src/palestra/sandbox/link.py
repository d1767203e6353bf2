"""The host's end of the agent: requests and their answers over one socket.

Consumes: requests of this process. Produces: their answers, in any order. Waits for: the socket; every answer has the
deadline of whoever asks. Ends when: the socket is closed, and all that wait are told.

What comes from a sandbox is not trusted: a frame too long, or one that no agent writes, ends the sandbox.
"""

import asyncio
import errno
import itertools
import os
import socket
from collections.abc import Callable
from typing import Any

from palestra.sandbox.agent import MOST_BODY, MOST_HEADER, frame, frames
from palestra.sandbox.records import SandboxGoneError

Answer = tuple[dict[str, Any], bytes, int | None]
"""Header, body, and a descriptor that came with it."""
OnStream = Callable[[str, bytes], None]

_CHUNK, _MOST_FDS, _MOST_WAITING_FDS = 262_144, 4, 64
_CLOSE_ON_EXEC = 0x4000_0000  # MSG_CMSG_CLOEXEC


class _Wait:
    __slots__ = ("future", "on_stream")

    def __init__(self, future: asyncio.Future[Answer], on_stream: OnStream | None):
        self.future, self.on_stream = future, on_stream


class Link:
    """Over a connected stream socket, which it closes. `ready` is done when the agent is there."""

    def __init__(self, link: socket.socket):
        link.setblocking(False)
        self._socket, self._loop = link, asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._waits: dict[int, _Wait] = {}
        self._numbers = itertools.count(1)
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._fds: list[int] = []
        self._reason = "its agent has ended"
        self._loop.add_reader(link.fileno(), self._on_readable)

    async def call(self, header: dict[str, Any], body: bytes = b"", *, on_stream: OnStream | None = None) -> Answer:
        """Errors: SandboxGoneError; OSError, of the sandbox's own files; ValueError, for what the agent refuses."""
        if self.closed.done():
            raise SandboxGoneError(self._reason)
        if len(body) > MOST_BODY:
            raise ValueError(f"{len(body)} bytes at once are more than {MOST_BODY}; send them in parts")
        number = next(self._numbers)
        said = frame({**header, "id": number}, body)
        if len(said) - len(body) > MOST_HEADER:
            if header["do"] in ("exec", "open"):  # no more than the kernel would take: so it is told
                return {"unstarted": errno.E2BIG, "message": os.strerror(errno.E2BIG)}, b"", None
            raise ValueError(f"a request of {len(said) - len(body)} bytes is more than {MOST_HEADER}")
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waits[number] = _Wait(future, on_stream)
        self._write(said)
        try:
            answer = await future
        finally:
            self._waits.pop(number, None)
        error = answer[0].get("error")
        if error == "os":
            raise OSError(answer[0].get("errno"), str(answer[0].get("message")))
        if error is not None:
            raise ValueError(str(answer[0].get("message")))
        return answer

    def close(self, reason: str) -> None:
        """Whoever waits is told the reason."""
        if self.closed.done():
            return
        self._reason = reason
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self.closed.set_result(None)
        if not self.ready.done():
            self.ready.set_exception(SandboxGoneError(reason))
            self.ready.exception()  # seen, if nobody waits
        for wait in list(self._waits.values()):
            if not wait.future.done():
                wait.future.set_exception(SandboxGoneError(reason))

    # --- the socket

    def _write(self, data: bytes) -> None:
        if not self._outgoing:
            try:
                data = data[self._socket.send(data) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.close(self._reason)
                return
            if not data:
                return
            self._loop.add_writer(self._socket.fileno(), self._on_writable)
        self._outgoing += data

    def _on_writable(self) -> None:
        try:
            done = self._socket.send(memoryview(self._outgoing)[:_CHUNK].tobytes())
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close(self._reason)
            return
        del self._outgoing[:done]
        if not self._outgoing:
            self._loop.remove_writer(self._socket.fileno())

    def _on_readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _CHUNK, _MOST_FDS, _CLOSE_ON_EXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds = b"", []
        self._fds += fds
        if len(self._fds) > _MOST_WAITING_FDS:
            self.close(f"it passes more than {_MOST_WAITING_FDS} descriptors that nobody asked for")
            return
        if not data:
            self.close(self._reason)
            return
        self._incoming += data
        try:
            for header, body in frames(self._incoming):
                self._on_frame(header, body)
        except (ValueError, TypeError, RecursionError) as error:
            self.close(f"what it sent is no answer: {error}")

    def _on_frame(self, header: dict[str, Any], body: bytes) -> None:
        if "failed" in header:
            self.close(f"it could not be made: {header['failed']}")
        elif header.get("ready") is True:
            if not self.ready.done():
                self.ready.set_result(None)
        else:
            wait = self._waits.get(header.get("id", 0))
            passed = self._fds.pop(0) if header.get("passes") and self._fds else None
            if wait is not None and "stream" in header:
                self._tell(wait, str(header["stream"]), body)
            elif wait is not None and not wait.future.done():
                wait.future.set_result((header, body, passed))
                return
            if passed is not None:
                os.close(passed)  # nobody waits for it any more

    def _tell(self, wait: _Wait, name: str, body: bytes) -> None:
        """An error of whoever listens is theirs alone."""
        if wait.on_stream is None or wait.future.done():
            return
        try:
            wait.on_stream(name, body)
        except Exception as error:
            wait.future.set_exception(error)
