"""A push: an artefact becomes visible in one transaction, after its contents are durable.

A process that is killed leaves the old state or the new one; blobs that nothing names yet are swept later.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version
from sqlalchemy import Connection, Row, delete, insert, select, update

from palestra import __version__
from palestra.core.errors import InfrastructureError, UserError
from palestra.hub.registry import artefact, audit, names, rights, wordindex
from palestra.hub.registry.artefact import Artefact, BadArtefactError
from palestra.hub.registry.blobs import Received, put_bytes
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.rights import NotAllowedError, NotFoundError, Role, Who
from palestra.hub.registry.schema import dependencies, environments, files, owners, versions
from palestra.hub.trust import queue


class TakenError(UserError):
    """Something else is there already."""


@dataclass(frozen=True)
class Wish:
    """Where it goes, and what the client says of it; what is empty was not said. `environment` is empty, if the name
    of the distribution decides."""

    owner: str
    environment: str
    filename: str
    sha256: str = ""
    name: str = ""
    version: str = ""
    visibility: str = ""  # of a new environment


@dataclass(frozen=True)
class Pushed:
    """`is_new` is false, if exactly this was there before."""

    owner: str
    environment: str
    version: str
    filename: str
    sha256: str
    is_new: bool


def push(hub: Hub, who: Who, wish: Wish, received: Received) -> Pushed:
    """Errors: UserError of some kind for what is refused; InfrastructureError, if it has to be tried again."""
    check_place(hub, who, wish)  # before the work
    if wish.sha256 and wish.sha256.lower() != received.sha256:
        raise BadArtefactError(
            f"{wish.filename}: what arrived has SHA-256 {received.sha256}, and {wish.sha256[:64]} was announced"
        )
    found = artefact.read(received.file, wish.filename, hub.settings.bounds)
    environment = _fitting(wish, found)
    metadata_sha256 = put_bytes(hub.blobs, found.metadata, hub.settings.incoming)
    hub.blobs.put(received.file, received.sha256)
    with hub.database.write() as connection:
        rights.require_valid(connection, who)
        is_new = _commit(hub, connection, who, wish, environment, found, received, metadata_sha256)
        if not (hub.blobs.exists(received.sha256) and hub.blobs.exists(metadata_sha256)):
            raise InfrastructureError(f"{wish.filename} was swept away while it was pushed; push it again")
    hub.on_pushed()
    return Pushed(wish.owner, environment, found.version, found.filename, received.sha256, is_new)


def check_place(hub: Hub, who: Who, wish: Wish) -> None:
    """Whether `who` may push there at all: asked before a byte is read. Errors: as `push`."""
    with hub.database.read() as connection:
        owner_id = _owner_id(connection, who, wish.owner)
        row = _environment(connection, owner_id, wish.environment) if wish.environment else None
        if wish.environment and row is None:
            names.environment_name(wish.environment)
        if not wish.environment and who.only_environment_id is not None:
            return  # the name of the distribution is not known yet
        _require_write(connection, who, wish.owner, owner_id, row)


# --- what fits


def _fitting(wish: Wish, found: Artefact) -> str:
    """The environment's name. Errors: BadArtefactError, BadNameError."""
    if wish.name and names.normalised(wish.name) != found.project:
        raise BadArtefactError(f"{found.filename} is of {found.project}, and {wish.name[:100]!r} was announced")
    if wish.version and not _is_version(wish.version, found.version):
        raise BadArtefactError(f"{found.filename} is of {found.version}, and {wish.version[:100]!r} was announced")
    environment = wish.environment or names.environment_of(found.project)
    if not names.belongs(found.project, environment):
        raise BadArtefactError(
            f"{found.filename} is of {found.project}; environment {environment} takes distributions called "
            f"{environment} or palestra-{environment}"
        )
    return names.environment_name(environment)


def _is_version(said: str, version: str) -> bool:
    try:
        return str(Version(said)) == version
    except ValueError:
        return False


