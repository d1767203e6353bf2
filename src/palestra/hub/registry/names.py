"""Names of owners and environments: their form, those that are taken by pages, and those that look like another's."""

import re
import unicodedata
from collections.abc import Iterable

from palestra.core.errors import UserError

_OWNER = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){0,38}\Z")
_ENVIRONMENT = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){0,79}\Z")
_PREFIX = "palestra-"
_SHORTEST_FUZZY = 5  # shorter names have too many honest neighbours

_PATHS = (  # of the hub itself
    *(
        "account",
        "admin",
        "api",
        "assets",
        "audit",
        "checks",
        "compare",
        "docs",
        "environments",
        "evaluations",
        "events",
    ),
    *(
        "files",
        "health",
        "healthz",
        "help",
        "legacy",
        "live",
        "livez",
        "login",
        "logout",
        "metrics",
        "new",
        "openapi",
        "ready",
    ),
    *("readyz", "runs", "search", "settings", "simple", "static", "tokens", "users"),
)
RESERVED_OWNERS = frozenset(_PATHS)
RESERVED_ENVIRONMENTS = frozenset(_PATHS) | {"members"}

# Letters that are taken for one another in what people read.
_LOOKALIKES = (("rn", "m"), ("vv", "w"), ("cl", "d"), ("0", "o"), ("1", "l"), ("i", "l"), ("5", "s"), ("-", ""))


class BadNameError(UserError):
    """A name that cannot be, or that is too near to another."""


def normalised(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def owner_name(name: str) -> str:
    """Errors: BadNameError."""
    if not _OWNER.match(name):
        raise BadNameError(f"owner {name[:60]!r}: up to 39 small letters, digits and single - between them")
    if name in RESERVED_OWNERS:
        raise BadNameError(f"owner {name!r} is the address of a page of the hub; take another name")
    return name


def environment_name(name: str) -> str:
    """Errors: BadNameError."""
    if not _ENVIRONMENT.match(name):
        raise BadNameError(f"environment {name[:100]!r}: up to 80 small letters, digits and single - between them")
    if name in RESERVED_ENVIRONMENTS:
        raise BadNameError(f"environment {name!r} is the address of a page of the hub; take another name")
    return name


def environment_of(project: str) -> str:
    """The environment that a distribution belongs to: `palestra-wordle` and `wordle` to `wordle`."""
    name = normalised(project)
    return name.removeprefix(_PREFIX) or name


def belongs(project: str, environment: str) -> bool:
    return environment_of(project) == environment


def skeleton(name: str) -> str:
    """Equal for names that look alike."""
    found = unicodedata.normalize("NFKC", name).casefold()
    for one, other in _LOOKALIKES:
        found = found.replace(one, other)
    return found


def is_near(one: str, other: str) -> bool:
    """Whether a reader may take one for the other: they look alike, or a single slip of typing is between them.

    Numbers that differ are meant: `arc-1` and `arc-2` are not near.
    """
    if one == other:
        return False
    if re.sub(r"\d+", "0", one) == re.sub(r"\d+", "0", other):
        return False
    if skeleton(one) == skeleton(other):
        return True
    return min(len(one), len(other)) >= _SHORTEST_FUZZY and _is_one_slip(one, other)


def nearest(name: str, others: Iterable[str]) -> str | None:
    return next((other for other in others if is_near(name, other)), None)


def _is_one_slip(one: str, other: str) -> bool:
    """One letter more, fewer or other; or two neighbours in the wrong order."""
    if abs(len(one) - len(other)) > 1:
        return False
    short, long = sorted((one, other), key=len)
    start = next((at for at, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(short) < len(long):
        return short[start:] == long[start + 1 :]
    if short[start + 1 :] == long[start + 1 :]:
        return True
    swapped = short[:start] + short[start + 1 : start + 2] + short[start : start + 1] + short[start + 2 :]
    return swapped == long
