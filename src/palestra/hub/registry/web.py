"""The application: pages and twins, actions, uploads, the index and its files, all from tables or named below."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from jinja2 import Environment
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from palestra.core.errors import InfrastructureError, UserError
from palestra.hub.evals.uploads import EvaluationUploads
from palestra.hub.guard import Guard
from palestra.hub.registry import access, answers, audit, delivery, description, rights
from palestra.hub.registry.actions import ACTIONS
from palestra.hub.registry.ask import Action, Ask, Page
from palestra.hub.registry.blobs import MissingBlobError, TooLargeError
from palestra.hub.registry.database import ClashError, DatabaseError
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.pages import PAGES
from palestra.hub.registry.publish import TakenError
from palestra.hub.registry.receive import SlowError
from palestra.hub.registry.rights import ANYBODY, NotAllowedError, NotFoundError, UnknownTokenError, Who
from palestra.hub.registry.uploads import Uploads
from palestra.hub.web import make_templates

_HERE = Path(__file__).parent.parent
_MAX_BODY = 64 << 10
_MAX_FIELDS = 100
_BODY_S = 30.0
_FLUSH_S = 5.0
_METHODS = frozenset({"GET", "HEAD", "POST"})
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UnknownTokenError, 401),
    (NotAllowedError, 403),
    (NotFoundError, 404),
    (MissingBlobError, 404),
    (SlowError, 408),
    (TakenError, 409),
    (ClashError, 409),
    (TooLargeError, 413),
    (UserError, 400),
    (InfrastructureError, 503),
)
_encode = msgspec.json.Encoder().encode
Answering = Callable[[Request], Awaitable[Response]]


def application(
    hub: Hub, names: frozenset[str] = frozenset({"localhost"}), *, first: Sequence[BaseRoute] = ()
) -> Starlette:
    """`names`: what this server may be called besides by its address. `first`: routes before all others."""
    threads = ThreadPoolExecutor(4, thread_name_prefix="push")
    templates = _templates()
    shown = [Middleware(GZipMiddleware, minimum_size=2000, compresslevel=4)]
    routes: list[BaseRoute] = [*first, Route("/", _home), Route("/openapi.json", _openapi)]
    routes.append(Mount("/static", StaticFiles(directory=_HERE / "static")))
    routes += [Route("/api/login", _login(hub), methods=["POST"]), Route("/api/logout", _logout(hub), methods=["POST"])]
    routes += [Route(one.path, _action(hub, one, templates), methods=["POST"]) for one in ACTIONS]
    routes += Uploads(hub, threads).routes()
    routes += EvaluationUploads(hub, threads).routes()
    routes += delivery.routes(hub)
    routes += [Route(f"{page.path}.json", _twin(hub, page), middleware=shown) for page in PAGES]
    routes += [Route(page.path, _page(hub, page, templates), middleware=shown) for page in PAGES]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with _flushing(hub):
            yield
        threads.shutdown(wait=False)

    problem = _problem(templates)
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, names=names, methods=_METHODS, called="hub"), Middleware(_OnlyText)],
        exception_handlers=dict.fromkeys((HTTPException, UserError, InfrastructureError, Exception), problem),
    )


class _OnlyText:
    """Refuses addresses with a zero byte: no name has one, and PostgreSQL takes none."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and "\0" in scope["path"]:
            app = Response(_encode({"error": "a zero byte is no text"}), 400, media_type="application/json")
        await app(scope, receive, send)


@asynccontextmanager
async def _flushing(hub: Hub) -> AsyncIterator[None]:
    """Writes counts now and then, and at the end."""
    over = asyncio.Event()

    async def flush() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), timeout=_FLUSH_S)
            with contextlib.suppress(Exception):  # they wait for the next time
                await asyncio.to_thread(hub.counts.flush)

    task = asyncio.create_task(flush())
    try:
        yield
    finally:
        over.set()
        await asyncio.wait({task}, timeout=10)


_templates = lru_cache(maxsize=1)(make_templates)


async def _home(_: Request) -> Response:
    return RedirectResponse("/environments")


async def _openapi(_: Request) -> Response:
    return Response(_encode(description.document()), media_type="application/json")


# --- pages


def _asked(hub: Hub, who: Who, request: Request, query: Any) -> Ask:
    path = {name: str(value) for name, value in request.path_params.items()}
    return Ask(hub=hub, who=who, path=path, query=query, url=address_of(hub, request))


def address_of(hub: Hub, request: Request) -> str:
    """What it is called, without / at its end."""
    return hub.settings.url.rstrip("/") or str(request.base_url).rstrip("/")


def _viewed(hub: Hub, page: Page, request: Request) -> tuple[Who, Any, Any]:
    """In a thread: who asks, the query, the answer."""
    query = parsed(page.query, dict(request.query_params))
    who = access.identify(hub, request)
    return who, query, page.view(_asked(hub, who, request, query))


def parsed(kind: Any, given: dict[str, Any]) -> Any:
    """An empty parameter is one that was not given: forms send all of theirs. Errors: UserError."""
    try:
        return kind.model_validate({name: value for name, value in given.items() if value != ""})
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise UserError(f"{found}; known are {', '.join(kind.model_fields) or 'none'}") from None


