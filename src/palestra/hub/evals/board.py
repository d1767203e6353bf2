"""Evaluations in the database: pushed, listed, taken away. What they say was counted from their rollouts, here.

A push is visible in one transaction, after its rollouts are durable; the same content twice is one evaluation.
"""

import hashlib
import json
import time
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Row, delete, insert, select, update

from palestra.algo.standing import Standing
from palestra.core.errors import InfrastructureError, UserError
from palestra.hub.evals import answers
from palestra.hub.evals.archive import DEFAULT, Checked, Limits, check
from palestra.hub.evals.queries import PER_PAGE, Board
from palestra.hub.registry import audit, names, rights
from palestra.hub.registry.blobs import Received
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.rights import NotAllowedError, NotFoundError, Role, Who
from palestra.hub.registry.schema import environments, evaluations, owners, versions

MOST_OF_ONE = 5000  # evaluations of an environment
NEW, VERIFIED, DIFFERS, UNVERIFIABLE = "new", "verified", "differs", "unverifiable"


def check_place(hub: Hub, who: Who, owner: str, name: str) -> None:
    """Whether `who` may push an evaluation there: asked before a byte is read. Errors: as `push`."""
    with hub.database.read() as connection:
        _require_push(connection, who, owner, name)


def push(
    hub: Hub, who: Who, owner: str, name: str, received: Received, *, limits: Limits = DEFAULT
) -> answers.EvaluationPushed:
    """Whoever sees an environment and may write anything may push what they measured with it.

    Errors: UserError of some kind for what is refused; InfrastructureError, if it has to be tried again.
    """
    check_place(hub, who, owner, name)
    found = check(received.file, limits=limits)
    if names.environment_of(found.told.environment) != name:
        raise UserError(f"this is an evaluation of {found.told.environment!r}, and {owner}/{name} is another one")
    hub.blobs.put(received.file, received.sha256)
    with hub.database.write() as connection:
        rights.require_valid(connection, who)
        environment = _require_push(connection, who, owner, name)
        id = _id(environment.id, found.digest)
        is_new = _insert(connection, who, environment, id, found, received.sha256)
        if is_new and not hub.blobs.exists(received.sha256):
            raise InfrastructureError("its rollouts were swept away while it was pushed; push it again")
    return answers.EvaluationPushed(
        owner=owner,
        environment=name,
        id=id,
        is_new=is_new,
        url=f"/{owner}/{name}/evaluations/{id}",
        standing=found.standing,
    )


def _require_push(connection: Connection, who: Who, owner: str, name: str) -> Row[Any]:
    """Errors: NotFoundError, NotAllowedError."""
    environment = rights.environment(connection, who, owner, name)
    is_bound_elsewhere = who.only_environment_id not in (None, environment.id) or who.only_owner_id not in (
        None,
        environment.owner_id,
    )
    if not who.is_known or who.scope < Role.WRITE or is_bound_elsewhere:
        raise NotAllowedError(f"{owner}/{name}: to push an evaluation takes a token that may write there")
    return environment


def _id(environment_id: int, digest: str) -> str:
    return hashlib.sha256(f"{environment_id} {digest}".encode()).hexdigest()[:32]


def _insert(connection: Connection, who: Who, environment: Row[Any], id: str, found: Checked, blob_sha256: str) -> bool:
    """Whether it is new. Of two that push the same at once, the second finds the first one's."""
    connection.execute(select(environments.c.id).where(environments.c.id == environment.id).with_for_update())
    known = select(evaluations.c.id).where(evaluations.c.environment_id == environment.id)
    version_id = _version_id(connection, environment.id, found.told.environment_version)
    if connection.execute(known.where(evaluations.c.id == id)).first() is not None:
        _note_version(connection, id, version_id, is_imported=bool(found.told.imported))
        return False
    if len(connection.execute(known).all()) >= MOST_OF_ONE:
        raise UserError(f"{environment.name} has {MOST_OF_ONE} evaluations, which is the most; delete some")
    told = found.told
    numbers = {"standing": msgspec.to_builtins(found.standing), "digest": found.digest, "num_bytes": found.num_bytes}
    values = {
        "id": id,
        "environment_id": environment.id,
        "version_id": version_id,
        "owner_id": who.id,
        "model": told.model,
        "library": told.palestra,
        "settings": told.model_dump_json(),
        "numbers": json.dumps(numbers),
        "status": UNVERIFIABLE if told.imported else NEW,
        "blob_sha256": blob_sha256,
        "created": time.time(),
    }
    connection.execute(insert(evaluations).values(**values))
    subject = f"{environment.owner}/{environment.name}"
    audit.record(connection, who, "evaluation.push", subject, id=id, model=told.model, digest=found.digest)
    return True


def _note_version(connection: Connection, id: str, version_id: int | None, *, is_imported: bool) -> None:
    """Of an evaluation that was here before the version that it names: it can be scored again now."""
    if version_id is None or is_imported:
        return
    where = (evaluations.c.id == id, evaluations.c.version_id.is_(None))
    connection.execute(update(evaluations).where(*where).values(version_id=version_id, status=NEW, verified=False))


