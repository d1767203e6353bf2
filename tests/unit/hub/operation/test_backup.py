"""A copy is the hub, of one moment; what is not whole is refused."""

import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text, update

from palestra.core.errors import UserError
from palestra.hub.operation.backup import BadBackupError, backup, restore, verify
from palestra.hub.registry import schema
from palestra.hub.registry.blobs import Directory, MissingBlobError, put_bytes
from palestra.hub.registry.database import Database, sqlite_url

KINDS = ("sqlite", "postgresql")
WHEEL, METADATA, LOG = b"a wheel" * 999, b"Name: wordle", b"what a check said"


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str, str], tuple[Database, Directory]]]:
    """A hub's database of a kind, empty, and its blobs, by a name."""
    opened = []

    def make(kind: str, name: str) -> tuple[Database, Directory]:
        url = sqlite_url(tmp_path / f"{name}.db") if kind == "sqlite" else request.getfixturevalue("postgresql").empty()
        opened.append(Database(url))
        return opened[-1], Directory(tmp_path / f"{name}-blobs")

    yield make
    for database in opened:
        database.close()


def fill(database: Database, blobs: Directory) -> None:
    """A row in every table, two where it matters."""
    database.migrate()
    with tempfile.TemporaryDirectory() as incoming:
        wheel, metadata, log = (put_bytes(blobs, content, Path(incoming)) for content in (WHEEL, METADATA, LOG))
    rows = {
        "owners": [
            {"name": "alice", "kind": "person", "is_admin": True, "created": 1.25},
            {"name": "team", "kind": "organisation", "is_admin": False, "created": 0.1 + 0.2},
        ],
        "members": [{"organisation_id": 2, "person_id": 1, "role": "admin"}],
        "environments": [
            {"owner_id": 1, "name": "wordle", "visibility": "private", "summary": "Guess ☃ words", "tags": '["game"]'}
            | {"latest": "0.1.0", "num_downloads": 2**40, "created": 1.0, "updated": 2.0}
        ],
        "tokens": [
            {"prefix": "p", "hash": "h", "owner_id": 1, "scope": "read", "only_environment_id": 1, "created": 1.0}
        ],
        "sessions": [{"hash": "s", "token_id": 1, "csrf": "c", "expires": 9.0}],
        "versions": [
            {"environment_id": 1, "version": "0.1.0", "readme": "Letters, five\n", "uploaded_by": 1, "created": 1.0}
        ],
        "files": [
            {"environment_id": 1, "version_id": 1, "filename": "w.whl", "kind": "wheel", "size": len(WHEEL)}
            | {"sha256": wheel, "metadata_sha256": metadata, "created": 1.0}
        ],
        "dependencies": [{"version_id": 1, "name": "numpy", "requirement": "numpy>=2"}],
        "downloads": [{"file_id": 1, "day": "2026-01-31", "count": 3}],
        "audit": [
            {"at": 1.0, "actor_id": 1, "actor": "alice", "action": "version.push", "subject": "alice/wordle==0.1.0"}
        ],
        "evaluations": [
            {"id": "e1", "environment_id": 1, "version_id": 1, "owner_id": 1, "status": "stored", "created": 1.0}
        ],
        "checks": [{"version_id": 1, "library": "1.0", "status": "passed", "log_sha256": log, "created": 1.0}],
    }
    with database.write() as connection:
        for name, of in rows.items():
            connection.execute(insert(schema.metadata.tables[name]), of)


