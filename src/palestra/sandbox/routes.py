"""Paths of the service, and what they ask and answer.

Every path below /v1 needs `Authorization: Bearer TOKEN`. Bodies are JSON, but for frames (`call`, and what streams) and
the contents of files.
"""

import asyncio
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping
from math import isfinite
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from pydantic import BaseModel, ValidationError

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, PalestraError, UserError
from palestra.sandbox import refusals
from palestra.sandbox.accounts import Usage
from palestra.sandbox.admission import RefusedError
from palestra.sandbox.agent import MOST_BODY, MOST_HEADER, frame, frames
from palestra.sandbox.asked import (
    MOST_OUTPUT_ASKED,
    AskedPort,
    AskedProgram,
    AskedRun,
    AskedSandbox,
    AskedSandboxes,
    AskedTimeout,
)
from palestra.sandbox.box import OnOutput, result
from palestra.sandbox.holdings import Holding, wish_of
from palestra.sandbox.records import MOST_OUTPUT, Result, SandboxStartError, SandboxUnreachableError
from palestra.sandbox.service import Service
from palestra.sandbox.tenants import Tenant

Act = Callable[[web.Request, Tenant], Awaitable[web.StreamResponse]]
Model = TypeVar("Model", bound=BaseModel)

_CALLS = {
    *("exec", "open", "output", "input", "signal", "forget", "processes"),
    *("write", "read", "list", "remove"),
}
"""What a frame may ask of an agent: nothing that concerns this machine."""
_FRAMES, _JSON = "application/octet-stream", "application/json"
_LONGEST_WAIT_S, _MOST_LISTED, _FILE_CHUNK = 60.0, 10_000, 2**22
_WRITE_S = 60.0
_MOST_KEY = 200


def app(service: Service) -> web.Application:
    routes = _Routes(service)
    made = web.Application(client_max_size=service.settings.most_body_mb * 2**20)
    made.router.add_get("/health", _health)
    made.router.add_get("/ready", routes.ready)
    made.router.add_get("/metrics", routes.metrics)
    one = "/v1/sandboxes/{id}"
    for method, path, act in (
        ("POST", "/v1/run", routes.run),
        ("POST", f"{one}/call", routes.call),
        ("POST", f"{one}/exec", routes.exec),
        ("PUT", one + "/files/{path:.+}", routes.write),
        ("GET", one + "/files/{path:.+}", routes.read),
        ("POST", f"{one}/timeout", routes.timeout),
        ("POST", f"{one}/ports", routes.expose),
        ("GET", f"{one}/logs", routes.logs),
        ("POST", "/v1/sandboxes/bulk", routes.create_many),
        ("POST", "/v1/sandboxes", routes.create),
        ("GET", "/v1/sandboxes", routes.list_all),
        ("DELETE", "/v1/sandboxes", routes.delete_many),
        ("GET", one, routes.show),
        ("DELETE", one, routes.delete),
        ("GET", "/v1/usage", routes.usage),
        ("GET", "/v1/host", routes.about),
        ("*", "/{rest:.*}", routes.unknown),
    ):
        made.router.add_route(method, path, routes.answering(act))
    return made


async def _health(_: web.Request) -> web.Response:
    """It lives."""
    return _json({"status": "ok"})


