"""Clients that cost too much are refused with what is wrong, and others are not hindered."""

import asyncio
import contextlib
import dataclasses
import select
import selectors
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message
from uvicorn.server import ServerState

from palestra.hub.operation.limits import Bounds, Limits
from palestra.hub.operation.rates import Buckets, Rate, place_of
from palestra.hub.operation.serving import Serving
from palestra.hub.server import listening

FREE = Rate(per_s=1e6, burst=1e6)
WAIT_S = 60.0


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def refused(_: Request) -> Response:
    return PlainTextResponse("who?", 401)


async def flood(request: Request) -> Response:
    request.app.state.num_floods += 1

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4000):
            yield bytes(1 << 16)

    return StreamingResponse(pieces())


def application(bounds: Bounds) -> Starlette:
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/refused", refused),
        Route("/flood", flood),
        Route("/health", echo),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(Limits, bounds=bounds)])
    app.state.num_floods = 0
    return app


def free(**changes: Any) -> Bounds:
    return dataclasses.replace(Bounds(of_address=FREE, of_token=FREE, of_refused=FREE), **changes)


def client(bounds: Bounds) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(application(bounds)), base_url="http://hub")


# --- rates


def test_a_bucket_gives_its_burst_then_its_rate():
    now = [0.0]
    buckets = Buckets(Rate(per_s=2, burst=3), clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b") == 0
    now[0] = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    now[0] = 100.0
    assert [buckets.take("a") > 0 for _ in range(4)] == [False, False, False, True]


def test_buckets_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("palestra.hub.operation.rates.MOST_KEYS", 10)
    buckets = Buckets(Rate(per_s=1, burst=1))
    for number in range(100):
        buckets.take(str(number))
    assert len(buckets) == 10


def test_a_network_of_version_6_is_one_place():
    assert place_of("2001:db8:1:2:3::4") == place_of("2001:db8:1:2:ffff::9") != place_of("2001:db8:1:3::4")
    assert place_of("10.0.0.1") == place_of("::ffff:10.0.0.1") != place_of("10.0.0.2")


async def test_too_many_requests_are_told_when_to_come_again():
    async with client(free(of_address=Rate(per_s=0.1, burst=3))) as asking:
        answers = [await asking.post("/echo") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[3].headers["retry-after"]) <= 10
        assert "come again" in answers[3].json()["error"]
        assert (await asking.get("/health")).status_code == 200


async def test_tokens_have_a_bucket_each():
    async with client(free(of_token=Rate(per_s=0.1, burst=2))) as asking:
        seen = {
            token: [(await asking.post("/echo", headers={"authorization": token})).status_code for _ in range(3)]
            for token in ("Bearer a", "Bearer b")
        }
    assert seen == {"Bearer a": [200, 200, 429], "Bearer b": [200, 200, 429]}


async def test_who_guesses_tokens_is_held_up_whatever_they_are():
    async with client(free(of_refused=Rate(per_s=0.01, burst=3))) as asking:
        told = [(await asking.get("/refused", headers={"authorization": f"Bearer {i}"})).status_code for i in range(5)]
        assert told == [401, 401, 401, 429, 429]
        assert (await asking.post("/echo")).status_code == 200  # without a token nothing is guessed


# --- bodies


async def test_a_body_has_a_most():
    async with client(free(body_bytes=1000)) as asking:
        assert (await asking.post("/echo", content=bytes(1000))).text == "1000"
        assert (await asking.post("/echo", content=bytes(1001))).status_code == 413

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield bytes(100)

        said = await asking.post("/echo", content=pieces())
        assert (said.status_code, said.headers["connection"]) == (413, "close")


# --- clients that are slow, by a clock that nothing holds up


class Skipping(selectors.SelectSelector):
    """What it would have waited for has passed at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "there is nothing that would come"
        self.now += max(timeout, 0.0)
        return super().select(0)


class Virtual(asyncio.SelectorEventLoop):
    """A loop whose time is what was slept in it."""

    def __init__(self):
        self._skipping = Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


async def answered(bounds: Bounds, every_s: float) -> tuple[int, bytes]:
    """Status and text for ten pieces of 100 bytes, the first at once and one every `every_s`."""
    said: list[Message] = []
    num = 0

    async def receive() -> Message:
        nonlocal num
        await asyncio.sleep(every_s if num else 0)
        num += 1
        return {"type": "http.request", "body": bytes(100), "more_body": num < 10}

    async def send(message: Message) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": "/echo", "query_string": b"", "headers": []}
    await application(bounds)(scope, receive, send)
    return said[0]["status"], b"".join(message.get("body", b"") for message in said)


@pytest.mark.parametrize(
    ("every_s", "status", "text"),
    [
        (0.06, 200, b"1000"),
        (0.144, 200, b"1000"),  # the last of them at 1.296 s of 0.4 + 900 / 1000
        (0.145, 408, b"900 bytes"),  # at 1.305 s
        (0.19, 408, b"500 bytes"),  # the sixth at 0.95 s of 0.4 + 500 / 1000
    ],
)
def test_a_body_that_is_quick_enough_is_not_ended(every_s: float, status: int, text: bytes):
    bounds = free(patience_s=0.4, bytes_per_s=1000)
    with asyncio.Runner(loop_factory=Virtual) as runner:
        found = runner.run(answered(bounds, every_s))
    assert found[0] == status
    assert text in found[1]


class Scripted(asyncio.Transport):
    """Of nobody; it notes that it was ended."""

    is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


async def is_ended(pauses_s: tuple[float, ...]) -> bool:
    """Whether an answer is, whose reader stands still for each of them and reads on after it."""
    settings = Serving(stalled_s=0.4).settings
    config = uvicorn.Config(application(free()), **settings)
    transport, protocol = Scripted(), settings["http"](config, ServerState(), {})
    protocol.connection_made(transport)
    for pause_s in pauses_s:
        protocol.pause_writing()
        await asyncio.sleep(pause_s)
        protocol.resume_writing()
    return transport.is_aborted


@pytest.mark.parametrize(("pauses_s", "expected"), [((0.3, 0.3, 0.3), False), ((0.5,), True), ((0.3, 0.5), True)])
def test_an_answer_that_is_read_now_and_then_is_not_ended(pauses_s: tuple[float, ...], expected: bool):
    with asyncio.Runner(loop_factory=Virtual) as runner:
        assert runner.run(is_ended(pauses_s)) is expected


# --- and on real connections


@contextlib.asynccontextmanager
async def served(bounds: Bounds, serving: Serving) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    """Its port, and itself."""
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(application(bounds), **serving.settings))
        server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1], server
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.wait_for(task, WAIT_S)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


TICK_S, MOST_TICKS = 0.05, 60


async def trickled(port: int, head: bytes, byte: bytes) -> tuple[bytes, float, int]:
    """What the server says to one who sends a byte every tick, until it ends the connection; when, and the ticks.

    What was said is kept when the connection is reset after it, and when it is a write that finds this out.
    """
    loop = asyncio.get_running_loop()
    began, num = loop.time(), 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setblocking(False)
        reading = asyncio.create_task(_said(connection))
        await loop.sock_sendall(connection, head)
        while not reading.done() and num < MOST_TICKS:
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(connection, byte)
            num += 1
            await asyncio.wait({reading}, timeout=TICK_S)
        return await asyncio.wait_for(reading, WAIT_S), loop.time() - began, num


async def _said(connection: socket.socket) -> bytes:
    said = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := await asyncio.get_running_loop().sock_recv(connection, 1 << 16):
            said += piece
    return bytes(said)


BODY = b"POST /echo HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000\r\n\r\n"


async def test_a_body_that_trickles_is_ended():
    async with served(free(patience_s=0.4, bytes_per_s=1000), Serving()) as (port, _):
        said, after_s, num = await trickled(port, BODY, b"x")
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in said.lower()
    assert after_s > 0.3
    assert num < MOST_TICKS


@pytest.mark.parametrize("head", [b"", b"POST /echo HTTP/1.1\r\nX-Slow: "])
async def test_a_head_that_trickles_is_ended(head: bytes):
    async with served(free(), Serving(head_s=0.4)) as (port, _):
        said, after_s, num = await trickled(port, head, b"T" if head else b"")
    assert said == b""
    assert after_s > 0.3
    assert num < MOST_TICKS


async def test_an_answer_that_nobody_reads_is_ended():
    async with served(free(), Serving(stalled_s=0.4)) as (port, server):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as deaf:
            deaf.sendall(b"GET /flood HTTP/1.1\r\nHost: hub\r\n\r\n")
            await until(lambda: server.config.app.state.num_floods == 1 and not server.server_state.connections)
            num = await asyncio.to_thread(_rest_of, deaf)
    assert num < 4000 << 16


async def test_an_answer_that_is_read_is_whole():
    async with served(free(), Serving(stalled_s=30)) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as reading:
            reading.sendall(b"GET /flood HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n")
            assert await asyncio.to_thread(_rest_of, reading) > 4000 << 16


def _rest_of(connection: socket.socket) -> int:
    num = 0
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            num += len(piece)
    return num


async def test_others_are_served_while_many_are_slow():
    async with served(free(patience_s=60), Serving(connections=500)) as (port, server):
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(100)]
            for one in slow:
                one.sendall(BODY + b"x")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as asking:
                assert (await asyncio.wait_for(asking.post("/echo", content=b"abc"), 30)).text == "3"
            assert select.select(slow, [], [], 0)[0] == [], "none of them was answered before it, or ended"
            assert len(server.server_state.connections) >= 100
