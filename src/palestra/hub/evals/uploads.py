"""POST `/{owner}/{environment}/evaluations`: an archive, as the body of a request.

Consumes: requests. Produces: evaluations. Waits for: the next piece, at most `_SILENCE_S`; all of it, at most the hub's
deadline; for a place among those at once, not at all: who finds none comes again.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route

from palestra.core.errors import DeadlineError, UserError
from palestra.hub.evals import answers, board
from palestra.hub.evals.archive import DEFAULT
from palestra.hub.evals.pages import HOME
from palestra.hub.registry import access
from palestra.hub.registry.blobs import Incoming, TooLargeError
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.receive import SlowError
from palestra.hub.registry.rights import UnknownTokenError, Who
from palestra.hub.registry.uploads import Taking

_AT_ONCE = 8
_SILENCE_S = 60.0
_CHECK_S = 1800.0
KINDS = ("application/zip", "application/octet-stream")


class EvaluationUploads(Taking):
    def __init__(self, hub: Hub, threads: ThreadPoolExecutor):
        super().__init__(hub, threads, most=_AT_ONCE, what="evaluations are on their way")

    def routes(self) -> list[Route]:
        return [Route(HOME, self._answer, methods=["POST"])]

    async def _taken(self, request: Request) -> answers.EvaluationPushed:
        """Errors: UserError of some kind, InfrastructureError."""
        hub, owner, name = self._hub, request.path_params["owner"], request.path_params["environment"]
        who = await asyncio.to_thread(self._allowed, request)
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > DEFAULT.archive_bytes:
            raise TooLargeError(f"{announced} bytes; at most {DEFAULT.archive_bytes} are taken")
        if request.headers.get("content-type", "").split(";")[0].strip() not in KINDS:
            raise UserError(f"the body is an archive, of the type {KINDS[0]}")
        with Incoming(hub.settings.incoming, DEFAULT.archive_bytes) as incoming:
            await _received(request, incoming, deadline_s=hub.settings.push_s)
            pushing = partial(board.push, hub, who, owner, name, incoming.received())
            work = asyncio.get_running_loop().run_in_executor(self._threads, pushing)
            try:
                return await asyncio.wait_for(asyncio.shield(work), timeout=_CHECK_S)
            except TimeoutError:
                raise DeadlineError("the evaluation to be looked through", _CHECK_S) from None

    def _allowed(self, request: Request) -> Who:
        """Only by a token: a page of another site can make a browser send its cookie."""
        who = access.identify(self._hub, request)
        if not who.is_known or who.csrf:
            raise UnknownTokenError("to push an evaluation takes a token: Authorization: Bearer TOKEN")
        board.check_place(self._hub, who, request.path_params["owner"], request.path_params["environment"])
        return who


async def _received(request: Request, incoming: Incoming, *, deadline_s: float) -> None:
    """Errors: SlowError, TooLargeError; UserError, if the client went away."""
    pieces = request.stream()
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                piece = await asyncio.wait_for(anext(pieces), timeout=_SILENCE_S)
                await asyncio.to_thread(incoming.write, piece)
    except StopAsyncIteration:
        return
    except TimeoutError:
        raise SlowError("the archive did not come in time") from None
    except ClientDisconnect:
        raise UserError("the client went away") from None
