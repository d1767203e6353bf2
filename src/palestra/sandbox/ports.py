"""Ports of a sandbox on this machine: connections are made inside, by its agent, and passed out."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import PalestraError
from palestra.sandbox.link import Link
from palestra.sandbox.records import Port, UnsupportedError

DIAL_S = 10.0
_CHUNK = 65_536
_IDLE_S = 3600.0


class Forwarding:
    """One port: what connects to it here is connected to it there."""

    where: Port
    _server: asyncio.Server

    def __init__(self, link: Link, port: int):
        self._link, self._port = link, port
        self._served = Served(self._forward)

    @classmethod
    async def open(cls, link: Link, port: int, *, backend: str) -> "Forwarding":
        """Errors: OSError, if nobody listens there; UnsupportedError."""
        forwarding = cls(link, port)
        (await passed(link, {"do": "dial", "port": port}, backend=backend)).close()
        opening = asyncio.start_server(forwarding._served.accept, "127.0.0.1", 0)
        forwarding._server = await within(DIAL_S, opening, waiting_for="a free port on this machine")
        host, host_port = forwarding._server.sockets[0].getsockname()[:2]
        forwarding.where = Port(port=port, host=host, host_port=host_port)
        return forwarding

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await passed(self._link, {"do": "dial", "port": self._port}, backend="")
        wrapping = asyncio.open_connection(sock=inside)
        far_reader, far_writer = await within(DIAL_S, wrapping, waiting_for="a connection that is there")
        try:
            await relay(reader, writer, far_reader, far_writer)
        finally:
            far_writer.close()

    def close(self) -> None:
        self._server.close()
        self._served.close()


class Served:
    """Connections of a server, ended with it; one that breaks is nobody else's matter. Above `most`, they are refused:
    each holds descriptors of this process, and there may be no end to who connects.
    """

    def __init__(
        self,
        serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
        *,
        most: int = 256,
    ):
        self._serve, self._most, self._tasks = serve, most, set[asyncio.Task[None]]()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self._most:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._served(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _served(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except (OSError, ValueError, EOFError, asyncio.LimitOverrunError, PalestraError):
            pass  # one of its ends is gone, or speaks otherwise; both are closed
        finally:
            writer.close()

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()


async def passed(link: Link, request: dict[str, Any], *, backend: str) -> socket.socket:
    """A socket that the agent made in its network. Errors: OSError, SandboxGoneError, UnsupportedError."""
    try:
        _, _, fd = await within(DIAL_S, link.call(request), waiting_for="the agent of a sandbox to pass a socket")
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        fd = None  # it is kept from making any
    if fd is None:
        raise UnsupportedError(
            f"the sandbox {backend!r} has neither ports on this machine nor hosts to reach; 'local' and 'bwrap' have"
        )
    try:
        made = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    made.setblocking(False)
    return made


async def relay(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Both ways, until both have said all they have to say, or nobody did for an hour."""
    await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))


async def relay_answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Both ways, until the far end has said all it has to say, whatever is still asked."""
    asking = asyncio.ensure_future(_pump(reader, far_writer))
    asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen: the answer tells what matters
    try:
        await _pump(far_reader, writer)
    finally:
        asking.cancel()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await within(_IDLE_S, source.read(_CHUNK), waiting_for="more bytes of a forwarded connection"):
        target.write(data)
        await within(_IDLE_S, target.drain(), waiting_for="a forwarded connection to take bytes")
    if target.can_write_eof():
        target.write_eof()
