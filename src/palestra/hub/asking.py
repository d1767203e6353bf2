"""What every part of the client shares: one connection to a viewer or a hub, and how its answers are read."""

import time
from collections.abc import Iterator
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.hub import answers

_INDEXING_S = 600.0

Answer = TypeVar("Answer")
Listed = TypeVar("Listed", answers.Rollouts, answers.Groups)


class RefusedError(UserError):
    """What the server does not do; `status` is HTTP's."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class Asking:
    """Errors of all: RefusedError for what the server refuses, InfrastructureError where it does not answer."""

    def __init__(
        self, url: str, *, token: str = "", timeout_s: float = 30.0, transport: httpx.BaseTransport | None = None
    ):
        """`token` is one of a hub; a viewer asks for none."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, transport=transport, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _pages(self, path: str, kind: type[Listed], where: dict[str, Any]) -> Iterator[Listed]:
        """Once all files have been read: of a part of them the pages would be a part, and look whole."""
        until = time.monotonic() + _INDEXING_S
        while (first := self._ask(path, kind, where | {"limit": 1})).indexed.share < 1:  # waits for a second itself
            if time.monotonic() > until:
                raise DeadlineError(f"{self.url} to read all files of {path} ({first.indexed.share:.0%})", _INDEXING_S)
        after = ""
        while True:
            page = self._ask(path, kind, {"limit": 200} | where | {"after": after})
            yield page
            if not (after := page.after):
                return

    def _ask(self, path: str, kind: type[Answer], given: dict[str, Any] | None = None) -> Answer:
        params = {name: value for name, value in (given or {}).items() if value not in (None, "")}
        return self._answered("GET", path, kind, params=params)

    def _tell(self, path: str, kind: type[Answer], body: dict[str, Any] | None = None) -> Answer:
        return self._answered("POST", path, kind, json=body or {})

    def _answered(self, method: str, path: str, kind: type[Answer], **request: Any) -> Answer:
        try:
            response = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise InfrastructureError(f"{self.url} does not answer: {error}") from error
        if not response.is_success:
            text = f"{self.url} refused {path}: {response.status_code} {_problem(response.content)}"
            raise RefusedError(text, response.status_code)
        return msgspec.json.decode(response.content, type=kind)


def _problem(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def segment(text: str) -> str:
    return quote(text, safe="")
