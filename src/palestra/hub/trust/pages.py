"""The matrix of versions of an environment and the library, one examination with its log, and how to ask for one."""

import msgspec
from msgspec import Struct
from packaging.version import Version
from sqlalchemy import Connection, select

from palestra import __version__
from palestra.env.case import Case
from palestra.hub.registry import answers, audit, queries, rights
from palestra.hub.registry.ask import Action, Ask, Page
from palestra.hub.registry.rights import NotFoundError, Role
from palestra.hub.registry.schema import checks, versions
from palestra.hub.trust import queue
from palestra.hub.trust.verdict import MOST_LOG, Verdict

_MOST_VERSIONS = 200


class CheckRow(Struct, kw_only=True):
    """`why` in a sentence, where there is one. Numbers are of cases."""

    id: int
    version: str
    library: str
    status: str
    why: str
    num_passed: int
    num_failed: int
    num_skipped: int
    seconds: float
    attempts: int
    ended: float | None


class Checks(Struct, kw_only=True):
    """`rows` are the cells of the matrix of `versions` and `libraries`, both newest first."""

    owner: str
    name: str
    versions: list[str]
    libraries: list[str]
    rows: list[CheckRow]
    role: str


class Checked(Struct, kw_only=True):
    """`cases` by environment of the package; what its code printed is in `log`, bounded, and is not to be trusted."""

    owner: str
    name: str
    row: CheckRow
    cases: dict[str, list[Case]]
    log: str


def _rows(connection: Connection, environment_id: int) -> list[CheckRow]:
    query = select(checks, versions.c.version).join(versions, versions.c.id == checks.c.version_id)
    found = connection.execute(query.where(versions.c.environment_id == environment_id).order_by(checks.c.id.desc()))
    return [_row(row)[0] for row in found.fetchmany(_MOST_VERSIONS * 20)]


def _row(row) -> tuple[CheckRow, Verdict]:
    known = {"status": row.status} | msgspec.json.decode(row.result)
    verdict = msgspec.convert(known, Verdict)
    shown = CheckRow(
        id=row.id,
        version=row.version,
        library=row.library,
        status=row.status,
        why=verdict.why,
        num_passed=verdict.count("passed"),
        num_failed=verdict.count("failed"),
        num_skipped=verdict.count("skipped"),
        seconds=verdict.seconds,
        attempts=row.attempts,
        ended=row.ended,
    )
    return shown, verdict


def badges(connection: Connection, environment_id: int) -> dict[str, str]:
    """By version: the status with the newest library that it was looked at with."""
    found: dict[str, CheckRow] = {}
    for row in _rows(connection, environment_id):
        known = found.get(row.version)
        if known is None or Version(row.library) > Version(known.library):
            found[row.version] = row
    return {version: row.status for version, row in found.items()}


def checks_page(ask: Ask) -> Checks:
    with ask.hub.database.read() as connection:
        row = rights.environment(connection, ask.who, ask.path["owner"], ask.path["environment"])
        role = rights.role(connection, ask.who, row.owner_id, row.id)
        rows = _rows(connection, row.id)
        named = connection.execute(select(versions.c.version).where(versions.c.environment_id == row.id)).scalars()
        every = sorted(named, key=Version, reverse=True)[:_MOST_VERSIONS]
    libraries = sorted({one.library for one in rows}, key=Version, reverse=True)
    return Checks(
        owner=row.owner, name=row.name, versions=every, libraries=libraries, rows=rows, role=role.name.lower()
    )


def check_page(ask: Ask) -> Checked:
    with ask.hub.database.read() as connection:
        environment = rights.environment(connection, ask.who, ask.path["owner"], ask.path["environment"])
        query = select(checks, versions.c.version).join(versions, versions.c.id == checks.c.version_id)
        number = ask.path["check"]
        where = (checks.c.id == (int(number) if number.isascii() and number.isdigit() and len(number) < 10 else -1),)
        row = connection.execute(query.where(*where, versions.c.environment_id == environment.id)).first()
    if row is None:
        raise NotFoundError(f"{environment.owner}/{environment.name} has no check {number[:20]}")
    shown, verdict = _row(row)
    log = ""
    if row.log_sha256:
        with ask.hub.blobs.open(row.log_sha256) as content:
            log = content.read(2 * MOST_LOG).decode("utf-8", "replace")
    return Checked(owner=environment.owner, name=environment.name, row=shown, cases=verdict.cases, log=log)


def check_again(ask: Ask) -> answers.Done:
    """With this hub's library. Errors: NotFoundError, NotAllowedError."""
    owner, name, version = (ask.path[part] for part in ("owner", "environment", "version"))
    with ask.hub.database.write() as connection:
        row = rights.environment(connection, ask.who, owner, name, Role.WRITE)
        where = (versions.c.environment_id == row.id, versions.c.version == version)
        found = connection.execute(select(versions.c.id).where(*where)).scalar()
        if found is None:
            raise NotFoundError(f"there is no version {version[:100]} of {owner}/{name}")
        queue.enqueue(connection, found, __version__)
        audit.record(connection, ask.who, "version.check", f"{owner}/{name}=={version}", library=__version__)
    ask.hub.on_pushed()
    return answers.Done(f"{owner}/{name}=={version}")


_HERE = "/{owner}/{environment}/checks"
PAGES = (
    Page(_HERE, "Checks", queries.Nothing, Checks, checks_page, "hub/checks.html"),
    Page(f"{_HERE}/{{check}}", "Check", queries.Nothing, Checked, check_page, "hub/check.html"),
)
_AGAIN = "/api/environments/{owner}/{environment}/versions/{version}/check"
ACTIONS = (Action(_AGAIN, "Check a version again", queries.Nothing, answers.Done, check_again),)