def _twin(hub: Hub, page: Page) -> Answering:
    async def answer(request: Request) -> Response:
        _, _, found = await asyncio.to_thread(_viewed, hub, page, request)
        return Response(_encode(found), media_type="application/json")

    return answer


def _page(hub: Hub, page: Page, templates: Environment) -> Answering:
    template = templates.get_template(page.template)

    def rendered(request: Request) -> str:
        who, query, found = _viewed(hub, page, request)
        return template.render(page=found, query=query, title=page.title, who=who, request=request)

    async def answer(request: Request) -> Response:
        return HTMLResponse(await asyncio.to_thread(rendered, request))

    return answer


# --- actions


def _action(hub: Hub, action: Action, templates: Environment) -> Answering:
    def act(request: Request, given: dict[str, Any], is_form: bool) -> Response:
        who = access.identify(hub, request)
        if not who.is_known:
            raise UnknownTokenError("this needs a token: Authorization: Bearer TOKEN")
        next_page = str(given.pop("next", "")) if is_form else ""
        csrf = str(given.pop("csrf", "")) if is_form else request.headers.get("x-csrf-token", "")
        access.check_csrf(request, who, csrf)
        found = action.act(_asked(hub, who, request, parsed(action.body, given)))
        if not is_form:
            return Response(_encode(found), media_type="application/json")
        if isinstance(found, answers.Token):
            text = templates.get_template("hub/token.html").render(page=found, title="Token", who=who, request=request)
            return HTMLResponse(text)
        return RedirectResponse(_inside(next_page), status_code=303)

    async def answer(request: Request) -> Response:
        given, is_form = await _body(request)
        return await asyncio.to_thread(act, request, given, is_form)

    return answer


async def _body(request: Request) -> tuple[dict[str, Any], bool]:
    """The fields, and whether a form had them. Errors: UserError, TooLargeError, SlowError."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.stream():
                content += piece
                if len(content) > _MAX_BODY:
                    raise TooLargeError(f"a body of more than {_MAX_BODY} bytes")
    except TimeoutError:
        raise SlowError(f"the body did not come within {_BODY_S:g} s") from None
    if kind == "application/x-www-form-urlencoded":
        try:
            said = parse_qsl(content.decode(errors="replace"), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
        except ValueError:
            raise UserError(f"a form of more than {_MAX_FIELDS} fields") from None
        return dict(said), True
    if not content:
        return {}, False
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise UserError("the body is no JSON") from None
    if not isinstance(found, dict):
        raise UserError("the body is no JSON object")
    return found, False


def _inside(address: str) -> str:
    """Only to a page of the hub."""
    return address if address.startswith("/") and not address.startswith(("//", "/\\")) else "/environments"


def _login(hub: Hub) -> Answering:
    """A token becomes a cookie that scripts cannot read, and that no other site can send along."""

    def begin(request: Request, given: dict[str, Any]) -> Response:
        access.check_origin(request)
        with hub.database.write() as connection:
            who = rights.who_has(connection, str(given.get("token", "")).strip())
            cookie = rights.begin_session(connection, who)
            address = request.client.host if request.client else ""
            audit.record(connection, replace(who, address=address), "session.begin", who.name)
        response = RedirectResponse(_inside(str(given.get("next", ""))), status_code=303)
        is_secure = address_of(hub, request).startswith("https:")
        response.set_cookie(
            access.COOKIE, cookie, max_age=int(rights.SESSION_S), httponly=True, samesite="lax", secure=is_secure
        )
        return response

    async def answer(request: Request) -> Response:
        given, _ = await _body(request)
        return await asyncio.to_thread(begin, request, given)

    return answer


def _logout(hub: Hub) -> Answering:
    def end(request: Request, given: dict[str, Any]) -> Response:
        cookie = request.cookies.get(access.COOKIE, "")
        with hub.database.write() as connection:
            who = rights.who_has_session(connection, cookie)
            if who.is_known:
                access.check_csrf(request, who, str(given.get("csrf", "")))
                rights.end_session(connection, cookie)
        response = RedirectResponse("/environments", status_code=303)
        response.delete_cookie(access.COOKIE)
        return response

    async def answer(request: Request) -> Response:
        given, _ = await _body(request)
        return await asyncio.to_thread(end, request, given)

    return answer


# --- what cannot be answered


def _problem(templates: Environment) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        status, text = status_of(error)
        headers: dict[str, str] = {}
        path = request.url.path
        if status == 503:
            headers["retry-after"] = "5"
        if request.method == "POST" or path.endswith(".json"):
            headers |= access.CHALLENGE if status == 401 else {}
            return Response(_encode({"error": text}), status, headers, media_type="application/json")
        page = templates.get_template("hub/problem.html").render(
            status=status, text=text, title="Not this way", who=ANYBODY, request=request
        )
        return HTMLResponse(page, status, headers)

    return answer


def status_of(error: Exception) -> tuple[int, str]:
    """An error that was not raised on purpose is not told to those who ask, nor where the database is."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, DatabaseError):
        return 503, "the hub's database does not answer; come again"
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status, str(error)
    return 500, "the hub failed at this; its log says why"
