"""What changes something: each a POST, recorded in the audit log in the same transaction."""

import re
import time

from sqlalchemy import Connection, delete, insert, select, update

from palestra.hub.evals.pages import ACTIONS as OF_EVALUATIONS
from palestra.hub.registry import answers, audit, names, publish, queries, rights
from palestra.hub.registry.ask import Action, Ask
from palestra.hub.registry.publish import TakenError
from palestra.hub.registry.rights import NotAllowedError, NotFoundError, Role, Who
from palestra.hub.registry.schema import environments, members, owners, tokens
from palestra.hub.trust import pages as trust

# --- owners


def new_owner(ask: Ask) -> answers.Done:
    """Administrators of the hub add persons; whoever may administrate himself makes organisations."""
    body: queries.NewOwner = ask.query
    if body.kind == "person":
        rights.require_admin(ask.who)
    else:
        _require_whole(ask.who)
    with ask.hub.database.write() as connection:
        id = add_owner(connection, ask.who, body.name, body.kind)
        if body.kind == "organisation":
            row = {"organisation_id": id, "person_id": ask.who.id, "role": "admin"}
            connection.execute(insert(members).values(**row))
    return answers.Done(body.name)


def add_owner(connection: Connection, who: Who, name: str, kind: str, *, is_admin: bool = False) -> int:
    """Errors: BadNameError, TakenError."""
    names.owner_name(name)
    others = connection.execute(select(owners.c.name)).scalars().all()
    if name in others:
        raise TakenError(f"there is an owner {name} already")
    if (near := names.nearest(name, others)) is not None and not who.is_admin:
        raise names.BadNameError(f"owner {name!r} is easily taken for {near!r}; take another name")
    values = {"name": name, "kind": kind, "is_admin": is_admin, "created": time.time()}
    id = connection.execute(insert(owners).values(**values).returning(owners.c.id)).scalar_one()
    audit.record(connection, who, "owner.create", name, kind=kind)
    return id


def set_member(ask: Ask) -> answers.Done:
    return _let_in(ask, ask.path["person"])


def add_member(ask: Ask) -> answers.Done:
    """As a form says it, which cannot put a name into its address."""
    return _let_in(ask, ask.query.person)


def _let_in(ask: Ask, name: str) -> answers.Done:
    body: queries.SetMember = ask.query
    with ask.hub.database.write() as connection:
        organisation, person = _organisation(connection, ask), _person(connection, name)
        where = (members.c.organisation_id == organisation, members.c.person_id == person)
        connection.execute(delete(members).where(*where))
        row = {"organisation_id": organisation, "person_id": person, "role": body.role}
        connection.execute(insert(members).values(**row))
        _require_an_admin(connection, organisation)
        audit.record(connection, ask.who, "member.set", ask.path["owner"], person=name, role=body.role)
    return answers.Done(f"{ask.path['owner']}: {name}")


def remove_member(ask: Ask) -> answers.Done:
    with ask.hub.database.write() as connection:
        organisation, person = _organisation(connection, ask), _person(connection, ask.path["person"])
        where = (members.c.organisation_id == organisation, members.c.person_id == person)
        if connection.execute(delete(members).where(*where)).rowcount == 0:
            raise NotFoundError(f"{ask.path['person']} is no member of {ask.path['owner']}")
        _require_an_admin(connection, organisation)
        audit.record(connection, ask.who, "member.remove", ask.path["owner"], person=ask.path["person"])
    return answers.Done(f"{ask.path['owner']}: {ask.path['person']}")


def _organisation(connection: Connection, ask: Ask) -> int:
    row = rights.owner(connection, ask.who, ask.path["owner"], Role.ADMIN)
    if row.kind != "organisation":
        raise NotFoundError(f"{row.name} is a person; organisations have members")
    return row.id


def _person(connection: Connection, name: str) -> int:
    where = (owners.c.name == name, owners.c.kind == "person")
    if (found := connection.execute(select(owners.c.id).where(*where)).scalar()) is None:
        raise NotFoundError(f"there is no person {name[:60]!r}")
    return found


def _require_an_admin(connection: Connection, organisation: int) -> None:
    where = (members.c.organisation_id == organisation, members.c.role == "admin")
    if connection.execute(select(members.c.person_id).where(*where).limit(1)).first() is None:
        raise TakenError("an organisation keeps at least one member with role admin")


# --- tokens


def new_token(ask: Ask) -> answers.Token:
    """Needs a token that may do everything its person may: a lesser one makes no other."""
    body: queries.NewToken = ask.query
    _require_whole(ask.who)
    if body.person and body.person != ask.who.name:
        rights.require_admin(ask.who)
    with ask.hub.database.write() as connection:
        person = _person(connection, body.person) if body.person else ask.who.id
        assert person is not None
        owner_id, environment_id = _only(connection, ask.who, body.only)
        expires = time.time() + 86_400 * body.days
        made = rights.make_token(
            connection,
            person,
            scope=body.scope,
            name=body.name,
            expires=expires,
            only_owner_id=owner_id,
            only_environment_id=environment_id,
        )
        details = {"scope": body.scope, "only": body.only, "id": made.id}
        audit.record(connection, ask.who, "token.create", body.person or ask.who.name, **details)
    return answers.Token(token=made.token, id=made.id, name=body.name, scope=body.scope)