def contents(database: Database) -> dict[str, list[tuple]]:
    with database.read() as connection:
        return {
            table.name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for table in schema.metadata.sorted_tables
        }


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_what_is_restored_is_what_was_copied(make, tmp_path: Path, source: str, target: str):
    database, blobs = make(source, "one")
    fill(database, blobs)
    expected = contents(database)
    assert all(expected.values())  # the control: every table has something to lose
    backup(database, blobs, tmp_path / "copy")
    other, other_blobs = make(target, "other")
    restore(tmp_path / "copy", other, other_blobs)
    assert contents(other) == expected | {"sessions": []}
    assert {name for name, _ in other_blobs.names()} == {hashlib.sha256(b).hexdigest() for b in (WHEEL, METADATA, LOG)}
    with other.read() as connection:
        where = "search MATCH 'letters'" if target == "sqlite" else "words @@ to_tsquery('letters')"
        assert connection.execute(text(f"SELECT count(*) FROM search WHERE {where}")).scalar() == 1
    with other.write() as connection:  # numbers go on
        new = connection.execute(
            insert(schema.owners).values(name="bob", kind="person", created=1.0).returning(schema.owners.c.id)
        )
        assert new.scalar() == 3


def test_a_second_copy_takes_the_place_of_the_first(make, tmp_path: Path):
    database, blobs = make("sqlite", "one")
    fill(database, blobs)
    first = backup(database, blobs, tmp_path / "copy")
    with database.write() as connection:
        connection.execute(update(schema.owners).where(schema.owners.c.id == 1).values(name="alicia"))
    second = backup(database, blobs, tmp_path / "copy")
    assert verify(tmp_path / "copy") == second != first
    assert len(list((tmp_path / "copy").glob("tables-*"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_of_one_moment(make, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Somebody writes an owner and its line in the audit between the tables: both are in it, or neither."""
    database, blobs = make(kind, "one")
    fill(database, blobs)
    from palestra.hub.operation import backup as module

    written = module._written

    def slow(connection, table, *rest):
        found = written(connection, table, *rest)
        if table.name == "owners":
            thread = threading.Thread(target=_add, args=(database,))
            thread.start()
            thread.join(10)
        return found

    monkeypatch.setattr(module, "_written", slow)
    manifest = backup(database, blobs, tmp_path / "copy")
    assert len(contents(database)["owners"]) == 3  # the control: it was written meanwhile
    assert (manifest.tables["owners"].rows, manifest.tables["audit"].rows) == (2, 1)


def _add(database: Database) -> None:
    with database.write() as connection:
        connection.execute(insert(schema.owners).values(name="carol", kind="person", created=1.0))
        connection.execute(insert(schema.audit).values(at=1.0, action="owner.add", subject="carol"))


@pytest.mark.parametrize("hurt", ["row", "blob", "no blob", "no manifest", "no table"])
def test_what_is_not_whole_is_refused(make, tmp_path: Path, hurt: str):
    database, blobs = make("sqlite", "one")
    fill(database, blobs)
    copy = tmp_path / "copy"
    manifest = backup(database, blobs, copy)
    rows = copy / manifest.tables["owners"].file
    blob = copy / "blobs" / manifest.blobs[0][:2] / manifest.blobs[0]
    {
        "row": lambda: rows.write_bytes(rows.read_bytes().replace(b"alice", b"mallo")),
        "blob": lambda: blob.write_bytes(b"another"),
        "no blob": blob.unlink,
        "no manifest": (copy / "manifest.json").unlink,
        "no table": rows.unlink,
    }[hurt]()
    other, other_blobs = make("sqlite", "other")
    with pytest.raises(BadBackupError):
        restore(copy, other, other_blobs)
    assert list(other_blobs.names()) == []


def test_a_hub_that_has_something_is_left_as_it_is(make, tmp_path: Path):
    database, blobs = make("sqlite", "one")
    fill(database, blobs)
    backup(database, blobs, tmp_path / "copy")
    before = contents(database)
    with pytest.raises(UserError, match="empty"):
        restore(tmp_path / "copy", database, blobs)
    assert contents(database) == before


def test_a_content_that_is_lost_is_told_and_the_old_copy_stays(make, tmp_path: Path):
    database, blobs = make("sqlite", "one")
    fill(database, blobs)
    manifest = backup(database, blobs, tmp_path / "copy")
    with database.write() as connection:
        connection.execute(update(schema.checks).values(log_sha256="ab" * 32))
    with pytest.raises(MissingBlobError):
        backup(database, blobs, tmp_path / "copy")
    assert verify(tmp_path / "copy") == manifest
