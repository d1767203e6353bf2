"""A service somewhere else, used as a `Host`: `RemoteHost("http://127.0.0.1:8002")`.

Consumes: requests of this process. Produces: sandboxes and results, as a `Host` does. Waits for: the service, with a
deadline for every answer. Ends when: it is closed; its sandboxes live on until their time is over, or they are deleted.

aiohttp carries: a small request costs its client much less CPU than it costs that of httpx.
"""

import asyncio
import base64
import io
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import msgspec

from palestra.core.deadline import within
from palestra.core.errors import UserError
from palestra.sandbox.agent import frame, frames
from palestra.sandbox.box import OnOutput, Sandbox, encoded
from palestra.sandbox.host import Options
from palestra.sandbox.records import (
    MOST_OUTPUT,
    Isolation,
    IsolationError,
    Limits,
    Port,
    Result,
    SandboxGoneError,
    SandboxUnreachableError,
)
from palestra.sandbox.refusals import error_of, heard

TOKEN = "PALESTRA_SANDBOX_TOKEN"
_CALL_S = 60.0  # beyond what a request may take by itself
_START_S, _CONNECT_S = 180.0, 10.0
_QUEUE_S = 600.0
_LONG = 2**19
_TRIES, _FIRST_WAIT_S = 4, 0.2
_DEFAULT, _LIMITS = Options(), Limits()


class RemoteHost:
    """`token`: None for that of the environment, `PALESTRA_SANDBOX_TOKEN`."""

    def __init__(self, url: str, token: str | None = None, *, options: Options = _DEFAULT):
        """Errors: UserError, without a token, or with options that a service has set for all."""
        given = token if token is not None else os.environ.get(TOKEN, "")
        if not given.strip():
            raise UserError(
                f"{url} needs a token: set {TOKEN}; the service prints it, or its tenants were given theirs"
            )
        for name in ("image", "packages", "preload", "without"):
            if getattr(options, name):
                raise UserError(f"{name} is chosen where the service is started, not by who uses {url}; leave it out")
        self.url = url.rstrip("/")
        self._least = options.min_isolation or Isolation.NONE
        self._http = _Http(self.url, given.strip())

    async def open(self) -> Self:
        """Errors: UserError, for a wrong token; IsolationError; SandboxUnreachableError."""
        try:
            about = await self._http.json("GET", "/v1/host")
            self.backend = Far(about)
            if self.backend.isolation < self._least:
                raise IsolationError(
                    f"{self.url} isolates by {self.backend.isolation.name.lower()}, less than min_isolation="
                    f"{self._least.name.lower()}; choose another, or lower min_isolation"
                )
        except BaseException:
            await self.close()
            raise
        return self

    async def create(
        self,
        *,
        limits: Limits = _LIMITS,
        timeout_s: float = 3600.0,
        labels: Sequence[str] = (),
        egress: Sequence[str] = (),
        key: str | None = None,
    ) -> Sandbox:
        """As `Host.create`. Tried again with the same idempotency key where the network fails.

        Errors: SandboxFullError, SandboxStartError, SandboxUnreachableError, UserError.
        """
        asked = _wish(limits, timeout_s, labels, egress)
        about = await self._http.json(
            "POST", "/v1/sandboxes", asked, key=key or secrets.token_hex(16), limit_s=_START_S
        )
        return self._sandbox(about)

    async def bulk_create(self, count: int, **options: Any) -> Sequence[Sandbox]:
        """All, or none and an error."""
        key = options.pop("key", None) or secrets.token_hex(16)
        asked = {
            **_wish(**{"limits": _LIMITS, "timeout_s": 3600.0, "labels": (), "egress": (), **options}),
            "count": count,
        }
        answer = await self._http.json("POST", "/v1/sandboxes/bulk", asked, key=key, limit_s=_START_S)
        return [self._sandbox(about) for about in answer["sandboxes"]]

    async def list(self, *, labels: Sequence[str] = ()) -> Sequence[Sandbox]:
        """Those of this token that have all of `labels`."""
        answer = await self._http.json("GET", f"/v1/sandboxes{_query(labels)}")
        return [self._sandbox(about) for about in answer["sandboxes"]]

    async def bulk_delete(self, *, labels: Sequence[str]) -> int:
        """Those that have all of `labels`; how many they were. Errors: UserError, for none at all."""
        if not labels:
            raise UserError("name the labels of the sandboxes to delete")
        return int((await self._http.json("DELETE", f"/v1/sandboxes{_query(labels)}"))["deleted"])

    async def run_code(
        self,
        code: str | bytes,
        *,
        stdin: str | bytes = "",
        files: Mapping[str, str | bytes] | None = None,
        timeout_s: float = 10.0,
        limits: Limits = _LIMITS,
        max_output: int = MOST_OUTPUT,
        on_output: OnOutput | None = None,
    ) -> Result:
        """As `Host.run_code`; it is not tried again once the service may have begun it.

        Errors: SandboxError: of the machine or the network, not of the program.
        """
        text = code if isinstance(code, bytes) else code.encode("utf-8", "surrogatepass")
        asked: dict[str, Any] = {"code": _text(text), "timeout_s": timeout_s}
        if stdin:
            asked["stdin"] = _text(encoded(stdin))
        if files:
            asked["files"] = {path: _text(encoded(content)) for path, content in files.items()}
        if limits != _LIMITS:
            asked["limits"] = msgspec.to_builtins(limits)
        asked |= {"max_output": max_output} if max_output != MOST_OUTPUT else {}
        limit_s = timeout_s + _QUEUE_S
        if on_output is None:
            return _result(await self._http.ask("POST", "/v1/run", _json(asked), limit_s=limit_s))
        body = _json({**asked, "stream": True})
        header, _ = await self._http.frames("/v1/run", body, on_output, limit_s=limit_s)
        return msgspec.convert(header["result"], Result)

    def _sandbox(self, about: Mapping[str, Any]) -> Sandbox:
        return Sandbox(FarBox(self._http, str(about["id"]), str(about["home"])))

    async def usage(self) -> dict[str, Any]:
        """What this token's tenant has used, from the beginning."""
        return await self._http.json("GET", "/v1/usage")

    async def close(self) -> None:
        await self._http.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Far:
    """What a service says of its backend."""

    def __init__(self, about: Mapping[str, Any]):
        self.name, self.home = str(about["backend"]), str(about["home"])
        self.isolation = Isolation[str(about["isolation"]).upper()]
        self.layers: tuple[str, ...] = tuple(about["layers"])


