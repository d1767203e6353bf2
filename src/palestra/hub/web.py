"""The application: pages and their JSON twins from one table, events, files of the package."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from palestra.core.errors import DeadlineError, UserError
from palestra.hub import openapi, words
from palestra.hub.guard import Guard
from palestra.hub.library import UnknownRunError
from palestra.hub.pages import PAGES, NotFoundError, Page
from palestra.hub.queries import Events
from palestra.hub.site import Site
from palestra.hub.watch import FullError, Subscription

_HERE = Path(__file__).parent
_HEARTBEAT_S = 15.0  # a connection that is gone is noticed by it
_encode = msgspec.json.Encoder().encode


def application(site: Site, names: frozenset[str] = frozenset({"localhost"})) -> Starlette:
    """`names`: what this server may be called besides by its address."""
    templates = make_templates()
    routes: list[BaseRoute] = [Route("/", lambda _: RedirectResponse("/runs")), Route("/openapi.json", _openapi)]
    routes.append(Route("/events", _events(site)))
    for page in PAGES:
        routes.append(Route(f"{page.path}.json", _twin(site, page)))
    for page in PAGES:
        routes.append(Route(page.path, _page(site, page, templates)))
    routes.append(Mount("/static", StaticFiles(directory=_HERE / "static")))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with site:
            yield

    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, names=names), Middleware(GZipMiddleware, minimum_size=2000, compresslevel=4)],
        exception_handlers={HTTPException: _problem(templates), Exception: _problem(templates)},
    )


def make_templates() -> Environment:
    """Of all pages: everything is escaped, and a name that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= words.FILTERS
    environment.globals |= words.GLOBALS
    return environment


# --- pages


async def _answer(site: Site, page: Page, request: Request) -> tuple[Any, Any]:
    """The query and the answer. Errors: HTTPException."""
    query = _query(page.query, request)
    path = {name: str(value) for name, value in request.path_params.items()}
    try:
        if "run" in path:
            run = await asyncio.to_thread(site.library.open, path["run"])
            site.prepare(run)
            if page.needs_index:
                await site.ready(run)
        return query, await asyncio.to_thread(page.view, site.library, path, query)
    except (UnknownRunError, NotFoundError) as error:
        raise HTTPException(404, str(error)) from None
    except UserError as error:
        raise HTTPException(400, str(error)) from None


def _query(kind: Any, request: Request) -> Any:
    """An empty parameter is one that was not given: forms send all of theirs. Errors: HTTPException."""
    given = {name: value for name, value in request.query_params.items() if value != ""}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise HTTPException(400, f"{found}; known are {', '.join(kind.model_fields) or 'none'}") from None


def _twin(site: Site, page: Page) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        _, found = await _answer(site, page, request)
        return Response(_encode(found), media_type="application/json")

    return answer


def _page(site: Site, page: Page, templates: Environment) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        query, found = await _answer(site, page, request)
        text = templates.get_template(page.template).render(
            page=found,
            query=query,
            title=page.title,
            request=request,
            path=request.path_params,
            run_id=_run_id(request),
        )
        return HTMLResponse(text)

    return answer


def _run_id(request: Request) -> str:
    return str(request.path_params.get("run", ""))


def _problem(templates: Environment) -> Callable[[Request, Exception], Response]:
    def answer(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = str(error.detail) if isinstance(error, HTTPException) else f"{type(error).__name__}: {error}"
        if request.url.path.endswith(".json"):
            return Response(_encode({"error": text}), status, media_type="application/json")
        page = templates.get_template("problem.html").render(
            status=status, text=text, title="Not this way", run_id="", request=request
        )
        return HTMLResponse(page, status)

    return answer


async def _openapi(_: Request) -> Response:
    return Response(_encode(openapi.document()), media_type="application/json")


# --- events


def _events(site: Site) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        query: Events = _query(Events, request)
        try:
            subscription = site.watch.subscribe(query.run)
        except FullError as error:
            return Response(str(error), 503, {"retry-after": "30"}, media_type="text/plain")
        return StreamingResponse(
            _told(site, subscription), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )

    return answer


async def _told(site: Site, subscription: Subscription) -> AsyncIterator[bytes]:
    """A line for every change, and a comment now and then: whoever is gone is noticed when it is written to."""
    try:
        yield b"retry: 3000\n\n"
        while not subscription.is_closed:
            try:
                changed = await subscription.next(_HEARTBEAT_S)
            except DeadlineError:
                yield b": still here\n\n"
                continue
            for run_id, kinds in changed.items():
                yield b"data: " + _encode({"run": run_id, "changed": sorted(kinds)}) + b"\n\n"
    finally:
        site.watch.leave(subscription)
