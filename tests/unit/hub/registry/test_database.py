"""Transactions and migrations, of SQLite and of PostgreSQL."""

import sqlite3
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text

from palestra.core.errors import InfrastructureError, UserError
from palestra.hub.registry.database import ClashError, Database, sqlite_url
from palestra.hub.registry.schema import metadata, owners


@pytest.fixture
def database(database_url):
    found = Database(database_url)
    yield found
    found.close()


def test_migrations_make_the_tables_that_the_code_knows(database):
    with database.read() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    ours = [one for one in differences if "search" not in str(one)]  # the index of words is not among the tables
    assert ours == []


def test_without_a_column_of_the_schema_the_comparison_sees_it(database):
    with database.engine.connect() as connection:
        change = connection.begin()
        connection.execute(text("ALTER TABLE owners DROP COLUMN is_admin"))
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
        change.rollback()  # the database is of all tests
    assert any("is_admin" in str(one) for one in differences)


def test_processes_that_start_at_once_migrate_once(request, tmp_path):
    for url in (sqlite_url(tmp_path / "new.db"), request.getfixturevalue("postgresql").empty()):
        databases = [Database(url) for _ in range(4)]
        threads = [threading.Thread(target=one.migrate) for one in databases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        with databases[0].read() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["0001"]
        for one in databases:
            one.close()


def test_a_new_file_that_another_writes_to_is_waited_for(tmp_path, monkeypatch):
    """SQLite itself waits for nobody where a file turns to a log of what is written."""
    file, has_waited = tmp_path / "new.db", threading.Event()
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        def wait(_: float) -> None:
            if not has_waited.is_set():
                has_waited.set()
                other.execute("COMMIT")

        clock = SimpleNamespace(monotonic=time.monotonic, sleep=wait)
        monkeypatch.setattr("palestra.hub.registry.database.time", clock)
        opened = Database(sqlite_url(file))
        with opened.read() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        opened.close()
    assert has_waited.is_set()


def test_a_transaction_is_all_or_nothing(database):
    def add(name: str, *, fails: bool) -> None:
        with database.write() as connection:
            connection.execute(insert(owners).values(name=name, kind="person", created=0.0))
            if fails:
                raise RuntimeError("in the middle")

    add("alice", fails=False)
    with pytest.raises(RuntimeError):
        add("bob", fails=True)
    with database.read() as connection:
        assert connection.execute(select(owners.c.name)).scalars().all() == ["alice"]


def test_writers_take_turns_and_none_is_lost(database):
    with database.write() as connection:
        connection.execute(insert(owners).values(name="n", kind="person", created=0.0))

    def count() -> None:
        for _ in range(5):
            with database.write() as connection:
                connection.execute(owners.update().values(created=owners.c.created + 1))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with database.read() as connection:
        assert connection.execute(select(owners.c.created)).scalar_one() == 40


@pytest.mark.parametrize("url", ["mysql://host/name", "nothing", "sqlite://"])
def test_a_url_of_no_known_database_is_refused(url):
    with pytest.raises(UserError, match="--database"):
        Database(url)


def test_a_database_that_is_away_is_named_without_its_password():
    database = Database("postgresql://user:secret@127.0.0.1:1/hub")
    with pytest.raises(InfrastructureError, match=r"127\.0\.0\.1:1") as caught, database.read():
        pass
    assert "secret" not in str(caught.value)


def test_two_rows_where_one_can_be_is_a_clash(database):
    def add() -> None:
        with database.write() as connection:
            connection.execute(insert(owners).values(name="alice", kind="person", created=0.0))

    add()
    with pytest.raises(ClashError):
        add()
