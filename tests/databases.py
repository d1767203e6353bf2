"""A real PostgreSQL for tests: a cluster in a directory of its own, and fresh databases in it."""

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from palestra.core.guard import Guard
from palestra.hub.registry.database import Database
from palestra.hub.registry.schema import SEARCH_TABLE, metadata
from tests.ports import free_port

_numbers = itertools.count()


def binaries() -> Path | None:
    """Debian's programs of the newest version, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: int(file.parts[-3]))
    return found[-1].parent if found else None


def _command(*words: str | Path) -> list[str]:
    """As somebody who is not root: PostgreSQL refuses to be."""
    return [*(("runuser", "-u", "postgres", "--") if os.geteuid() == 0 else ()), *map(str, words)]


class Cluster:
    """`fresh()` is the URL of a database that has the hub's schema and nothing else; it is one, emptied each time."""

    def __init__(self, port: int, user: str):
        self._server = f"postgresql://{user}@127.0.0.1:{port}"
        self._url = self.empty()
        database = Database(self._url)
        database.migrate()
        database.close()

    def fresh(self) -> str:
        tables = ", ".join([*metadata.tables, SEARCH_TABLE])
        self._execute(self._url, f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
        return self._url

    def empty(self) -> str:
        name = f"hub_{next(_numbers)}"
        self._execute(f"{self._server}/postgres", f"CREATE DATABASE {name}")
        return f"{self._server}/{name}"

    def _execute(self, url: str, statement: str) -> None:
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement)  # pyright: ignore[reportArgumentType, reportCallIssue]


@contextlib.contextmanager
def cluster(programs: Path) -> Iterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="palestra-pg-"))
    user, port, guard = "tester", free_port(), Guard()
    guard.remove(directory)
    try:
        if os.geteuid() == 0:
            shutil.chown(directory, "postgres")
        data = directory / "data"
        initdb = _command(programs / "initdb", "-D", data, "-U", user, "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        subprocess.run(initdb, check=True, capture_output=True, cwd=directory, timeout=60)
        options = f"-F -p {port} -h 127.0.0.1 -k {directory} -c max_connections=300 -c shared_buffers=64MB"
        pg_ctl = _command(programs / "pg_ctl", "-D", data, "-w", "-t", "60")
        log = directory / "log"
        start = [*pg_ctl, "-o", options, "-l", str(log), "start"]
        subprocess.run(start, check=True, capture_output=True, cwd=directory, timeout=90)
        group = int((data / "postmaster.pid").read_text().split()[0])
        guard.watch(group)  # tests that are killed leave no server
        try:
            yield Cluster(port, user)
        finally:
            subprocess.run([*pg_ctl, "-m", "immediate", "stop"], capture_output=True, cwd=directory, timeout=90)
            guard.ended(group)
    finally:
        guard.close()