def _version_id(connection: Connection, environment_id: int, version: str) -> int | None:
    where = (versions.c.environment_id == environment_id, versions.c.version == version)
    return connection.execute(select(versions.c.id).where(*where)).scalar()


def remove(hub: Hub, who: Who, owner: str, name: str, id: str) -> None:
    """By who pushed it, or an administrator of the environment. Errors: NotFoundError, NotAllowedError."""
    with hub.database.write() as connection:
        environment = rights.environment(connection, who, owner, name)
        row = evaluation_row(connection, environment, id)
        if not may_delete(connection, who, environment, row):
            raise NotAllowedError(f"{owner}/{name}: {who.name or 'nobody'} may not delete what {row.pushed_by} pushed")
        connection.execute(delete(evaluations).where(evaluations.c.id == row.id))
        audit.record(connection, who, "evaluation.delete", f"{owner}/{name}", id=row.id)


def may_delete(connection: Connection, who: Who, environment: Row[Any], row: Row[Any]) -> bool:
    is_own = who.is_known and who.id == row.owner_id and who.scope >= Role.WRITE
    return is_own or rights.role(connection, who, environment.owner_id, environment.id) >= Role.ADMIN


# --- what is there


def evaluation_row(connection: Connection, environment: Row[Any], id: str) -> Row[Any]:
    """With `pushed_by`. Errors: NotFoundError."""
    where = (evaluations.c.environment_id == environment.id, evaluations.c.id == id)
    row = connection.execute(_rows().where(*where)).first()
    if row is None:
        raise NotFoundError(f"{environment.owner}/{environment.name} has no evaluation {id[:40]}")
    return row


def _rows():
    columns = (evaluations, owners.c.name.label("pushed_by"))
    return select(*columns).join(owners, owners.c.id == evaluations.c.owner_id)


def listed(hub: Hub, who: Who, owner: str, name: str, query: Board) -> answers.Leaderboard:
    """Errors: NotFoundError."""
    with hub.database.read() as connection:
        environment = rights.environment(connection, who, owner, name)
        where = evaluations.c.environment_id == environment.id
        found = connection.execute(_rows().where(where).order_by(evaluations.c.created.desc(), evaluations.c.id)).all()
    rows = [row_of(one) for one in found]
    matching = sorted((row for row in rows if _is_wanted(row, query)), key=_KEYS[query.sort])
    begin = (query.page - 1) * PER_PAGE
    return answers.Leaderboard(
        owner=owner,
        environment=name,
        rows=matching[begin : begin + PER_PAGE],
        num_matching=len(matching),
        page=query.page,
        is_last=begin + PER_PAGE >= len(matching),
        versions=sorted({row.version for row in rows if row.version}),
        libraries=sorted({row.library for row in rows if row.library}),
        models=sorted({row.model for row in rows}),
        splits=sorted({row.split for row in rows if row.split}),
    )


_KEYS: dict[str, Any] = {
    "-reward": lambda row: (-row.standing.reward.value, -row.created),
    "reward": lambda row: (row.standing.reward.value, -row.created),
    "tokens": lambda row: (row.standing.tokens.per_rollout, -row.created),
    "-tokens": lambda row: (-row.standing.tokens.per_rollout, -row.created),
    "newest": lambda row: (-row.created, row.id),
    "oldest": lambda row: (row.created, row.id),
    "model": lambda row: (row.model, -row.standing.reward.value),
}


def _is_wanted(row: answers.EvaluationRow, query: Board) -> bool:
    return (
        query.version in ("", row.version)
        and query.library in ("", row.library)
        and query.model in ("", row.model)
        and query.split in ("", row.split)
        and query.verified in ("", "yes" if row.verified else "no")
    )


class _Settings(Struct):
    """What a row shows of them; all were checked when they came."""

    name: str
    served: str
    environment_version: str
    split: str | None
    temperature: float | None
    rollouts_per_task: int | None
    imported: str


class _Numbers(Struct):
    standing: Standing
    note: str = ""


_settings, _numbers = msgspec.json.Decoder(_Settings).decode, msgspec.json.Decoder(_Numbers).decode


def row_of(row: Row[Any]) -> answers.EvaluationRow:
    told, numbers = _settings(row.settings), _numbers(row.numbers)
    return answers.EvaluationRow(
        id=row.id,
        pushed_by=row.pushed_by,
        name=told.name,
        model=row.model,
        served=told.served,
        version=told.environment_version,
        is_known_version=row.version_id is not None,
        library=row.library,
        split=told.split or "",
        temperature=told.temperature,
        rollouts_per_task=told.rollouts_per_task,
        imported=told.imported,
        standing=numbers.standing,
        verified=bool(row.verified),
        status=row.status,
        note=numbers.note,
        created=row.created,
    )