def _owner_id(connection: Connection, who: Who, name: str) -> int:
    """Errors: NotFoundError, NotAllowedError."""
    found = connection.execute(select(owners.c.id).where(owners.c.name == name)).scalar()
    if found is None:
        raise NotFoundError(f"there is no owner {name[:60]!r} on this hub; you are {who.name or 'nobody'}")
    return found


def _environment(connection: Connection, owner_id: int, name: str) -> Row[Any] | None:
    where = (environments.c.owner_id == owner_id, environments.c.name == name)
    return connection.execute(select(environments).where(*where)).first()


def _require_write(connection: Connection, who: Who, owner: str, owner_id: int, row: Row[Any] | None) -> None:
    has = rights.role(connection, who, owner_id, row.id if row is not None else None)
    if has < Role.WRITE:
        raise NotAllowedError(f"{who.name or 'nobody'} may not push to {owner}: this token has no right to write there")


# --- the transaction


def _commit(
    hub: Hub,
    connection: Connection,
    who: Who,
    wish: Wish,
    environment: str,
    found: Artefact,
    received: Received,
    metadata_sha256: str,
) -> bool:
    """Whether it is new. Errors: TakenError, NotAllowedError, BadNameError."""
    row = place(connection, who, wish.owner, environment, visibility=wish.visibility)
    if row.project not in ("", found.project):
        raise BadArtefactError(
            f"{wish.owner}/{environment} has distributions called {row.project}, not {found.project}"
        )
    where = (files.c.environment_id == row.id, files.c.filename == found.filename)
    same = connection.execute(select(files.c.sha256).where(*where)).scalar()
    if same == received.sha256:
        return False
    if same is not None:
        raise TakenError(
            f"{found.filename} is there with other content (SHA-256 {same}); a version never changes: push a higher one"
        )
    version_id = _version_id(connection, who, row.id, found)
    connection.execute(
        insert(files).values(
            environment_id=row.id,
            version_id=version_id,
            filename=found.filename,
            kind=found.kind,
            size=received.size,
            sha256=received.sha256,
            metadata_sha256=metadata_sha256,
            created=time.time(),
        )
    )
    connection.execute(update(environments).where(environments.c.id == row.id).values(project=found.project))
    refresh(connection, row.id, is_sqlite=hub.database.is_sqlite)
    queue.enqueue(connection, version_id, __version__)
    subject = f"{wish.owner}/{environment}=={found.version}"
    audit.record(connection, who, "version.push", subject, file=found.filename, sha256=received.sha256)
    return True


def place(connection: Connection, who: Who, owner: str, name: str, *, visibility: str = "", near: bool = False):
    """The row of an environment, which is made if there is none; its row is locked until the transaction ends.

    `near`: an administrator lets it be called almost as another. Errors: as `push`.
    """
    owner_id = _owner_id(connection, who, owner)
    connection.execute(select(owners.c.id).where(owners.c.id == owner_id).with_for_update(key_share=True))  # in turn
    row = _environment(connection, owner_id, name)
    _require_write(connection, who, owner, owner_id, row)
    if row is None:
        if not near:
            _refuse_near(connection, owner_id, name)
        now = time.time()
        values = {"owner_id": owner_id, "name": name, "visibility": visibility or "public"}
        connection.execute(insert(environments).values(**values, created=now, updated=now))
        audit.record(connection, who, "environment.create", f"{owner}/{name}", visibility=values["visibility"])
        row = _environment(connection, owner_id, name)
    assert row is not None
    return row


def _refuse_near(connection: Connection, owner_id: int, name: str) -> None:
    """Errors: BadNameError. A private name that is near is not told."""
    columns = (environments.c.name, environments.c.visibility, environments.c.owner_id)
    found = connection.execute(select(*columns)).all()
    theirs = {row.name: row.visibility for row in found if row.owner_id != owner_id}
    if name in theirs:
        return  # the same name under another owner is no slip: its address says whose it is
    for other in theirs.keys() - {row.name for row in found if row.owner_id == owner_id}:
        if names.is_near(name, other):
            which = repr(other) if theirs[other] == "public" else "another one of this hub"
            raise names.BadNameError(
                f"environment {name!r} is easily taken for {which}, which somebody else has; take another name, or ask "
                "an administrator of the hub"
            )


