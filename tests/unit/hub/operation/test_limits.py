"""Clients that cost too much are refused with what is wrong, and others are not hindered."""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from palestra.hub.operation.limits import Bounds, Limits
from palestra.hub.operation.rates import Buckets, Rate, place_of
from palestra.hub.operation.serving import Serving
from palestra.hub.server import listening

FREE = Rate(per_s=1e6, burst=1e6)
WAIT_S = 10.0


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def refused(_: Request) -> Response:
    return PlainTextResponse("who?", 401)


async def flood(_: Request) -> Response:
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
    return Starlette(routes=routes, middleware=[Middleware(Limits, bounds=bounds)])


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


# --- clients that are slow, on real connections


@contextlib.asynccontextmanager
async def served(bounds: Bounds, serving: Serving) -> AsyncIterator[int]:
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(application(bounds), **serving.settings))
        server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.wait_for(task, WAIT_S)


async def trickled(port: int, head: bytes, byte: bytes, every_s: float) -> tuple[bytes, float]:
    """What the server says to one who sends a byte now and then, until it ends the connection; and when it does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    loop = asyncio.get_running_loop()
    began, reading = loop.time(), asyncio.create_task(reader.read())
    writer.write(head)
    while not reading.done() and loop.time() - began < WAIT_S:
        with contextlib.suppress(ConnectionError):
            writer.write(byte)
            await writer.drain()
        await asyncio.wait({reading}, timeout=every_s)
    writer.close()
    try:
        return await asyncio.wait_for(reading, 1), loop.time() - began
    except ConnectionError:
        return b"", loop.time() - began


BODY = b"POST /echo HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000\r\n\r\n"


async def test_a_body_that_trickles_is_ended():
    async with served(free(patience_s=0.4, bytes_per_s=1000), Serving()) as port:
        said, after_s = await trickled(port, BODY, b"x", 0.05)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in said.lower()
    assert 0.3 < after_s < 3


async def test_a_body_that_is_quick_enough_is_not():
    async with served(free(patience_s=0.4, bytes_per_s=1000), Serving()) as port:
        said, _ = await trickled(port, BODY.replace(b"Host", b"Connection: close\r\nHost"), b"x" * 100, 0.06)
    assert said.endswith(b"1000")


@pytest.mark.parametrize("head", [b"", b"POST /echo HTTP/1.1\r\nX-Slow: "])
async def test_a_head_that_trickles_is_ended(head: bytes):
    async with served(free(), Serving(head_s=0.4)) as port:
        said, after_s = await trickled(port, head, b"T" if head else b"", 0.05)
    assert said == b""
    assert 0.3 < after_s < 3


async def test_an_answer_that_nobody_reads_is_ended():
    async with served(free(), Serving(stalled_s=0.4)) as port:
        with socket.create_connection(("127.0.0.1", port)) as deaf:
            deaf.sendall(b"GET /flood HTTP/1.1\r\nHost: hub\r\n\r\n")
            await asyncio.sleep(1.2)
            deaf.settimeout(WAIT_S)
            num = await asyncio.to_thread(_rest_of, deaf)
    assert num < 4000 << 16


async def test_an_answer_that_is_read_is_whole():
    async with served(free(), Serving(stalled_s=0.4)) as port:
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
    async with served(free(patience_s=5), Serving(connections=500)) as port:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                slow.sendall(BODY + b"x")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as asking:
                assert (await asyncio.wait_for(asking.post("/echo", content=b"abc"), 2)).text == "3"
