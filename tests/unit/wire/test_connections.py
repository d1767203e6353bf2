"""Connections to a server that counts them: one each in flight, used again when idle, closed if left half read."""

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from palestra.wire.connections import Connections
from palestra.wire.policy import read_events


class Server:
    """Answers `GET /WORDS` with so many words, a chunk each; those of `/held` wait for `release`."""

    def __init__(self):
        self.url, self.connections, self.now, self.most_at_once = "", 0, 0, 0
        self.release, self.full = asyncio.Event(), asyncio.Event()  # full: 20 requests at once

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._one(head.split()[1].decode().strip("/"), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, path: str, writer: asyncio.StreamWriter) -> None:
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        if self.now == 20:
            self.full.set()
        if path == "held":
            await self.release.wait()
        if path == "broken":
            writer.close()
            raise ConnectionError
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(int(path) if path.isdigit() else 1):
            writer.write(b"c\r\ndata: word\n\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        self.now -= 1


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    known = Server()
    listening = await asyncio.start_server(known.answer, "127.0.0.1", 0)
    known.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield known
    listening.close()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=server.url, transport=Connections(keepalive_s=60.0), trust_env=False
    ) as client:
        yield client


async def test_one_after_the_other_is_one_connection(server: Server, client: httpx.AsyncClient):
    for _ in range(5):
        assert (await client.get("/3")).text == "data: word\n\n" * 3 + "data: [DONE]\n\n"
    assert server.connections == 1


async def test_requests_in_flight_have_one_each_and_leave_them_to_later_ones(server: Server, client: httpx.AsyncClient):
    asking = [asyncio.create_task(client.get("/held")) for _ in range(20)]
    await asyncio.wait_for(server.full.wait(), 20)
    server.release.set()
    await asyncio.gather(*asking)
    await asyncio.gather(*(client.get("/1") for _ in range(20)))
    assert (server.connections, server.most_at_once) == (20, 20)


async def test_events_read_to_their_end_leave_a_connection_to_use(server: Server, client: httpx.AsyncClient):
    for _ in range(3):
        async with client.stream("GET", "/4") as response:
            assert [event async for event in read_events(response.aiter_bytes())] == [b"word"] * 4
    assert server.connections == 1


async def test_an_answer_left_half_read_costs_its_connection(server: Server, client: httpx.AsyncClient):
    """The control of the test before."""
    for _ in range(3):
        async with client.stream("GET", "/400") as response:
            assert await anext(read_events(response.aiter_bytes())) == b"word"
    assert server.connections == 3


async def test_a_broken_or_cancelled_request_harms_no_other(server: Server, client: httpx.AsyncClient):
    for _ in range(3):
        with pytest.raises(httpx.TransportError):
            await client.get("/broken")
    held = asyncio.create_task(client.get("/held"))
    await asyncio.sleep(0.05)
    held.cancel()
    await asyncio.wait([held])
    assert (await client.get("/2")).status_code == 200


async def test_an_idle_connection_is_not_used_after_its_time(server: Server):
    async with httpx.AsyncClient(
        base_url=server.url, transport=Connections(keepalive_s=0.05), trust_env=False
    ) as client:
        await client.get("/1")
        await asyncio.sleep(0.15)
        await client.get("/1")
    assert server.connections == 2


async def cost_s(server: Server, transport: httpx.AsyncBaseTransport, *, at_once: int) -> float:
    """CPU seconds of a request, the server's part included, once all connections are there. On a busy machine the least
    of several measurements is the least disturbed."""
    slots = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, transport=transport, trust_env=False, timeout=30) as client:

        async def ask() -> None:
            async with slots:
                await client.get("/1")

        await asyncio.gather(*(ask() for _ in range(at_once)))
        began = time.process_time()
        await asyncio.gather(*(ask() for _ in range(400)))
        return (time.process_time() - began) / 400


@pytest.mark.slow
async def test_a_request_costs_the_same_however_many_are_in_flight(server: Server):
    """httpx's own pool, which looks at every connection for every other one, is the control."""
    few = min([await cost_s(server, Connections(keepalive_s=5.0), at_once=8) for _ in range(3)])
    many = min([await cost_s(server, Connections(keepalive_s=5.0), at_once=200) for _ in range(3)])
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=5.0)
    own = await cost_s(server, httpx.AsyncHTTPTransport(limits=limits, trust_env=False), at_once=200)
    print(f"ms a request: {1000 * few:.2f} among 8, {1000 * many:.2f} among 200; by httpx's own pool {1000 * own:.2f}")
    assert many < 2 * few
    assert own > 2 * many


async def test_streams_cancelled_at_any_moment_leave_no_connection_stuck(server: Server, client: httpx.AsyncClient):
    async def read() -> None:
        async with client.stream("GET", "/400") as response:
            async for _ in read_events(response.aiter_bytes()):
                pass

    for moment_s in (0.0, 0.001, 0.002, 0.004, 0.008, 0.016):
        reading = [asyncio.create_task(read()) for _ in range(8)]
        await asyncio.sleep(moment_s)
        for task in reading:
            task.cancel()
        await asyncio.sleep(0)
        for task in reading:
            task.cancel()  # again, while it closes
        await asyncio.wait(reading)
        for _ in range(10):
            assert (await asyncio.wait_for(client.get("/1"), 20)).status_code == 200
