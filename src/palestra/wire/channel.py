"""Messages over ZeroMQ: one listener with many callers. What a process that has a successor still says is refused.

Frames carry the attempt (the run's start) and the life (how often the process was started within it). A listener
remembers the newest life of every peer and lets a successor take over its predecessor's name; a caller that was cut off
and is connected again hears `Reconnected`: what was said around that moment may be lost, on both sides.

Consumes / produces: typed messages of `wire.messages`. Waits for: the other side, always with a deadline.
"""

import asyncio
import sys
import time
from collections import deque
from contextlib import suppress
from socket import socketpair
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from msgspec import Struct
from zmq.utils.monitor import recv_monitor_message

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError

In = TypeVar("In")
Out = TypeVar("Out")

_TURN_S = 0.005  # so long messages are taken one after the other, then the loop does what else there is


class Reconnected(Struct, frozen=True):
    """The listener is there again after it was cut off: a successor, or the same one that missed something."""


class Woken(Struct, frozen=True):
    """Something else than a message: another thread of the process has called `wake`."""


class _Head(Struct, frozen=True, order=True, array_like=True):
    """Who speaks: which attempt of the run, and which life of the process within it."""

    attempt: int
    life: int


_decode_head = msgspec.msgpack.Decoder(_Head).decode


def _frame(head: bytes, message: Any) -> list[bytes]:
    return [head, msgspec.msgpack.encode(message)]


