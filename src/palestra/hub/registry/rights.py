"""Who asks, and what they may do. A token never gives more than its person has.

Roles, each with what is before it: READ sees what is private, WRITE uploads and yanks, ADMIN does the rest.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, insert, or_, select, true

from palestra.core.errors import UserError
from palestra.hub.registry.schema import environments, members, owners, sessions, tokens

_MARK = "palestra_"
_PREFIX_LENGTH = 12
SESSION_S = 7 * 24 * 3600.0


class Role(IntEnum):
    NONE = 0
    READ = 1
    WRITE = 2
    ADMIN = 3

    @classmethod
    def of(cls, word: str) -> "Role":
        return cls[word.upper()]


class NotAllowedError(UserError):
    """Known who it is, and that they may not."""


class UnknownTokenError(UserError):
    """A token that is none, or is no longer one."""


class NotFoundError(UserError):
    """There is no such thing, or the one who asks may not know of it."""


@dataclass(frozen=True)
class Who:
    """`id` is None for somebody who gave no token. `csrf` is set where a browser's session was given."""

    id: int | None = None
    name: str = ""
    is_admin: bool = False
    scope: Role = Role.NONE
    only_owner_id: int | None = None
    only_environment_id: int | None = None
    token_id: int | None = None
    address: str = ""
    csrf: str = ""

    @property
    def is_known(self) -> bool:
        return self.id is not None


ANYBODY = Who()


@dataclass(frozen=True)
class Secret:
    """A token in the only moment in which it is known."""

    id: int
    token: str


# --- tokens