class _Routes:
    def __init__(self, service: Service):
        self._service = service
        self._most_body = service.settings.most_body_mb * 2**20

    def answering(self, act: Act) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """With the errors of `act` as answers."""

        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                tenant = self._service.tenants.of(request.headers.get("Authorization", ""))
                if tenant is None:
                    raise refusals.TokenError("no tenant has this token; send `Authorization: Bearer TOKEN`")
                return await act(request, tenant)
            except (PalestraError, OSError, ValueError) as error:
                return self._refused(error)
            except web.HTTPRequestEntityTooLarge:
                return self._refused(self._too_long())
            except web.HTTPException:
                raise
            except Exception:
                traceback.print_exc()
                return self._refused(PalestraError("this is a bug of palestra, which the service's log tells"))

        return answer

    def _refused(self, error: Exception) -> web.Response:
        status, body, headers = refusals.told(error)
        if status in (401, 413, 429, 503):
            reason = error.reason if isinstance(error, RefusedError) else body["error"]["kind"]
            self._service.metrics.refused(reason)
        answer = _json(body, status=status, headers=headers)
        if status == 413:
            answer.force_close()  # what it goes on sending is not read
        return answer

    def _too_long(self) -> Exception:
        most = self._service.settings.most_body_mb
        return refusals.TooLongError(f"the body is above {most} MiB; send it in parts")

    async def _body(self, request: web.Request) -> bytes:
        """Errors: TooLongError."""
        if (request.content_length or 0) > self._most_body:
            raise self._too_long()
        return await within(_WRITE_S, request.read(), waiting_for="the rest of a request")

    async def _asked(self, model: type[Model], request: web.Request) -> Model:
        """Errors: UserError."""
        try:
            return model.model_validate_json(await self._body(request) or b"{}")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            raise UserError(f"{where}: {first['msg']}; got {str(first['input'])[:100]!r}") from None

    def _holding(self, request: web.Request, tenant: Tenant) -> Holding:
        return self._service.holdings.find(tenant, request.match_info["id"])

    # --- the service

    async def ready(self, _: web.Request) -> web.Response:
        is_draining = self._service.is_draining
        return _json({"status": "draining" if is_draining else "ok"}, status=503 if is_draining else 200)

    async def metrics(self, _: web.Request) -> web.Response:
        self._service.metrics.waiting.set(self._service.turns.num_waiting)
        return web.Response(body=self._service.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def usage(self, _: web.Request, tenant: Tenant) -> web.Response:
        self._service.holdings.beat()
        return _json(msgspec.to_builtins(self._service.accounts.of(tenant.name)) | {"tenant": tenant.name})

    async def about(self, _: web.Request, __: Tenant) -> web.Response:
        backend = self._service.host.backend
        about = {"backend": backend.name, "isolation": backend.isolation.name.lower(), "layers": backend.layers}
        return _json({**about, "home": backend.home, "most_body_mb": self._service.settings.most_body_mb})

    async def unknown(self, request: web.Request, _: Tenant) -> web.Response:
        raise refusals.UnknownError(f"there is no {request.method} {request.path}")

    # --- sandboxes

    async def create(self, request: web.Request, tenant: Tenant) -> web.Response:
        asked = await self._asked(AskedSandbox, request)
        self._service.require_open()
        made = await self._service.holdings.create(tenant, asked, key=_key(request))
        return _json(made[0].about(), status=201)

    async def create_many(self, request: web.Request, tenant: Tenant) -> web.Response:
        asked = await self._asked(AskedSandboxes, request)
        self._service.require_open()
        made = await self._service.holdings.create(tenant, wish_of(asked), count=asked.count, key=_key(request))
        return _json({"sandboxes": [holding.about() for holding in made]}, status=201)

    async def list_all(self, request: web.Request, tenant: Tenant) -> web.Response:
        found = self._service.holdings.all_of(tenant, request.query.getall("label", []))
        return _json({"sandboxes": [holding.about() for holding in found]})

    async def delete_many(self, request: web.Request, tenant: Tenant) -> web.Response:
        labels = request.query.getall("label", [])
        if not labels:
            raise UserError("name labels of the sandboxes to delete: ?label=NAME")
        doomed = self._service.holdings.all_of(tenant, labels)
        await asyncio.gather(*(self._service.holdings.delete(holding) for holding in doomed))
        return _json({"deleted": len(doomed)})

    async def show(self, request: web.Request, tenant: Tenant) -> web.Response:
        return _json(self._holding(request, tenant).about())

    async def delete(self, request: web.Request, tenant: Tenant) -> web.Response:
        """Twice is fine."""
        try:
            await self._service.holdings.delete(self._holding(request, tenant))
        except refusals.UnknownError:
            raise
        except refusals.SandboxGoneError:
            pass
        return web.Response(status=204)

    async def timeout(self, request: web.Request, tenant: Tenant) -> web.Response:
        asked, holding = await self._asked(AskedTimeout, request), self._holding(request, tenant)
        await self._service.holdings.set_timeout(holding, asked.seconds)
        return _json(holding.about())

    async def expose(self, request: web.Request, tenant: Tenant) -> web.Response:
        asked, holding = await self._asked(AskedPort, request), self._holding(request, tenant)
        return _json(msgspec.to_builtins(await holding.box.expose(asked.port)))

    async def logs(self, request: web.Request, tenant: Tenant) -> web.Response:
        return web.Response(text=await self._holding(request, tenant).box.logs())

    # --- programs

    async def run(self, request: web.Request, tenant: Tenant) -> web.StreamResponse:
        asked = await self._asked(AskedRun, request)
        if asked.stream:
            return await _streamed(request, lambda on_output: self._ran_in_frame(request, tenant, asked, on_output))
        end = await self._ran(request, tenant, asked, None)
        return web.Response(body=_encode(end), content_type=_JSON)

    async def _ran_in_frame(self, request: web.Request, tenant: Tenant, asked: AskedRun, on_output: OnOutput) -> bytes:
        return frame({"result": msgspec.to_builtins(await self._ran(request, tenant, asked, on_output))})

    async def _ran(self, request: web.Request, tenant: Tenant, asked: AskedRun, on_output: OnOutput | None) -> Result:
        limits = asked.limits.limits()
        self._require_short(asked.timeout_s)

        async def act() -> Result:
            if request.transport is None or request.transport.is_closing():
                raise SandboxUnreachableError("whoever asked is gone; the program did not begin")
            try:
                return await self._service.host.run_code(
                    asked.code.decode("utf-8", "surrogateescape"),
                    stdin=asked.stdin,
                    files=asked.files,
                    timeout_s=asked.timeout_s,
                    limits=limits,
                    max_output=asked.max_output,
                    on_output=on_output,
                )
            except OSError as error:
                raise SandboxStartError(f"a sandbox could not be made: {error}") from error

        return await self._service.run(tenant, limits, act)

    def _require_short(self, timeout_s: float) -> None:
        most = self._service.settings.most_program_s
        if not 0 < timeout_s <= most:
            raise UserError(f"timeout_s={timeout_s:g} of a program must be above 0 and at most {most:g}")

    async def exec(self, request: web.Request, tenant: Tenant) -> web.Response:
        asked, holding = await self._asked(AskedProgram, request), self._holding(request, tenant)
        command = ["/bin/sh", "-c", asked.command] if isinstance(asked.command, str) else list(asked.command)
        header = {"do": "exec", "argv": command, "cwd": asked.cwd, "env": asked.env}
        header |= {"timeout_s": asked.timeout_s, "most": asked.max_output}
        answer, body = await self._called(holding, self._bounded(header), asked.stdin, None)
        return web.Response(body=_encode(result(answer, body)), content_type=_JSON)

    async def call(self, request: web.Request, tenant: Tenant) -> web.StreamResponse:
        """A frame for a frame."""
        holding = self._holding(request, tenant)
        header, body = _frame_of(await self._body(request))
        header = self._bounded(header)
        if header["do"] == "exec" and header.get("stream"):
            return await _streamed(request, lambda on_output: self._framed(holding, header, body, on_output))
        return web.Response(body=await self._framed(holding, header, body, None), content_type=_FRAMES)

    async def _framed(self, holding: Holding, header: dict[str, Any], body: bytes, on_output: OnOutput | None) -> bytes:
        """What the agent refuses is an answer of it too."""
        try:
            return frame(*await self._called(holding, header, body, on_output))
        except (OSError, ValueError) as error:
            return frame(refusals.as_answer(error))

    def _bounded(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """What an agent may be asked, within limits. Errors: ValueError, UserError."""
        do = header.get("do")
        if do not in _CALLS:
            raise ValueError(f"do={do!r} is none of {', '.join(sorted(_CALLS))}")
        bounded = dict(header)
        if do == "exec":
            bounded["timeout_s"] = _number(header, "timeout_s", 30.0)
            self._require_short(bounded["timeout_s"])
        elif do == "open":
            bounded.pop("timeout_s", None)
        if do in ("exec", "open", "output"):
            bounded["most"] = int(min(_number(header, "most", MOST_OUTPUT), MOST_OUTPUT_ASKED))
        if do == "output":
            bounded["wait_s"] = min(_number(header, "wait_s", 0.0), _LONGEST_WAIT_S)
        elif do == "list":
            bounded["most"] = int(min(_number(header, "most", _MOST_LISTED), _MOST_LISTED))
        return bounded

    async def _called(
        self, holding: Holding, header: dict[str, Any], body: bytes, on_output: OnOutput | None
    ) -> tuple[dict[str, Any], bytes]:
        if header["do"] == "open":
            self._service.require_open()
            answer = await holding.box.call(header, body)
            self._service.accounts.add(holding.tenant.name, Usage(programs={"opened": 1}))
            return answer
        if header["do"] != "exec":
            return await holding.box.call(header, body)
        self._service.began()
        try:
            answer, data = await holding.box.call(header, body, on_stream=on_output)
            self._service.account_program(holding.tenant, result(answer, b""))
            return answer, data
        finally:
            self._service.ended()

    # --- files

    async def write(self, request: web.Request, tenant: Tenant) -> web.Response:
        holding = self._holding(request, tenant)
        await holding.sandbox.write(request.match_info["path"], await self._body(request))
        return web.Response(status=204)

    async def read(self, request: web.Request, tenant: Tenant) -> web.StreamResponse:
        """In pieces, so that no file is in memory as a whole."""
        sandbox, path = self._holding(request, tenant).sandbox, request.match_info["path"]
        piece, at = await sandbox.read(path, 0, _FILE_CHUNK), 0
        if len(piece) < _FILE_CHUNK:
            return web.Response(body=piece, content_type=_FRAMES)
        answer = web.StreamResponse(headers={"Content-Type": _FRAMES})
        await answer.prepare(request)
        while piece:
            await within(_WRITE_S, answer.write(piece), waiting_for="a client to take a file")
            at += len(piece)
            piece = await sandbox.read(path, at, _FILE_CHUNK) if len(piece) == _FILE_CHUNK else b""
        return answer


async def _streamed(request: web.Request, act: Callable[[OnOutput], Awaitable[bytes]]) -> web.StreamResponse:
    """Frames of output as they come, then what `act` returns, or what it is refused for.

    A client that is gone ends nothing: what it asked for runs to its end, and is accounted for.
    """
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    answer = web.StreamResponse(headers={"Content-Type": _FRAMES})
    acting = asyncio.ensure_future(act(lambda name, data: pieces.put_nowait(frame({"stream": name}, data))))
    acting.add_done_callback(lambda _: pieces.put_nowait(b""))
    try:
        await answer.prepare(request)
        while piece := await pieces.get():
            await within(_WRITE_S, answer.write(piece), waiting_for="a client to take what a program said")
        await within(_WRITE_S, answer.write(await _last(acting)), waiting_for="a client to take a result")
    except (ConnectionError, DeadlineError):
        await _last(acting)
    return answer


async def _last(acting: Awaitable[bytes]) -> bytes:
    try:
        return await acting
    except (PalestraError, OSError, ValueError) as error:
        return frame({"refused": refusals.told(error)[1]["error"]})


def _frame_of(body: bytes) -> tuple[dict[str, Any], bytes]:
    """Errors: ValueError, if it is not one frame."""
    if len(body) > MOST_HEADER + MOST_BODY:
        raise ValueError("a frame that is too long")
    buffer = bytearray(body)
    found = list(frames(buffer))
    if len(found) != 1 or buffer:
        raise ValueError(f"the body is {len(found)} frames and {len(buffer)} bytes; send one frame")
    return found[0]


def _number(header: Mapping[str, Any], name: str, default: float) -> float:
    """Errors: ValueError."""
    given = header.get(name, default)
    if isinstance(given, bool) or not isinstance(given, int | float) or not isfinite(given) or given < 0:
        raise ValueError(f"{name}={given!r} must be a number from 0 on")
    return given


def _key(request: web.Request) -> str | None:
    """Errors: UserError."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 0 < len(key) <= _MOST_KEY:
        raise UserError(f"an Idempotency-Key has 1 to {_MOST_KEY} characters, not {len(key)}")
    return key


_encode = msgspec.json.Encoder().encode


def _json(body: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    text = json.dumps(body, default=msgspec.to_builtins).encode()
    return web.Response(body=text, status=status, headers=headers, content_type=_JSON)
