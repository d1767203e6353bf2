"""What every request and answer goes through: whose name was asked for, and what browsers may do with the answer."""

import ipaddress

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Refuses names that are not this server's: a page elsewhere whose name was made to mean this address (DNS
    rebinding) reads nothing. Addresses in numbers are nobody's name, so they may be asked for."""

    def __init__(
        self,
        app: ASGIApp,
        names: frozenset[str],
        methods: frozenset[str] = frozenset({"GET", "HEAD"}),
        called: str = "viewer",
    ):
        self._app, self._names, self._methods, self._called = app, names, methods, called

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if not scope["path"].startswith("/static/"):
                    headers.setdefault("cache-control", "no-store")
            await send(message)

        host = Headers(scope=scope).get("host", "")
        if not is_ours(host, self._names):
            text = f"this {self._called} is not called {host[:100]!r}; start it with --allow-host NAME to let it be\n"
            await PlainTextResponse(text, status_code=421)(scope, receive, send_guarded)
        elif scope["method"] not in self._methods:
            text = f"this {self._called} takes {', '.join(sorted(self._methods))}\n"
            await PlainTextResponse(text, status_code=405)(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)


def is_ours(host: str, names: frozenset[str]) -> bool:
    """`host` as the header has it, with or without a port."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") and host.rpartition(":")[2].isdigit() else host
    name = name.removeprefix("[").removesuffix("]").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True
