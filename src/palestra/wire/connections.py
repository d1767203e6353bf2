"""HTTP connections to an engine: httpx speaks, aiohttp carries.

The bytes of a request cost httpx's own transport several times what they cost aiohttp's, whose parser is compiled; and
its pool looks, at the start and at the end of each request, at every connection for every idle one: with 256 requests
in flight that takes milliseconds each time, in which an event loop does nothing else.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import lru_cache

import aiohttp
import httpx
from yarl import URL


class Connections(httpx.AsyncBaseTransport):
    """As many connections as there ever were requests at once; an idle one is used again for `keepalive_s`.

    One whose request failed or was cancelled, or whose answer was left before its end, is never used again.
    """

    def __init__(self, *, keepalive_s: float):
        self._keepalive_s = keepalive_s
        self._made: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = aiohttp.ClientTimeout(sock_connect=request.extensions.get("timeout", {}).get("connect"))
        with _as_httpx(request):
            answer = await self._session.request(
                request.method,
                _target(str(request.url)),
                headers=request.headers.multi_items(),
                data=await request.aread() or None,
                allow_redirects=False,
                timeout=timeout,
            )
        return httpx.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer, request))

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Made in the event loop that uses it."""
        if self._made is None:
            self._made = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self._keepalive_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        return self._made

    async def aclose(self) -> None:
        if self._made is not None:
            await self._made.close()


@lru_cache(256)
def _target(url: str) -> URL:
    return URL(url, encoded=True)


class _Body(httpx.AsyncByteStream):
    """The body of an answer. Its connection is free when it was read to its end."""

    def __init__(self, answer: aiohttp.ClientResponse, request: httpx.Request):
        self._answer, self._request = answer, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._request):
            async for part in self._answer.content.iter_any():
                yield part

    async def aclose(self) -> None:
        self._answer.close()  # of a connection that is free again, nothing


@contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    """What fails on the way, in the words of who asked."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except (aiohttp.ClientError, OSError) as error:
        raise httpx.ReadError(f"{type(error).__name__} {error}", request=request) from error
