"""A file of JSON lines that grows, read once: each look takes up where the one before ended."""

import os
from pathlib import Path
from typing import Any

import msgspec

_TAIL_BYTES = 1 << 18


class Growing:
    """Rows of whole lines in order; what is no JSON object is left out. A file that was written anew is read anew."""

    def __init__(self, path: Path):
        self._path, self._end, self._inode = path, 0, 0
        self.rows: list[dict[str, Any]] = []

    def update(self) -> bool:
        """Whether there are new rows."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._end:
                    self.rows, self._end, self._inode = [], 0, stat.st_ino
                file.seek(self._end)
                data = file.read()
        except OSError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        self._end += len(whole)
        fresh = parsed(whole)
        self.rows += fresh
        return bool(fresh)


def parsed(data: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in data.split(b"\n"):
        try:
            row = msgspec.json.decode(line) if line else None
        except msgspec.DecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Of the file's end, without reading what is before it; empty for a file that is not there."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - _TAIL_BYTES, 0))
            data = file.read()
    except OSError:
        return []
    begin = data.find(b"\n") + 1 if size > _TAIL_BYTES else 0
    return parsed(data[begin : data.rfind(b"\n") + 1])
