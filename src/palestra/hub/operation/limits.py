"""What one client may cost: requests in a time, bytes of a body, seconds for them.

A request is refused with what is wrong and when to come again. Of a token its hash alone is held.
"""

import asyncio
import hashlib
import math
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palestra.hub.operation.rates import Buckets, Rate, place_of

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})  # who watches a hub is not to be told to wait
OF_ADDRESS, OF_TOKEN, OF_REFUSED = Rate(400, 800), Rate(200, 400), Rate(0.5, 30)  # a second, and at once


@dataclass(frozen=True)
class Bounds:
    """`patience_s` for a body, and a second more for every `bytes_per_s` of it."""

    of_address: Rate = OF_ADDRESS
    of_token: Rate = OF_TOKEN
    of_refused: Rate = OF_REFUSED  # answers 401 to one address: who guesses tokens
    body_bytes: int = 1 << 20  # of any request; an application may take less
    patience_s: float = 20.0
    bytes_per_s: float = 4096.0


class Limits:
    """Refuses with 429, 413 and 408. The connection ends where a body was not read to its end."""

    def __init__(self, app: ASGIApp, bounds: Bounds):
        self._app, self._bounds = app, bounds
        self._addresses, self._tokens = Buckets(bounds.of_address), Buckets(bounds.of_token)
        self._refused = Buckets(bounds.of_refused)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        address, most = place_of((scope.get("client") or ("",))[0]), self._bounds.body_bytes
        if refusal := self._refusal(Headers(scope=scope), address, most):
            await refusal(scope, receive, send)
            return
        body = _Body(receive, most, self._bounds)

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 401:
                    self._refused.take(address)
                if body.is_broken:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, body.receive, send_noted)

    def _refusal(self, headers: Headers, address: str, most: int) -> JSONResponse | None:
        if wait_s := self._wait_s(address, headers.get("authorization", "")):
            return _refused(429, f"too many requests; come again in {math.ceil(wait_s)} s", wait_s)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            return _refused(413, f"a body of {length} bytes; the most that is taken here is {most}")
        return None

    def _wait_s(self, address: str, credentials: str) -> float:
        if wait_s := self._addresses.take(address):
            return wait_s
        if not credentials:
            return 0.0
        return self._refused.wait_s(address) or self._tokens.take(hashlib.sha256(credentials.encode()).hexdigest())


def _refused(status: int, text: str, wait_s: float = 0.0) -> JSONResponse:
    headers = {"retry-after": str(max(math.ceil(wait_s), 1))} if wait_s else {"connection": "close"}
    return JSONResponse({"error": text}, status, headers)


class _Body:
    """A request's body as it comes. Errors of `receive`: HTTPException 413 and 408."""

    def __init__(self, receive: Receive, most: int, bounds: Bounds):
        self._receive, self._most, self._bounds = receive, most, bounds
        self._num, self._is_whole, self._ends = 0, False, asyncio.get_running_loop().time() + bounds.patience_s
        self.is_broken = False

    async def receive(self) -> Message:
        if self._is_whole:  # what comes now is the end of the connection, which nobody is late with
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._ends + self._num / self._bounds.bytes_per_s):
                message = await self._receive()
        except TimeoutError:
            self.is_broken = True
            slow = (
                f"{self._num} bytes of the body came in time; at least {self._bounds.bytes_per_s:g} a second are asked"
            )
            raise HTTPException(408, f"too slow: {slow}") from None
        if message["type"] == "http.request":
            self._num += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._num > self._most:
                self.is_broken = True
                raise HTTPException(413, f"more than {self._most} bytes, the most that is taken here")
        return message
