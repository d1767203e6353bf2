"""A copy of a hub in a directory, and a hub made of one. Both databases have one form, so it moves between them.

    manifest.json          written last: the schema's revision, every file with its SHA-256, every blob
    tables-STAMP/*.jsonl   a table each, a row a line, all of one moment
    blobs/ab/abcd...       contents by their SHA-256; those of an earlier copy are not copied again

Sessions of browsers are left out: people log in again. The index of words is made anew.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, MetaData, Table, func, insert, inspect, select, text

from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.hub.registry import wordindex
from palestra.hub.registry.blobs import Blobs, Directory, MissingBlobError
from palestra.hub.registry.database import Database
from palestra.hub.registry.schema import SEARCH_TABLE, environments, versions

FORM = 1
_LEFT_OUT = ("alembic_version", "sessions")
_PIECE, _ROWS = 1 << 20, 1000


class Copied(Struct, frozen=True, kw_only=True):
    """A table's file, relative to the directory."""

    file: str
    rows: int
    sha256: str


class Manifest(Struct, frozen=True, kw_only=True):
    form: int
    revision: str
    made_at: float
    tables: dict[str, Copied]
    blobs: list[str]


class BadBackupError(UserError):
    """Not a copy of a hub, or not a whole one."""


# --- out of a hub


def backup(database: Database, blobs: Blobs, directory: Path) -> Manifest:
    """Beside a running hub. An earlier copy in `directory` holds until this one is whole, and is gone then.

    Errors: MissingBlobError, for a content that a row names and that is not there; OSError.
    """
    stamp = f"tables-{time.time_ns()}"
    (directory / stamp).mkdir(parents=True)
    with _one_moment(database) as connection:
        revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        tables = {table.name: _written(connection, table, directory, stamp) for table in _tables(connection)}
        named = _named(connection)
    _copy(blobs, Directory(directory / "blobs"), named)
    manifest = Manifest(form=FORM, revision=revision, made_at=time.time(), tables=tables, blobs=sorted(named))
    write_atomically(directory / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest)))
    for other in directory.glob("tables-*"):
        if other.name != stamp:
            shutil.rmtree(other)
    return manifest


@contextmanager
def _one_moment(database: Database) -> Iterator[Connection]:
    """All that is read within is of one moment: SQLite's transactions are so, PostgreSQL's when asked to be."""
    if database.is_sqlite:
        with database.read() as connection:
            yield connection
        return
    with database.engine.connect() as connection:
        yield connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _tables(connection: Connection) -> list[Table]:
    """As the database has them, those that are referred to first."""
    found = MetaData()
    names = [name for name in inspect(connection).get_table_names() if not name.startswith(SEARCH_TABLE)]
    found.reflect(connection, only=[name for name in names if name not in _LEFT_OUT])
    return found.sorted_tables


def _written(connection: Connection, table: Table, directory: Path, stamp: str) -> Copied:
    name, digest, num = f"{stamp}/{table.name}.jsonl", hashlib.sha256(), 0
    keys = list(table.primary_key.columns) or list(table.columns)
    with (directory / name).open("wb") as file:
        for row in connection.execute(select(table).order_by(*keys).execution_options(yield_per=_ROWS)).mappings():
            line = msgspec.json.encode(dict(row)) + b"\n"
            digest.update(line)
            file.write(line)
            num += 1
    return Copied(file=name, rows=num, sha256=digest.hexdigest())


def _named(connection: Connection) -> set[str]:
    """Every content that a row names: the columns `sha256` and `..._sha256`."""
    found: set[str] = set()
    for table in _tables(connection):
        for column in table.columns:
            if column.name == "sha256" or column.name.endswith("_sha256"):
                found.update(connection.execute(select(column).distinct()).scalars())
    return found - {""}


def _copy(source: Blobs, target: Blobs, names: Iterable[str]) -> None:
    """Errors: MissingBlobError; BadBackupError, for a content that is not what its name says."""
    with tempfile.TemporaryDirectory(prefix="palestra-blobs-") as scratch:
        for name in names:
            if target.exists(name):
                continue
            file, digest = Path(scratch) / name, hashlib.sha256()
            with source.open(name) as content, file.open("wb") as copy:
                while piece := content.read(_PIECE):
                    digest.update(piece)
                    copy.write(piece)
            if digest.hexdigest() != name:
                raise BadBackupError(f"the content {name} is not what it was when it was stored")
            target.put(file, name)
            file.unlink(missing_ok=True)


# --- into a hub


def verify(directory: Path) -> Manifest:
    """That a copy is whole, by the hash of every table and content. Errors: BadBackupError."""
    try:
        manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise BadBackupError(f"{directory} has no manifest.json of a copy that came to its end: {error}") from None
    if manifest.form != FORM:
        raise BadBackupError(f"{directory} has form {manifest.form}; this version reads {FORM}")
    blobs = Directory(directory / "blobs")
    for table, copied in manifest.tables.items():
        if not _is(directory / copied.file, copied.sha256):
            raise BadBackupError(f"{directory}: the rows of {table} are not those that were written")
    for name in manifest.blobs:
        try:
            with blobs.open(name) as content:
                is_whole = _hash(content) == name
        except MissingBlobError:
            raise BadBackupError(f"{directory}: the content {name} is missing") from None
        if not is_whole:
            raise BadBackupError(f"{directory}: the content {name} is not what was written")
    return manifest


def _is(file: Path, sha256: str) -> bool:
    try:
        with file.open("rb") as content:
            return _hash(content) == sha256
    except OSError:
        return False


def _hash(content: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := content.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def restore(directory: Path, database: Database, blobs: Blobs) -> Manifest:
    """Into an empty hub, brought to the newest schema. All of it or, in the database, nothing.

    Errors: BadBackupError; UserError, for a hub that has something.
    """
    manifest = verify(directory)
    database.migrate(manifest.revision)
    _copy(Directory(directory / "blobs"), blobs, manifest.blobs)
    with database.write() as connection:
        for table in _tables(connection):
            if connection.execute(select(table).limit(1)).first() is not None:
                raise UserError(f"this hub has rows in {table.name} already; restore into an empty one")
        for table in _tables(connection):
            if copied := manifest.tables.get(table.name):
                _fill(connection, table, directory / copied.file)
    database.migrate()
    with database.write() as connection:
        _index_words(connection, is_sqlite=database.is_sqlite)
    return manifest


def _fill(connection: Connection, table: Table, file: Path) -> None:
    with file.open("rb") as lines:
        rows: list[dict[str, Any]] = []
        for line in lines:
            rows.append(msgspec.json.decode(line))
            if len(rows) == _ROWS:
                connection.execute(insert(table), rows)
                rows = []
        if rows:
            connection.execute(insert(table), rows)
    if (
        connection.dialect.name == "postgresql"
        and "id" in table.columns
        and table.columns["id"].type.python_type is int
    ):
        highest = connection.execute(select(func.max(table.columns["id"]))).scalar()
        name = {"table": table.name, "highest": highest or 1, "is_called": highest is not None}
        connection.execute(text("SELECT setval(pg_get_serial_sequence(:table, 'id'), :highest, :is_called)"), name)


def _index_words(connection: Connection, *, is_sqlite: bool) -> None:
    at_latest = (versions.c.environment_id == environments.c.id) & (versions.c.version == environments.c.latest)
    found = select(environments.c.id, versions.c.readme).join(versions, at_latest, isouter=True)
    for row in connection.execute(found).all():
        wordindex.put(connection, row.id, row.readme or "", is_sqlite=is_sqlite)
