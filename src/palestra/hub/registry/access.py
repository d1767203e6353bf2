"""Who a request is from: Basic or Bearer with a token, as pip, uv and twine send it, or the cookie of a browser."""

import base64
import binascii
import hmac
from dataclasses import replace
from urllib.parse import urlsplit

from starlette.requests import Request

from palestra.hub.registry import rights
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.rights import ANYBODY, NotAllowedError, UnknownTokenError, Who

COOKIE = "palestra_hub"
CHALLENGE = {"www-authenticate": 'Basic realm="palestra hub", charset="UTF-8"'}


def identify(hub: Hub, request: Request) -> Who:
    """Reads the database. Errors: UnknownTokenError, for a token that is none; without any it is ANYBODY."""
    address = request.client.host if request.client else ""
    token = token_of(request.headers.get("authorization", ""))
    cookie = request.cookies.get(COOKIE, "")
    if not token and not cookie:
        return replace(ANYBODY, address=address)
    with hub.database.read() as connection:
        who = rights.who_has(connection, token) if token else rights.who_has_session(connection, cookie)
    if who.token_id is not None:
        hub.counts.used(who.token_id)
    return replace(who, address=address)


def token_of(header: str) -> str:
    """The token in an `Authorization`; "" if there is none. Errors: UnknownTokenError, if it cannot be read."""
    kind, _, value = header.strip().partition(" ")
    if not kind:
        return ""
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            user, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise UnknownTokenError("Authorization: Basic is not base64 of USER:TOKEN") from None
        return password or user
    raise UnknownTokenError(f"Authorization: {kind[:20]} is not known; Basic and Bearer are")


def check_csrf(request: Request, who: Who, given: str) -> None:
    """That a page of this hub has sent it, where a browser adds the cookie by itself. Errors: NotAllowedError."""
    if not who.csrf:
        return  # a token was sent with the request: no other page can do that
    if not hmac.compare_digest(who.csrf.encode(), given.encode()):
        raise NotAllowedError("the form is not of this session; load its page again")
    check_origin(request)


def check_origin(request: Request) -> None:
    """Errors: NotAllowedError, if a browser says that a page from elsewhere has sent it."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin", "")
    host = request.headers.get("host", "")
    if site not in ("same-origin", "none") or (origin and urlsplit(origin).netloc != host):
        raise NotAllowedError("a page from elsewhere has sent this; use the form of the hub")
