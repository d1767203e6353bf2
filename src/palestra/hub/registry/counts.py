"""Downloads, and when tokens were used: noted in memory and written now and then: no reader waits."""

import threading
import time
from collections import Counter
from datetime import UTC, datetime

from sqlalchemy import Table, select, update
from sqlalchemy.dialects import postgresql, sqlite

from palestra.hub.registry.database import Database
from palestra.hub.registry.schema import downloads, environments, files, tokens


class Counts:
    """Thread-safe. What a killed process has not written yet is lost: at most what came between two `flush`es."""

    def __init__(self, database: Database):
        self._database, self._lock = database, threading.Lock()
        self._waiting: Counter[tuple[int, str]] = Counter()
        self._used: dict[int, float] = {}

    def used(self, token_id: int) -> None:
        with self._lock:
            self._used[token_id] = time.time()

    def add(self, file_id: int, at: float | None = None) -> None:
        day = datetime.fromtimestamp(at or time.time(), UTC).date().isoformat()
        with self._lock:
            self._waiting[file_id, day] += 1

    def flush(self) -> None:
        """Write what has come; what cannot be written waits for the next time."""
        with self._lock:
            taken, self._waiting = self._waiting, Counter()
            used, self._used = self._used, {}
        if not taken and not used:
            return
        try:
            self._write(taken, used)
        except BaseException:
            with self._lock:
                self._waiting += taken
                self._used = used | self._used
            raise

    def _write(self, taken: Counter[tuple[int, str]], used: dict[int, float]) -> None:
        with self._database.write() as connection:
            for id, at in sorted(used.items()):
                connection.execute(update(tokens).where(tokens.c.id == id).values(last_used=at))
            of_file = {one for one, _ in taken}
            found = connection.execute(select(files.c.id, files.c.environment_id).where(files.c.id.in_(of_file)))
            environment = {row.id: row.environment_id for row in found}
            of_environment: Counter[int] = Counter()
            for (file, day), count in sorted(taken.items()):  # in order: two processes never wait for each other
                if file in environment:
                    connection.execute(_plus(self._database.is_sqlite, downloads), [_row(file, day, count)])
                    of_environment[environment[file]] += count
            for id, count in sorted(of_environment.items()):
                total = environments.c.num_downloads + count
                connection.execute(update(environments).where(environments.c.id == id).values(num_downloads=total))


def _row(file: int, day: str, count: int) -> dict[str, object]:
    return {"file_id": file, "day": day, "count": count}


def _plus(is_sqlite: bool, table: Table):
    insert = sqlite.insert(table) if is_sqlite else postgresql.insert(table)
    added = {"count": table.c.count + insert.excluded.count}
    return insert.on_conflict_do_update(index_elements=["file_id", "day"], set_=added)