def _version_id(connection: Connection, who: Who, environment_id: int, found: Artefact) -> int:
    """The first artefact of a version says what the version is; the others are further files of it."""
    where = (versions.c.environment_id == environment_id, versions.c.version == found.version)
    if (known := connection.execute(select(versions.c.id).where(*where)).scalar()) is not None:
        return known
    values = {
        "environment_id": environment_id,
        "version": found.version,
        "requires_python": found.requires_python,
        "metadata": json.dumps(found.core | {"summary": found.summary, "tags": list(found.tags)}),
        "readme": found.readme,
        "readme_type": found.readme_type,
        "uploaded_by": who.id,
        "created": time.time(),
    }
    version_id = connection.execute(insert(versions).values(**values).returning(versions.c.id)).scalar_one()
    rows = [{"version_id": version_id, "name": name, "requirement": text} for name, text in found.dependencies]
    if rows:
        connection.execute(insert(dependencies), rows)
    return version_id


# --- what follows from versions


def refresh(connection: Connection, environment_id: int, *, is_sqlite: bool) -> None:
    """What an environment says of itself, after its versions or their yanks have changed."""
    columns = (versions.c.id, versions.c.version, versions.c.yanked)
    found = connection.execute(select(*columns).where(versions.c.environment_id == environment_id)).all()
    newest = latest(row.version for row in found if not row.yanked) or latest(row.version for row in found)
    values: dict[str, Any] = {"latest": newest or "", "updated": time.time(), "revision": environments.c.revision + 1}
    readme = ""
    if newest:
        where = (versions.c.environment_id == environment_id, versions.c.version == newest)
        row = connection.execute(select(versions.c.metadata, versions.c.readme).where(*where)).one()
        core = json.loads(row.metadata)
        values |= {"summary": core.get("summary", ""), "tags": json.dumps(core.get("tags", []))}
        readme = row.readme
    connection.execute(update(environments).where(environments.c.id == environment_id).values(**values))
    wordindex.put(connection, environment_id, readme, is_sqlite=is_sqlite)


def latest(found: Iterable[str]) -> str | None:
    """The highest release, or the highest of all if there are only pre-releases."""
    known = [Version(one) for one in found]
    best = max((one for one in known if not one.is_prerelease), default=None) or max(known, default=None)
    return str(best) if best is not None else None


def yank(hub: Hub, who: Who, owner: str, name: str, version: str, *, reason: str | None) -> None:
    """`reason` None takes a yank back. Errors: NotFoundError, NotAllowedError."""
    with hub.database.write() as connection:
        row = rights.environment(connection, who, owner, name, Role.WRITE)
        where = (versions.c.environment_id == row.id, versions.c.version == version)
        values = {"yanked": reason is not None, "yanked_reason": (reason or "")[:500]}
        if connection.execute(update(versions).where(*where).values(**values)).rowcount == 0:
            raise NotFoundError(f"there is no version {version[:100]} of {owner}/{name}")
        refresh(connection, row.id, is_sqlite=hub.database.is_sqlite)
        action = "version.unyank" if reason is None else "version.yank"
        audit.record(connection, who, action, f"{owner}/{name}=={version}", reason=reason or "")


def delete_environment(hub: Hub, who: Who, owner: str, name: str) -> None:
    """With all its versions; its blobs are swept later. Errors: NotFoundError, NotAllowedError."""
    with hub.database.write() as connection:
        row = rights.environment(connection, who, owner, name, Role.ADMIN)
        wordindex.drop(connection, row.id, is_sqlite=hub.database.is_sqlite)
        connection.execute(delete(environments).where(environments.c.id == row.id))
        audit.record(connection, who, "environment.delete", f"{owner}/{name}")
