"""`/{owner}/legacy/` and `/{owner}/{environment}/legacy/`: what twine, `uv publish` and `palestra hub push` speak.

Consumes: requests. Produces: versions. Waits for: a place among `max_pushes`, not at all: who finds none comes again.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.hub.registry import access, publish, receive
from palestra.hub.registry.blobs import Incoming, TooLargeError
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.publish import Pushed, Wish
from palestra.hub.registry.rights import UnknownTokenError, Who

_LINGER_S = 10.0  # that the rest of a refused upload is read and thrown away, so that its client reads why
_PUBLISH_S = 600.0


class Taking:
    """`most` uploads at once; the next is told to come again. `what` says of a number of them that they are here."""

    def __init__(self, hub: Hub, threads: ThreadPoolExecutor, *, most: int, what: str):
        self._hub, self._threads, self._most, self._what, self._num = hub, threads, most, what, 0

    async def _answer(self, request: Request) -> Response:
        if self._num >= self._most:
            return Refused(503, f"{self._num} {self._what}; come again in a few seconds", request)
        self._num += 1
        try:
            pushed = await self._taken(request)
        except (UserError, InfrastructureError) as error:
            from palestra.hub.registry.web import status_of

            return Refused(*status_of(error), request)
        finally:
            self._num -= 1
        return Response(msgspec.json.encode(pushed), media_type="application/json")

    async def _taken(self, request: Request) -> Any:
        """What is answered. Errors: UserError of some kind, InfrastructureError."""
        raise NotImplementedError


class Uploads(Taking):
    def __init__(self, hub: Hub, threads: ThreadPoolExecutor):
        super().__init__(hub, threads, most=hub.settings.max_pushes, what="uploads are under way")

    def routes(self) -> list[Route]:
        paths = (
            "/{owner}/legacy",
            "/{owner}/legacy/",
            "/{owner}/{environment}/legacy",
            "/{owner}/{environment}/legacy/",
        )
        return [Route(path, self._answer, methods=["POST"]) for path in paths]

    async def _taken(self, request: Request) -> Pushed:
        """Errors: UserError of some kind, InfrastructureError."""
        hub, owner = self._hub, request.path_params["owner"]
        environment = request.path_params.get("environment", "")
        who = await asyncio.to_thread(self._allowed, request, Wish(owner, environment, ""))
        announced = request.headers.get("content-length", "")
        most = hub.settings.max_upload_bytes
        if announced.isdigit() and int(announced) > most + receive.FORM_BYTES:
            raise TooLargeError(f"{announced} bytes; at most {most} are taken")
        with Incoming(hub.settings.incoming, most) as incoming:
            form = await receive.form(request, incoming, deadline_s=hub.settings.push_s)
            wish = _wish(owner, environment, form)
            assert form.received is not None
            pushing = partial(publish.push, hub, who, wish, form.received)
            work = asyncio.get_running_loop().run_in_executor(self._threads, pushing)
            try:
                return await asyncio.wait_for(asyncio.shield(work), timeout=_PUBLISH_S)
            except TimeoutError:
                raise DeadlineError("the upload to be looked through", _PUBLISH_S) from None

    def _allowed(self, request: Request, wish: Wish) -> Who:
        who = access.identify(self._hub, request)
        if not who.is_known or who.csrf:
            raise UnknownTokenError("an upload needs a token: user __token__, and the token as the password")
        publish.check_place(self._hub, who, wish)
        return who


def _wish(owner: str, environment: str, form: receive.Form) -> Wish:
    """Errors: UserError."""
    action = form.fields.get(":action", "")
    if action != "file_upload":
        raise UserError(f":action is {action[:40]!r}; this address takes file_upload")
    if not form.filename:
        raise UserError("the form has no file in a field called content")
    return Wish(
        owner=owner,
        environment=environment,
        filename=form.filename,
        sha256=form.fields.get("sha256_digest", ""),
        name=form.fields.get("name", ""),
        version=form.fields.get("version", ""),
        visibility="private" if form.fields.get("palestra_visibility") == "private" else "",
    )


class Refused(Response):
    """Says why, and reads on for a while: clients send all before they read."""

    def __init__(self, status: int, text: str, request: Request):
        headers = {"connection": "close"} | (access.CHALLENGE if status == 401 else {})
        headers |= {"retry-after": "5"} if status == 503 else {}
        super().__init__(msgspec.json.encode({"error": text}), status, headers, media_type="application/json")
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_LINGER_S):
                async for _ in self._request.stream():
                    pass
        except (TimeoutError, ClientDisconnect, RuntimeError):
            pass  # long enough, or gone, or read already
        await send({"type": "http.response.body", "body": b"", "more_body": False})