def _only(connection: Connection, who: Who, only: str) -> tuple[int | None, int | None]:
    if not only:
        return None, None
    owner, _, environment = only.partition("/")
    if environment:
        row = rights.environment(connection, who, owner, environment, Role.READ)
        return row.owner_id, row.id
    return rights.owner(connection, who, owner).id, None


def revoke_token(ask: Ask) -> answers.Done:
    """Whoever has a token may revoke that one; a whole one revokes every one of its person."""
    if not re.fullmatch(r"[0-9]{1,9}", ask.path["id"]):
        raise NotFoundError("there is no such token")
    id = int(ask.path["id"])
    if id != ask.who.token_id:
        _require_whole(ask.who)
    where = [tokens.c.id == id, tokens.c.revoked.is_(None)]
    if not ask.who.is_admin:
        where.append(tokens.c.owner_id == ask.who.id)
    with ask.hub.database.write() as connection:
        if connection.execute(update(tokens).where(*where).values(revoked=time.time())).rowcount == 0:
            raise NotFoundError(f"you have no token {id}")
        audit.record(connection, ask.who, "token.revoke", ask.who.name, id=id)
    return answers.Done(f"token {id}")


def _require_whole(who: Who) -> None:
    if who.scope < Role.ADMIN or who.only_owner_id is not None or who.only_environment_id is not None:
        raise NotAllowedError("this needs a token of scope admin that is not restricted")


# --- environments


def new_environment(ask: Ask) -> answers.Done:
    body: queries.NewEnvironment = ask.query
    if body.near:
        rights.require_admin(ask.who)
    name, owner = names.environment_name(body.name), ask.path["owner"]
    with ask.hub.database.write() as connection:
        owner_id = rights.owner(connection, ask.who, owner, Role.WRITE).id
        where = (environments.c.owner_id == owner_id, environments.c.name == name)
        if connection.execute(select(environments.c.id).where(*where)).first():
            raise TakenError(f"there is {owner}/{name} already")
        row = publish.place(connection, ask.who, owner, name, visibility=body.visibility, near=body.near)
        publish.refresh(connection, row.id, is_sqlite=ask.hub.database.is_sqlite)
    return answers.Done(f"{owner}/{name}")


def set_visibility(ask: Ask) -> answers.Done:
    body: queries.SetVisibility = ask.query
    owner, name = ask.path["owner"], ask.path["environment"]
    with ask.hub.database.write() as connection:
        row = rights.environment(connection, ask.who, owner, name, Role.ADMIN)
        values = {"visibility": body.visibility, "revision": environments.c.revision + 1}
        connection.execute(update(environments).where(environments.c.id == row.id).values(**values))
        audit.record(connection, ask.who, "environment.visibility", f"{owner}/{name}", visibility=body.visibility)
    return answers.Done(f"{owner}/{name}")


def delete_environment(ask: Ask) -> answers.Done:
    publish.delete_environment(ask.hub, ask.who, ask.path["owner"], ask.path["environment"])
    return answers.Done(f"{ask.path['owner']}/{ask.path['environment']}")


def yank(ask: Ask) -> answers.Done:
    body: queries.Yank = ask.query
    return _yank(ask, body.reason)


def unyank(ask: Ask) -> answers.Done:
    return _yank(ask, None)


def _yank(ask: Ask, reason: str | None) -> answers.Done:
    owner, name, version = (ask.path[part] for part in ("owner", "environment", "version"))
    publish.yank(ask.hub, ask.who, owner, name, version, reason=reason)
    return answers.Done(f"{owner}/{name}=={version}")


# All need a token, or a session and its form.
_ENVIRONMENT = "/api/environments/{owner}/{environment}"
_VERSION = _ENVIRONMENT + "/versions/{version}"
_MEMBERS = "/api/owners/{owner}/members"
_MEMBER = _MEMBERS + "/{person}"
ACTIONS: list[Action] = [
    Action("/api/owners", "Add a person or an organisation", queries.NewOwner, answers.Done, new_owner),
    Action(_MEMBERS, "Let a person into an organisation", queries.AddMember, answers.Done, add_member),
    Action(_MEMBER, "Let a person in, or change the role", queries.SetMember, answers.Done, set_member),
    Action(f"{_MEMBER}/remove", "Take a person out", queries.Nothing, answers.Done, remove_member),
    Action("/api/tokens", "Make a token", queries.NewToken, answers.Token, new_token),
    Action("/api/tokens/{id}/revoke", "Revoke a token", queries.Nothing, answers.Done, revoke_token),
    Action("/api/environments/{owner}", "Make an environment", queries.NewEnvironment, answers.Done, new_environment),
    Action(f"{_ENVIRONMENT}/visibility", "Show or hide it", queries.SetVisibility, answers.Done, set_visibility),
    Action(f"{_ENVIRONMENT}/delete", "Delete an environment", queries.Nothing, answers.Done, delete_environment),
    Action(f"{_VERSION}/yank", "Yank a version", queries.Yank, answers.Done, yank),
    Action(f"{_VERSION}/unyank", "Take a yank back", queries.Nothing, answers.Done, unyank),
    *OF_EVALUATIONS,
    *trust.ACTIONS,
]