class _Connection:
    """What ZeroMQ's monitor tells of a caller's connection: the first handshake begins it, later ones follow a cut.

    The monitor is a socket of its own that becomes readable with every event.
    """

    def __init__(self, socket: zmq.Socket):
        self.events = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket, self._is_begun = socket, False

    def was_cut(self) -> bool:
        """Whether it was cut off and is there again, since the last look."""
        found = False
        while self.events.get(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            recv_monitor_message(self.events, zmq.NOBLOCK)
            found, self._is_begun = found or self._is_begun, True
        return found

    def close(self) -> None:
        self._socket.disable_monitor()
        self.events.close(linger=0)


class _LoopSocket:
    """A ZeroMQ socket in an event loop. Messages are taken in bulk: one wake-up for all that have arrived. Whoever
    receives one after the other lets the rest of the loop run in between, after `_TURN_S`.

    ZeroMQ signals its file descriptor on changes only, so after every send the inbox has to be looked at again.
    Sends never block: the queues are unbounded, and the loop's pacing bounds what is in them.
    """

    def __init__(self, context: zmq.Context, kind: int):
        self.zmq = context.socket(kind)
        self.zmq.setsockopt(zmq.LINGER, 1000)
        self.zmq.setsockopt(zmq.SNDHWM, 0)
        self.zmq.setsockopt(zmq.RCVHWM, 0)
        self._inbox: deque[list[bytes]] = deque()
        self._arrived = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._will_look = False
        self._since = time.monotonic()  # whoever receives has had the loop
        self._connection = _Connection(self.zmq) if kind == zmq.DEALER else None

    def send(self, frames: list[bytes]) -> None:
        self._join_loop()
        self.zmq.send_multipart(frames, zmq.NOBLOCK)
        if not self._will_look:
            self._will_look = True
            asyncio.get_running_loop().call_soon(self._look)

    async def receive(self) -> list[bytes]:
        """The frames of a message; none at all stand for a connection that was cut and is there again."""
        self._join_loop()
        while not self._inbox:
            self._arrived.clear()
            self._look()
            if not self._inbox:
                await self._arrived.wait()
                self._since = time.monotonic()
        if time.monotonic() - self._since > _TURN_S:
            await asyncio.sleep(0)
            self._since = time.monotonic()
        return self._inbox.popleft()

    def close(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            for socket in self._sockets:
                self._loop.remove_reader(socket.fileno())
        if self._connection is not None:
            self._connection.close()
        self.zmq.close()

    @property
    def _sockets(self) -> list[zmq.Socket]:
        return [self.zmq] if self._connection is None else [self.zmq, self._connection.events]

    def _join_loop(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for socket in self._sockets:
                self._loop.add_reader(socket.fileno(), self._look)

    def _look(self) -> None:
        self._will_look = False
        if not self.zmq.closed and self._connection is not None and self._connection.was_cut():
            self._inbox.append([])
        while not self.zmq.closed:
            try:
                self._inbox.append(self.zmq.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
        if self._inbox:
            self._arrived.set()


class Listener(Generic[In, Out]):
    """The side that owns the address (ROUTER). Peers are known by the name they called themselves."""

    def __init__(self, address: str, *, attempt: int, receives: Any, life: int = 0):
        self._attempt, self._decoder = attempt, msgspec.msgpack.Decoder(receives)
        self._head = msgspec.msgpack.encode(_Head(attempt, life))
        self._lives: dict[bytes, int] = {}  # the newest of every peer
        self._context = zmq.Context()
        self._socket = _LoopSocket(self._context, zmq.ROUTER)
        self._socket.zmq.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.zmq.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.num_refused = 0
        try:
            self._socket.zmq.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise InfrastructureError(f"cannot listen at {address}: {error}; is another run using it?") from error

    async def receive(self) -> tuple[str, In]:
        """The next message of this attempt and of its sender's newest life. Never ends by itself: the caller owns the
        deadline."""
        while True:
            peer, head, payload = await self._socket.receive()
            if self._accepts(peer, _decode_head(head)):
                return peer.decode(), self._decoder.decode(payload)

    def _accepts(self, peer: bytes, head: _Head) -> bool:
        """What a process said last may be read only after its successor took over its name: then ZeroMQ has given the
        old connection another one, which begins with a zero byte."""
        newest = _Head(self._attempt, self._lives.get(peer, 0))
        if head.attempt == newest.attempt and head >= newest and not peer.startswith(b"\0"):
            self._lives[peer] = head.life
            return True
        self.num_refused += 1
        print(f"refused a message of attempt {head.attempt}, life {head.life} from {peer!r}", file=sys.stderr)
        return False

    async def send(self, peer: str, message: Out) -> None:
        """Errors: InfrastructureError, if `peer` is not connected."""
        try:
            self._socket.send([peer.encode(), *_frame(self._head, message)])
        except zmq.ZMQError as error:
            raise InfrastructureError(f"{peer} is not connected ({error}); see logs/{peer}.log") from error

    def close(self) -> None:
        """Waits, up to a second, until what was sent has left: the last words of a process arrive."""
        self._socket.close()
        self._context.term()


class Caller(Generic[In, Out]):
    """The side that calls (DEALER), in an event loop."""

    def __init__(self, address: str, *, name: str, attempt: int, receives: Any, life: int = 0):
        self._attempt, self._decoder = attempt, msgspec.msgpack.Decoder(receives)
        self._head = msgspec.msgpack.encode(_Head(attempt, life))
        self._context = zmq.Context()
        self._socket = _LoopSocket(self._context, zmq.DEALER)
        _connect(self._socket.zmq, address, name)

    async def send(self, message: Out) -> None:
        self._socket.send(_frame(self._head, message))

    async def receive(self, *, deadline_s: float, waiting_for: str) -> In | Reconnected:
        """Errors: DeadlineError."""
        while True:
            frames = await within(deadline_s, self._socket.receive(), waiting_for=waiting_for)
            if not frames:
                return Reconnected()
            head, payload = frames
            if _decode_head(head).attempt == self._attempt:
                return self._decoder.decode(payload)

    def close(self) -> None:
        """Waits, up to a second, until what was sent has left: the last words of a process arrive."""
        self._socket.close()
        self._context.term()


class BlockingCaller(Generic[In, Out]):
    """The side that calls (DEALER), without an event loop: the trainer's first rank, and short-lived processes."""

    def __init__(self, address: str, *, name: str, attempt: int, receives: Any, life: int = 0):
        self._attempt, self._decoder = attempt, msgspec.msgpack.Decoder(receives)
        self._head = msgspec.msgpack.encode(_Head(attempt, life))
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._connection = _Connection(self._socket)
        self._waker, self._woken = socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        _connect(self._socket, address, name)

    def send(self, message: Out) -> None:
        self._socket.send_multipart(_frame(self._head, message))

    def wake(self) -> None:
        """The one method for other threads: `receive` returns `Woken`, now or when it is called next."""
        with suppress(OSError):  # it is told so already, or closed
            self._waker.send(b"\0")

    def receive(self, *, deadline_s: float, waiting_for: str) -> In | Reconnected | Woken:
        """Errors: DeadlineError."""
        poller, ends_at = zmq.Poller(), time.monotonic() + deadline_s
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._connection.events, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while True:
            if self._was_woken():
                return Woken()
            if self._connection.was_cut():
                return Reconnected()
            if self._socket.get(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
                head, payload = self._socket.recv_multipart()
                if _decode_head(head).attempt == self._attempt:
                    return self._decoder.decode(payload)
            elif not poller.poll(max(0, int(1000 * (ends_at - time.monotonic())))):
                raise DeadlineError(waiting_for, deadline_s)

    def _was_woken(self) -> bool:
        """Since the last look, however often."""
        try:
            return bool(self._woken.recv(4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Waits, up to a second, until what was sent has left: the last words of a process arrive."""
        self._waker.close()
        self._woken.close()
        self._connection.close()
        self._socket.close()
        self._context.term()


def _connect(socket: zmq.Socket, address: str, name: str) -> None:
    socket.setsockopt(zmq.IDENTITY, name.encode())
    socket.connect(address)
