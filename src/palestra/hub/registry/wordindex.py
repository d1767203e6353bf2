"""The index of words: FTS5 in SQLite, tsvector in PostgreSQL. Found words may be beginnings of longer ones."""

import json
import re
from typing import Any

from sqlalchemy import Connection, Float, Integer, Select, TextClause, column, select, text

from palestra.hub.registry.schema import environments, owners

_MAX_README = 100_000  # characters of it that are looked through
_MAX_WORDS = 12
_WORD = re.compile(r"\w+", re.UNICODE)

_PUT_SQLITE = (
    "INSERT INTO search (rowid, name, owner, tags, summary, readme) "
    "VALUES (:id, :name, :owner, :tags, :summary, :readme)"
)
_PUT_POSTGRESQL = (
    "INSERT INTO search (environment_id, words) VALUES (:id,"
    " setweight(to_tsvector('english', :name), 'A') || setweight(to_tsvector('english', :owner || ' ' || :tags), 'B')"
    " || setweight(to_tsvector('english', :summary), 'C') || setweight(to_tsvector('english', :readme), 'D'))"
)


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
        "readme": readme[:_MAX_README],
    }
    drop(connection, environment_id, is_sqlite=is_sqlite)
    connection.execute(text(_PUT_SQLITE if is_sqlite else _PUT_POSTGRESQL), values)


def drop(connection: Connection, environment_id: int, *, is_sqlite: bool) -> None:
    key = "rowid" if is_sqlite else "environment_id"
    connection.execute(text(f"DELETE FROM search WHERE {key} = :id"), {"id": environment_id})


def matching(query: Select[Any], words: str, *, is_sqlite: bool) -> Select[Any]:
    """`query` over `environments`, only those that have all `words`, the best first."""
    found = _WORD.findall(words)[:_MAX_WORDS]
    if not found:
        return query.where(text("1 = 0"))
    if is_sqlite:
        pattern = " ".join(f'"{word}"*' for word in found)
        matched = text(
            "SELECT rowid AS id, bm25(search, 10, 5, 5, 3, 1) AS place FROM search WHERE search MATCH :words"
        )
    else:
        pattern = " & ".join(f"{word}:*" for word in found)
        matched = text(
            "SELECT environment_id AS id, -ts_rank(words, to_tsquery('english', :words)) AS place FROM search "
            "WHERE words @@ to_tsquery('english', :words)"
        )
    place = _places(matched, pattern)
    return query.join(place, place.c.id == environments.c.id).order_by(place.c.place, environments.c.id)


def _places(matched: TextClause, pattern: str):
    return matched.bindparams(words=pattern).columns(column("id", Integer), column("place", Float)).subquery("found")
