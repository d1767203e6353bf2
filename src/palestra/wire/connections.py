"""HTTP connections to an engine: one for each request in flight, the latest idle one taken first.

httpx's own pool looks, at the start and at the end of each request, at every connection for every idle one: with 256
requests in flight that takes milliseconds each time, in which an event loop does nothing else.
"""

import ssl
from collections.abc import AsyncIterator

import httpx


class Connections(httpx.AsyncBaseTransport):
    """As many connections as there ever were requests at once; an idle one is used again for `keepalive_s`.

    One whose request failed or was cancelled, or whose answer was left before its end, is never used again.
    """

    def __init__(self, *, keepalive_s: float):
        self._limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=keepalive_s)
        self._verify = ssl.create_default_context()  # made once: it reads all certificates
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._all: set[httpx.AsyncHTTPTransport] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        connection = self._idle.pop() if self._idle else self._new()
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await self.drop(connection)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(response.stream, connection, self)
        return response

    def _new(self) -> httpx.AsyncHTTPTransport:
        connection = httpx.AsyncHTTPTransport(verify=self._verify, limits=self._limits, trust_env=False)
        self._all.add(connection)
        return connection

    def keep(self, connection: httpx.AsyncHTTPTransport) -> None:
        """It is free for another request."""
        self._idle.append(connection)

    async def drop(self, connection: httpx.AsyncHTTPTransport) -> None:
        self._all.discard(connection)
        await connection.aclose()

    async def aclose(self) -> None:
        for connection in list(self._all):
            await self.drop(connection)


class _Body(httpx.AsyncByteStream):
    """The body of an answer; the connection is free when it was read to its end and closed."""

    def __init__(self, body: httpx.AsyncByteStream, connection: httpx.AsyncHTTPTransport, owner: Connections):
        self._body, self._connection, self._owner = body, connection, owner
        self._is_read = self._is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._body:
            yield part
        self._is_read = True

    async def aclose(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await self._body.aclose()
        except BaseException:
            await self._owner.drop(self._connection)
            raise
        if self._is_read:
            self._owner.keep(self._connection)
        else:
            await self._owner.drop(self._connection)
