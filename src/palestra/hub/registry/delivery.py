"""The index of an environment and its files, as pip and uv ask for them.

Somebody without a token is asked for one, whether there is such an environment or not; somebody whose token has no
right there finds nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, BinaryIO

from sqlalchemy import Connection, Row, select
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from palestra.hub.registry import access, rights, simple
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.names import normalised
from palestra.hub.registry.rights import NotFoundError, UnknownTokenError, Who
from palestra.hub.registry.schema import files

_PIECE = 256 << 10
_FOREVER = "max-age=31536000, immutable"
Answering = Callable[[Request], Awaitable[Response]]


def routes(hub: Hub) -> list[Route]:
    index = simple.Index()
    environment = "/{owner}/{environment}"

    def answered(view: Callable[[Hub, Request, Any], Response]) -> Answering:
        async def answer(request: Request) -> Response:
            return await asyncio.to_thread(_bounded, hub, request, view, index)

        return answer

    return [
        Route(f"{environment}/simple", _with_slash),
        Route(f"{environment}/simple/", answered(_projects)),
        Route(f"{environment}/simple/{{project}}", _with_slash),
        Route(f"{environment}/simple/{{project}}/", answered(_project)),
        Route(f"{environment}/files/{{sha256}}/{{filename}}", answered(_file)),
    ]


async def _with_slash(request: Request) -> Response:
    return RedirectResponse(request.url.path + "/", status_code=301)


def _bounded(
    hub: Hub, request: Request, view: Callable[[Hub, Request, Any], Response], index: simple.Index
) -> Response:
    """Tools read lines of text, not pages."""
    try:
        return view(hub, request, index)
    except NotFoundError as error:
        return PlainTextResponse(f"{error}\n", 404)
    except UnknownTokenError as error:
        return PlainTextResponse(f"{error}\n", 401, access.CHALLENGE)


def _environment(connection: Connection, who: Who, request: Request) -> tuple[Row[Any], bool]:
    """Its row, and whether everybody may see it. Errors: NotFoundError, UnknownTokenError."""
    path = request.path_params
    try:
        row = rights.environment(connection, who, path["owner"], path["environment"])
    except NotFoundError:
        if who.is_known:
            raise
        raise UnknownTokenError("this needs a token: user __token__, and the token as the password") from None
    return row, row.visibility == "public"


def _projects(hub: Hub, request: Request, _: simple.Index) -> Response:
    if (kind := simple.wanted(request.headers.get("accept", ""))) is None:
        return _not_acceptable()
    who = access.identify(hub, request)
    with hub.database.read() as connection:
        row, is_public = _environment(connection, who, request)
    return Response(simple.projects(row, kind), headers=_cached(is_public), media_type=kind)


def _project(hub: Hub, request: Request, index: simple.Index) -> Response:
    if (kind := simple.wanted(request.headers.get("accept", ""))) is None:
        return _not_acceptable()
    path = request.path_params
    who = access.identify(hub, request)
    with hub.database.read() as connection:
        row, is_public = _environment(connection, who, request)
        project = normalised(path["project"])
        if project != row.project or not project:
            return PlainTextResponse(f"this index has {row.project or 'nothing yet'} alone\n", 404)
        if project != path["project"]:
            return RedirectResponse(f"/{path['owner']}/{path['environment']}/simple/{project}/", status_code=301)
        found = index.project(connection, row, f"/{row.owner}/{row.name}", kind)
    headers = _cached(is_public) | {"etag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers | {"content-type": found.kind})


def _cached(is_public: bool) -> dict[str, str]:
    """Clients ask again each time, and are told if nothing has changed."""
    kept = "public, no-cache" if is_public else "private, no-cache"
    return {"cache-control": kept, "vary": "accept, authorization"}


def _not_acceptable() -> Response:
    return PlainTextResponse(f"there are {simple.JSON}, {simple.HTML} and text/html\n", 406)


def _file(hub: Hub, request: Request, _: simple.Index) -> Response:
    path = request.path_params
    name = path["filename"]
    who = access.identify(hub, request)
    with hub.database.read() as connection:
        row, is_public = _environment(connection, who, request)
        where = (files.c.environment_id == row.id, files.c.sha256 == path["sha256"])
        named = files.c.filename.in_([name, name.removesuffix(".metadata")])
        found = connection.execute(select(files).where(*where, named)).first()
    if found is None:
        raise NotFoundError(f"{row.owner}/{row.name} has no such file")
    is_metadata = name != found.filename
    sha256 = found.metadata_sha256 if is_metadata else found.sha256
    headers = {"cache-control": f"{'public' if is_public else 'private'}, {_FOREVER}", "etag": f'"{sha256}"'}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    content = hub.blobs.open(sha256)
    if is_metadata:
        with content:
            return Response(content.read(), headers=headers, media_type="application/octet-stream")
    headers |= {"content-length": str(found.size), "content-disposition": f'attachment; filename="{found.filename}"'}
    if request.method == "HEAD":
        content.close()
        return Response(headers=headers, media_type="application/octet-stream")
    hub.counts.add(found.id)
    return StreamingResponse(_pieces(content), headers=headers, media_type="application/octet-stream")


async def _pieces(content: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(content.read, _PIECE):
            yield piece
    finally:
        content.close()