class FarBox:
    """A sandbox of a service: the connection of `Sandbox`."""

    def __init__(self, http: "_Http", id: str, home: str):
        self._http, self.id, self.home = http, id, home
        self._place = f"/v1/sandboxes/{quote(id, safe='')}"

    async def call(
        self, header: dict[str, Any], body: bytes = b"", *, on_stream: OnOutput | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Errors: SandboxGoneError, SandboxUnreachableError, OSError, ValueError."""
        limit_s = float(header.get("timeout_s") or header.get("wait_s") or 0) + _CALL_S
        answer, data = await self._http.frames(f"{self._place}/call", frame(header, body), on_stream, limit_s=limit_s)
        if "error" in answer:
            raise error_of({**answer, "kind": answer["error"]})
        return answer, data

    async def set_timeout(self, seconds: float) -> None:
        await self._http.json("POST", f"{self._place}/timeout", {"seconds": seconds})

    async def expose(self, port: int) -> Port:
        return msgspec.convert(await self._http.json("POST", f"{self._place}/ports", {"port": port}), Port)

    async def logs(self) -> str:
        return (await self._http.ask("GET", f"{self._place}/logs")).decode()

    async def delete(self) -> None:
        try:
            await self._http.ask("DELETE", self._place)
        except SandboxGoneError:
            pass  # it was deleted before, or has ended


class _Told(Exception):
    """An error that the service told, which may be one of a connection too: no failure of ours to reach it."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class _Http:
    """Requests and their answers; the errors of all: what the service refuses, and SandboxUnreachableError."""

    def __init__(self, url: str, token: str):
        self._url, self._headers = url, {"Authorization": f"Bearer {token}"}
        self._made: aiohttp.ClientSession | None = None

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._made is None:
            self._made = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                headers=self._headers,
            )
        return self._made

    async def json(
        self, method: str, path: str, asked: Any = None, *, key: str | None = None, limit_s: float = _CALL_S
    ) -> Any:
        body = None if asked is None else _json(asked)
        answer = await self.ask(method, path, body, key=key, limit_s=limit_s)
        return msgspec.json.decode(answer)

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        key: str | None = None,
        limit_s: float = _CALL_S,
    ) -> bytes:
        """What may be asked twice is, where the network fails: all but a POST without a key."""
        is_repeatable = method != "POST" or key is not None
        headers = {} if key is None else {"Idempotency-Key": key}

        async def exchange() -> bytes:
            async with self._session.request(method, self._url + path, data=_sent(body), headers=headers) as answer:
                text = await answer.read()
                if answer.status >= 400:
                    raise _Told(heard(answer.status, text, self._url))
                return text

        return await within(limit_s, self._tried(exchange, is_repeatable), waiting_for=f"{self._url}{path}")

    async def frames(
        self, path: str, body: bytes, on_stream: OnOutput | None, *, limit_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """The last frame; those of output before it are told."""

        async def exchange() -> tuple[dict[str, Any], bytes]:
            async with self._session.post(self._url + path, data=_sent(body)) as answer:
                if answer.status >= 400:
                    raise _Told(heard(answer.status, await answer.read(), self._url))
                async for header, data in _frames(answer):
                    if "refused" in header:
                        raise _Told(error_of(header["refused"]))
                    if "stream" not in header:
                        return header, data
                    if on_stream is not None:
                        on_stream(str(header["stream"]), data)
            raise SandboxUnreachableError(f"{self._url} stopped in the middle of an answer")

        return await within(limit_s, self._tried(exchange, False), waiting_for=f"{self._url}{path}")

    async def _tried(self, exchange: Callable[[], Any], is_repeatable: bool) -> Any:
        """What never arrived is always sent again."""
        wait_s = _FIRST_WAIT_S
        for left in range(_TRIES - 1, -1, -1):
            try:
                return await exchange()
            except _Told as told:
                raise told.error from None
            except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                if not left or not (is_repeatable or isinstance(error, aiohttp.ClientConnectorError)):
                    said = str(error) or type(error).__name__
                    raise SandboxUnreachableError(
                        f"the sandbox service {self._url} cannot be reached: {said}"
                    ) from error
            await asyncio.sleep(wait_s)
            wait_s *= 3
        raise AssertionError

    async def close(self) -> None:
        if self._made is not None:
            await self._made.close()
            self._made = None


def _sent(body: bytes | None) -> bytes | io.BytesIO | None:
    """A long one in pieces, between which the loop goes on."""
    return io.BytesIO(body) if body is not None and len(body) > _LONG else body


async def _frames(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
    incoming = bytearray()
    async for piece in answer.content.iter_any():
        incoming += piece
        for one in frames(incoming):
            yield one


def _wish(limits: Limits, timeout_s: float, labels: Sequence[str], egress: Sequence[str]) -> dict[str, Any]:
    asked = {"limits": msgspec.to_builtins(limits), "timeout_s": timeout_s}
    return {**asked, "labels": list(labels), "egress": list(egress)}


def _query(labels: Sequence[str]) -> str:
    return "?" + "&".join(f"label={quote(label, safe='')}" for label in labels) if labels else ""


def _text(content: bytes) -> str | dict[str, str]:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _json(asked: Any) -> bytes:
    return json.dumps(asked, separators=(",", ":")).encode()


def _result(text: bytes) -> Result:
    return msgspec.json.decode(text, type=Result)
