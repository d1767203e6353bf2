"""The index of words: FTS5 in SQLite, tsvector in PostgreSQL. Found words may be beginnings of longer ones."""

import json
import re
from typing import Any

from sqlalchemy import Connection, Float, Integer, Select, TextClause, column, select, text

from palestra.hub.registry.schema import environments, owners

_MAX_README = 100_000  # characters of it that are looked through
_MAX_WORDS = 12
_WORD = re.compile(r"\w+", re.UNICODE)


def put(connection: Connection, environment_id: int, readme: str, *, is_sqlite: bool) -> None:
    """Instead of what was there."""
    columns = (environments.c.name, environments.c.tags, environments.c.summary, owners.c.name.label("owner"))
    found = select(*columns).join(owners, owners.c.id == environments.c.owner_id)
    row = connection.execute(found.where(environments.c.id == environment_id)).one()
    values: dict[str, Any] = {
        "id": environment_id,
        "name": row.name.replace("-", " ") + " " + row.name,
        "owner": row.owner,
        "tags": " ".join(json.loads(row.tags)),
        "summary": row.summary,
        "readme": readme[:_MAX_README].replace("\0", " "),
    }
    drop(connection, environment_id, is_sqlite=is_sqlite)
    connection.execute(text(_PUT_SQLITE if is_sqlite else _PUT_POSTGRESQL = (
    "INSERT INTO search (environment_id, words) VALUES (:id,"
    " setweight(to_tsvector('english', :name), 'A') || setweight(to_tsvector('english', :owner || ' ' || :tags), 'B')"
    " || setweight(to_tsvector('english', :summary), 'C') || setweight(to_tsvector('english', :readme), 'D'))"
)
