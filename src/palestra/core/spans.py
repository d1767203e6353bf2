"""Spans: what a process did from when to when, one JSON line each, for the timeline of a run."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palestra.core.clock import unix_now
from palestra.core.files import AppendFile


class SpanLog:
    """Appends spans to one file. A line is written when its span ends; a killed process loses only open spans."""

    def __init__(self, path: Path, process: str):
        self._file, self._process = AppendFile(path), process

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[dict[str, Any]]:
        """Time the block; attributes set on the yielded dict inside the block are written too."""
        started_at, started = unix_now(), time.perf_counter()
        try:
            yield attributes
        finally:
            self.write(name, started_at, time.perf_counter() - started, attributes)

    def write(self, name: str, started_at: float, wall_s: float, attributes: dict[str, Any]) -> None:
        row = {"process": self._process, "name": name, "started_at": started_at, "wall_s": wall_s, **attributes}
        self._file.append(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        self._file.close()
