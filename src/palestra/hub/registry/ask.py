"""What a page or an action is given, and the tables of both: whatever is served is in one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import Struct
from pydantic import BaseModel

from palestra.hub.registry.hub import Hub
from palestra.hub.registry.rights import Who


@dataclass(frozen=True)
class Ask:
    """`path` has the parts of the address; `query` is the query of a page, or the body of an action; `url` what the
    hub was called, without / at its end."""

    hub: Hub
    who: Who
    path: dict[str, str]
    query: Any
    url: str


@dataclass(frozen=True)
class Page:
    """`view` runs in a thread. Errors of it: UserError of any kind, which say their status by it."""

    path: str
    title: str
    query: type[BaseModel]
    answer: type[Struct]
    view: Callable[[Ask], Struct]
    template: str


@dataclass(frozen=True)
class Action:
    """A POST to `path`, of JSON by a token, or of a form by a browser's session. `act` runs in a thread."""

    path: str
    title: str
    body: type[BaseModel]
    answer: type[Struct]
    act: Callable[[Ask], Struct]
