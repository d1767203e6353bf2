"""The database: SQLite in the hub's directory, or PostgreSQL by its URL. One interface of transactions for both."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from palestra.core.errors import InfrastructureError, UserError

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_S = 20.0  # that a writer waits for its turn
_AGAIN_S = 0.02
_MIGRATION_LOCK = 0x70616C65737472  # PostgreSQL's advisory lock


class DatabaseError(InfrastructureError):
    """A database that does not answer, or not in time."""


class ClashError(UserError):
    """Two changes at once of which only one can be."""


class Database:
    """Errors of both transactions: DatabaseError, if the database does not answer; ClashError; those of SQLAlchemy."""

    def __init__(self, url: str | URL, *, pool: int = 16):
        """Connects when it is first used. Errors: UserError, for a URL that is none of a database known here."""
        self.url = _parsed(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _sqlite(self.url, pool) if self.is_sqlite else _postgresql(self.url, pool)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """What is seen within is of one moment (PostgreSQL: of one moment for each statement)."""
        with _answering(self.url), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: all of it on leaving, nothing of it after an error. SQLite's writers take turns."""
        with _answering(self.url), self.engine.connect() as connection:
            connection = connection.execution_options(is_writing=True)
            with connection.begin():
                yield connection

    def migrate(self, revision: str = "head") -> None:
        """To a newer schema, by default the newest, in one transaction. Of several processes, one does it."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self.write() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def close(self) -> None:
        self.engine.dispose()


def sqlite_url(file: Path) -> URL:
    return URL.create("sqlite", database=str(file))


def _parsed(url: str | URL) -> URL:
    try:
        found = make_url(url)
    except ArgumentError:
        raise UserError("--database is no URL; such as postgresql://user:password@host/name") from None
    backend = found.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return found.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and found.database:
        return found.set(drivername="sqlite")
    raise UserError(f"--database {backend}://... is not known; give postgresql://... or sqlite:///FILE")


@contextmanager
def _answering(url: URL) -> Iterator[None]:
    try:
        yield
    except (OperationalError, PoolTimeoutError) as error:
        shown = url.render_as_string(hide_password=True)
        raise DatabaseError(f"the database {shown} does not answer: {getattr(error, 'orig', error)}") from error
    except IntegrityError as error:
        raise ClashError("somebody else has changed the same at this moment; try again") from error


# --- engines


def _sqlite(url: URL, pool: int) -> Engine:
    engine = create_engine(url, pool_size=pool, max_overflow=0, pool_timeout=_BUSY_S, connect_args={"timeout": _BUSY_S})

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver guesses
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")  # what was answered as stored survives a loss of power
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        is_writing = connection.get_execution_options().get("is_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Of several that turn to it at once SQLite lets one, and has the others wait for nothing: they try again here."""
    ends = time.monotonic() + _BUSY_S
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                raise
            time.sleep(_AGAIN_S)


def _postgresql(url: URL, pool: int) -> Engine:
    return create_engine(
        url,
        pool_size=pool,
        max_overflow=0,
        pool_timeout=_BUSY_S,
        pool_pre_ping=True,
        connect_args={"connect_timeout": 10, "options": "-c lock_timeout=20s"},
    )
