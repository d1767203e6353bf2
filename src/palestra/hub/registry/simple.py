"""The index of one project: HTML (PEP 503) and JSON (PEP 691, 700), with metadata (658, 714), yanks (592) and hashes.

An index is of one environment, so that nobody's distribution shadows another index's.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from threading import Lock
from typing import Any

import msgspec
from packaging.version import Version
from sqlalchemy import Connection, Row, select

from palestra.hub.registry.schema import files, versions

JSON, HTML, LEGACY_HTML = (
    "application/vnd.pypi.simple.v1+json",
    "application/vnd.pypi.simple.v1+html",
    "text/html",
)
_API_VERSION = "1.1"
_MOST_KEPT = 4096


def wanted(accept: str) -> str | None:
    """The kind of answer that the client likes best; None, if none that there is."""
    weights = {JSON: 0.0, HTML: 0.0, LEGACY_HTML: 0.0}
    exact: set[str] = set()
    for part in accept.split(",")[:20] if accept else ["text/html"]:
        kind, *parameters = (word.strip() for word in part.split(";"))
        kind = kind.lower().replace(".latest+", ".v1+")
        weight = _weight(parameters)
        for known in weights:
            if kind == known:
                weights[known] = weight
                exact.add(known)
            elif kind in ("*/*", "text/*") and known == LEGACY_HTML and known not in exact:
                weights[known] = weight
    best = max(weights, key=lambda one: weights[one])
    return best if weights[best] > 0 else None


def _weight(parameters: list[str]) -> float:
    for one in parameters:
        if match := re.fullmatch(r"q\s*=\s*(\d(?:\.\d{1,3})?)", one.lower()):
            return min(1.0, float(match.group(1)))
    return 1.0


@dataclass(frozen=True)
class Rendered:
    content: bytes
    kind: str
    etag: str


class Index:
    """Renders, and keeps what it rendered until the environment changes. Thread-safe."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, float, int, str, str], Rendered] = OrderedDict()
        self._lock = Lock()

    def project(self, connection: Connection, environment: Row[Any], base: str, kind: str) -> Rendered:
        """`base` is the address of the environment, as paths or with a host."""
        key = (environment.id, environment.created, environment.revision, base, kind)
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        rendered = _rendered(environment, _rows(connection, environment.id), base, kind)
        with self._lock:
            self._kept[key] = rendered
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return rendered


def projects(environment: Row[Any], kind: str) -> bytes:
    """The list of the one project that the index has; of none, before the first push."""
    names = [environment.project] if environment.project else []
    if kind == JSON:
        return msgspec.json.encode(
            {"meta": {"api-version": _API_VERSION}, "projects": [{"name": one} for one in names]}
        )
    links = "".join(f'<a href="{escape(one)}/">{escape(one)}</a><br>\n' for one in names)
    return _html("Simple index", links)


def _rows(connection: Connection, environment_id: int) -> list[Row[Any]]:
    columns = (files, versions.c.version, versions.c.requires_python, versions.c.yanked, versions.c.yanked_reason)
    found = select(*columns).join(versions, versions.c.id == files.c.version_id)
    rows = connection.execute(found.where(files.c.environment_id == environment_id)).all()
    return sorted(rows, key=lambda row: (Version(row.version), row.filename))


def _rendered(environment: Row[Any], rows: list[Row[Any]], base: str, kind: str) -> Rendered:
    born = int(environment.created * 1e6)  # the number of one that was deleted may be another's
    etag = f'"{environment.id}-{born}-{environment.revision}-{"j" if kind == JSON else "h"}"'
    content = _json(environment.project, rows, base) if kind == JSON else _page(environment.project, rows, base)
    return Rendered(content, kind if kind == JSON else f"{kind}; charset=utf-8", etag)


def _json(project: str, rows: list[Row[Any]], base: str) -> bytes:
    answer = {
        "meta": {"api-version": _API_VERSION},
        "name": project,
        "versions": list(dict.fromkeys(row.version for row in rows)),
        "files": [_file(row, base) for row in rows],
    }
    return msgspec.json.encode(answer)


def _file(row: Row[Any], base: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "filename": row.filename,
        "url": _url(row, base),
        "hashes": {"sha256": row.sha256},
        "size": row.size,
        "upload-time": datetime.fromtimestamp(row.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "yanked": (row.yanked_reason or True) if row.yanked else False,
    }
    if row.requires_python:
        found["requires-python"] = row.requires_python
    if row.kind == "wheel":
        found["core-metadata"] = {"sha256": row.metadata_sha256}
    return found


def _page(project: str, rows: list[Row[Any]], base: str) -> bytes:
    return _html(f"Links for {project}", "".join(_link(row, base) for row in rows))


def _link(row: Row[Any], base: str) -> str:
    attributes = f' href="{escape(_url(row, base))}#sha256={row.sha256}"'
    if row.requires_python:
        attributes += f' data-requires-python="{escape(row.requires_python)}"'
    if row.yanked:
        attributes += f' data-yanked="{escape(row.yanked_reason)}"'
    if row.kind == "wheel":
        attributes += f' data-core-metadata="sha256={row.metadata_sha256}"'
    return f"<a{attributes}>{escape(row.filename)}</a><br>\n"


def _url(row: Row[Any], base: str) -> str:
    return f"{base}/files/{row.sha256}/{row.filename}"


def _html(title: str, body: str) -> bytes:
    head = f'<meta name="pypi:repository-version" content="{_API_VERSION}">\n<title>{escape(title)}</title>'
    text = (
        f"<!DOCTYPE html>\n<html>\n<head>\n{head}\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )
    return text.encode()