def make_token(
    connection: Connection,
    owner_id: int,
    *,
    scope: str = "write",
    name: str = "",
    expires: float | None = None,
    only_owner_id: int | None = None,
    only_environment_id: int | None = None,
) -> Secret:
    """`expires` is a time since 1970; None is never."""
    token = _MARK + secrets.token_hex(_PREFIX_LENGTH // 2) + secrets.token_urlsafe(32)
    values = {
        "prefix": _prefix(token),
        "hash": _hash(token),
        "owner_id": owner_id,
        "name": name[:100],
        "scope": scope,
        "only_owner_id": only_owner_id,
        "only_environment_id": only_environment_id,
        "created": time.time(),
        "expires": expires,
    }
    id = connection.execute(insert(tokens).values(**values).returning(tokens.c.id)).scalar_one()
    return Secret(id, token)


def who_has(connection: Connection, token: str) -> Who:
    """Errors: UnknownTokenError."""
    prefix = _prefix(token)
    row = connection.execute(_token_rows().where(tokens.c.prefix == prefix)).first() if prefix.isalnum() else None
    if row is None or not hmac.compare_digest(row.hash, _hash(token)):
        raise UnknownTokenError("this token is not known; `palestra hub login` takes a new one")
    return _who(row)


def require_valid(connection: Connection, who: Who) -> None:
    """That the token still holds after what took long. Errors: UnknownTokenError."""
    if who.token_id is not None:
        _who(connection.execute(_token_rows().where(tokens.c.id == who.token_id)).one())


def _token_rows():
    columns = (tokens, owners.c.name.label("owner"), owners.c.is_admin)
    return select(*columns).join(owners, owners.c.id == tokens.c.owner_id)


def _who(row: Row[Any]) -> Who:
    if row.revoked is not None:
        raise UnknownTokenError("this token was revoked; ask for a new one")
    if row.expires is not None and row.expires < time.time():
        raise UnknownTokenError("this token has expired; ask for a new one")
    return Who(
        id=row.owner_id,
        name=row.owner,
        is_admin=row.is_admin,
        scope=Role.of(row.scope),
        only_owner_id=row.only_owner_id,
        only_environment_id=row.only_environment_id,
        token_id=row.id,
    )


def _prefix(token: str) -> str:
    return token.removeprefix(_MARK)[:_PREFIX_LENGTH]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# --- sessions of browsers


def begin_session(connection: Connection, who: Who) -> str:
    """The cookie."""
    cookie = secrets.token_urlsafe(32)
    values = {
        "hash": _hash(cookie),
        "token_id": who.token_id,
        "csrf": secrets.token_urlsafe(32),
        "expires": time.time() + SESSION_S,
    }
    connection.execute(sessions.delete().where(sessions.c.expires < time.time()))
    connection.execute(insert(sessions).values(**values))
    return cookie


def who_has_session(connection: Connection, cookie: str) -> Who:
    """ANYBODY, if it is over."""
    columns = (sessions.c.csrf, sessions.c.expires.label("until"))
    found = _token_rows().add_columns(*columns).join(sessions, sessions.c.token_id == tokens.c.id)
    row = connection.execute(found.where(sessions.c.hash == _hash(cookie))).first()
    if row is None or row.until < time.time():
        return ANYBODY
    try:
        return replace(_who(row), csrf=row.csrf)
    except UnknownTokenError:
        return ANYBODY


def end_session(connection: Connection, cookie: str) -> None:
    connection.execute(sessions.delete().where(sessions.c.hash == _hash(cookie)))


# --- what they may


def role(connection: Connection, who: Who, owner_id: int, environment_id: int | None = None) -> Role:
    """At the owner's things, or at one environment of theirs."""
    if who.id is None or who.only_owner_id not in (None, owner_id):
        return Role.NONE
    if who.only_environment_id is not None and who.only_environment_id != environment_id:
        return Role.NONE
    return min(who.scope, _role_of_person(connection, who, owner_id))


def _role_of_person(connection: Connection, who: Who, owner_id: int) -> Role:
    if who.is_admin or who.id == owner_id:
        return Role.ADMIN
    of = (members.c.organisation_id == owner_id, members.c.person_id == who.id)
    word = connection.execute(select(members.c.role).where(*of)).scalar()
    return Role.of(word) if word else Role.NONE


def visible(who: Who) -> ColumnElement[bool]:
    """A condition on `environments`: those that `who` may see."""
    public = environments.c.visibility == "public"
    if who.id is None or who.scope < Role.READ:
        return public
    within = true()
    if who.only_owner_id is not None:
        within = within & (environments.c.owner_id == who.only_owner_id)
    if who.only_environment_id is not None:
        within = within & (environments.c.id == who.only_environment_id)
    if who.is_admin:
        return or_(public, within)
    theirs = select(members.c.organisation_id).where(members.c.person_id == who.id)
    return or_(public, within & ((environments.c.owner_id == who.id) | environments.c.owner_id.in_(theirs)))


_ENVIRONMENT = (  # built once: every request of the index asks it
    select(environments, owners.c.name.label("owner"))
    .join(owners, owners.c.id == environments.c.owner_id)
    .where(owners.c.name == bindparam("of_owner"), environments.c.name == bindparam("called"))
)


def environment(connection: Connection, who: Who, owner: str, name: str, needed: Role = Role.READ) -> Row[Any]:
    """Its row, with `owner`, for one who has `needed` there; a public one is read by anybody.

    Errors: NotFoundError, also for a private one that `who` may not see; NotAllowedError, for one that they see.
    """
    row = connection.execute(_ENVIRONMENT, {"of_owner": owner, "called": name}).first()
    has = role(connection, who, row.owner_id, row.id) if row is not None and who.is_known else Role.NONE
    if row is None or (row.visibility == "private" and has < Role.READ):
        raise NotFoundError(f"there is no environment {owner}/{name}")
    if needed > Role.READ and has < needed:
        raise NotAllowedError(_refusal(who, f"{owner}/{name}", has, needed))
    return row


def owner(connection: Connection, who: Who, name: str, needed: Role = Role.READ) -> Row[Any]:
    """Errors: NotFoundError; NotAllowedError."""
    row = connection.execute(select(owners).where(owners.c.name == name)).first()
    if row is None:
        raise NotFoundError(f"there is no owner {name[:60]}")
    has = role(connection, who, row.id)
    if needed > Role.READ and has < needed:
        raise NotAllowedError(_refusal(who, name, has, needed))
    return row


def _refusal(who: Who, subject: str, has: Role, needed: Role) -> str:
    if not who.is_known:
        return f"{subject}: this needs a token with the right to {needed.name.lower()}"
    with_what = f"the right to {has.name.lower()}" if has else "no right"
    return f"{subject}: {who.name}'s token has {with_what} there, and this needs {needed.name.lower()}"


def require_admin(who: Who) -> None:
    """Of the whole hub. Errors: NotAllowedError."""
    if not (who.is_admin and who.scope == Role.ADMIN and who.only_owner_id is None and who.only_environment_id is None):
        raise NotAllowedError("this needs a token of an administrator of the hub, with scope admin")
