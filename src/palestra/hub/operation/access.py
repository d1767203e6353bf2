"""Every request gets an id, a line in the log and its place in the metrics."""

import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palestra.hub.operation.limits import OPEN_PATHS
from palestra.hub.operation.logs import ACCESS
from palestra.hub.operation.metrics import Metrics

HEADER = "x-request-id"
GONE = 499
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_logger = logging.getLogger(ACCESS)


class Access:
    """The id is in `scope["request_id"]` and in the answer's header. A proxy's is kept, if it looks like one.

    Of the address asked for, the path is logged, never the query; of who asks, the address.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(8)
        answer, began = _Answer(send, scope["request_id"]), time.perf_counter()
        self._metrics.begin()
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            _logger.exception("request failed", extra={"fields": {"request_id": scope["request_id"]}})
            if answer.status == GONE:  # nobody has answered
                raise
        finally:
            seconds, method = time.perf_counter() - began, scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.end(method, route_of(scope), answer.status, seconds=seconds, num_bytes=answer.num_bytes)
            if scope["path"] not in OPEN_PATHS:
                _logger.info("request", extra={"fields": _row(scope, answer, seconds)})


class _Answer:
    """`status` is GONE for one that was never begun: who asked was gone, or the connection was."""

    def __init__(self, send: Send, request_id: str):
        self._send, self._id = send, request_id
        self.status, self.num_bytes = GONE, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[HEADER] = self._id
        elif message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
        await self._send(message)


def _row(scope: Scope, answer: _Answer, seconds: float) -> dict[str, Any]:
    return {
        "request_id": scope["request_id"],
        "method": scope["method"],
        "path": scope["path"][:500],
        "status": answer.status,
        "ms": round(1000 * seconds, 2),
        "bytes": answer.num_bytes,
        "address": (scope.get("client") or ("",))[0],
    }


def route_of(scope: Scope) -> str:
    """The route's pattern, so that there are as many series as routes, whatever is asked for."""
    return str(getattr(scope.get("route"), "path", "none"))
