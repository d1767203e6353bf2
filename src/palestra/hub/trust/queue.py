"""What waits to be examined: rows of `checks`, one for each version of an environment with each version of the library.

A row is claimed for a time, which whoever works at it makes longer; of one that died, another takes it over when that
time is over. Several processes on one database share the rows: SQLite's writers take turns, PostgreSQL's skip what
another one has locked.
"""

import time
from dataclasses import dataclass

import msgspec
from sqlalchemy import ColumnElement, Connection, and_, func, literal, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from palestra.hub.registry.database import Database
from palestra.hub.registry.schema import checks, versions
from palestra.hub.trust.verdict import Status, Verdict

LEASE_S = 60.0
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Job:
    """`attempt` tells it from what an earlier worker still does at the same row."""

    id: int
    version_id: int
    library: str
    attempt: int
    worker: str


def enqueue(connection: Connection, version_id: int, library: str) -> None:
    """Anew, if it was there: what the version has may have changed."""
    nothing = {"attempts": 0, "worker": "", "claimed_until": None, "ended": None, "result": "{}", "log_sha256": ""}
    fresh = {"status": Status.WAITING.value, "created": time.time(), **nothing}
    row = _insert(connection).values(version_id=version_id, library=library, **fresh)
    connection.execute(row.on_conflict_do_update(index_elements=[checks.c.version_id, checks.c.library], set_=fresh))


def enqueue_missing(database: Database, library: str) -> int:
    """Every version that was not pulled back and has no row for this library; how many."""
    is_known = select(checks.c.id).where(checks.c.version_id == versions.c.id, checks.c.library == library).exists()
    columns = (versions.c.id, literal(library), literal(Status.WAITING.value), literal(time.time()))
    wanted = select(*columns).where(~is_known, versions.c.yanked.is_(False))
    with database.write() as connection:
        rows = _insert(connection).from_select(["version_id", "library", "status", "created"], wanted)
        return len(connection.execute(rows.on_conflict_do_nothing().returning(checks.c.id)).all())


def _insert(connection: Connection):
    """Of several processes that insert the same row at once, none fails."""
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(checks)


def claim(database: Database, worker: str, library: str) -> Job | None:
    """The one that waits longest, for LEASE_S. One whose workers died too often is given up."""
    now = time.time()
    is_free = or_(checks.c.status == Status.WAITING.value, _has_run_out(now))
    oldest = select(checks).where(checks.c.library == library, is_free).order_by(checks.c.created, checks.c.id).limit(1)
    with database.write() as connection:
        while (row := connection.execute(oldest.with_for_update(skip_locked=True)).first()) is not None:
            if row.attempts >= MOST_ATTEMPTS:
                why = Verdict(status=Status.ERROR, why=f"{row.attempts} workers died or failed at it")
                connection.execute(_of(row.id).values(**_ended(why, "")))
                continue
            values = {"status": Status.RUNNING.value, "worker": worker, "attempts": row.attempts + 1}
            connection.execute(_of(row.id).values(claimed_until=now + LEASE_S, **values))
            return Job(row.id, row.version_id, row.library, row.attempts + 1, worker)
    return None


def renew(database: Database, job: Job) -> bool:
    """Whether it is still this worker's."""
    with database.write() as connection:
        return _mine(connection, job, claimed_until=time.time() + LEASE_S)


def finish(database: Database, job: Job, verdict: Verdict, log_sha256: str) -> bool:
    """Whether it was still this worker's; else nothing is changed."""
    with database.write() as connection:
        return _mine(connection, job, **_ended(verdict, log_sha256))


def give_back(database: Database, job: Job, *, is_fault: bool) -> None:
    """To be taken by another. `is_fault`: this machine failed at it, which counts as an attempt."""
    with database.write() as connection:
        attempts = job.attempt if is_fault else job.attempt - 1
        _mine(connection, job, status=Status.WAITING.value, worker="", claimed_until=None, attempts=attempts)


def counts(database: Database) -> dict[str, int]:
    """By status."""
    with database.read() as connection:
        found = connection.execute(select(checks.c.status, func.count()).group_by(checks.c.status)).all()
    return {status.value: 0 for status in Status} | {row[0]: row[1] for row in found}


def _has_run_out(now: float) -> ColumnElement[bool]:
    return and_(checks.c.status == Status.RUNNING.value, checks.c.claimed_until < now)


def _of(id: int):
    return update(checks).where(checks.c.id == id)


def _mine(connection: Connection, job: Job, **values: object) -> bool:
    is_mine = (checks.c.worker == job.worker, checks.c.attempts == job.attempt, checks.c.status == Status.RUNNING.value)
    return bool(connection.execute(_of(job.id).where(*is_mine).values(**values)).rowcount)


def _ended(verdict: Verdict, log_sha256: str) -> dict[str, object]:
    told = msgspec.structs.replace(verdict, log="")
    result = msgspec.json.encode(told).decode()
    return {
        "status": verdict.status.value,
        "result": result,
        "log_sha256": log_sha256,
        "claimed_until": None,
        "ended": time.time(),
    }
