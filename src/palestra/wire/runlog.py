"""What a run tells about itself: metrics.jsonl, ledger.jsonl, curriculum.jsonl, summary.json, restarts.jsonl.

The orchestrator writes all but the last; the supervisor writes that one, and into the ledger what nobody else can
account for.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from palestra.core.clock import unix_now
from palestra.core.files import AppendFile, write_atomically
from palestra.core.ledger import LedgerEntry
from palestra.core.metrics import Metric, values
from palestra.wire.rundir import RunDir

Row = TypeVar("Row")

WARNING = "warning"  # phase of a row of metrics.jsonl that says something in words: `rule` and `text`


class RunLog:
    """Appends rows, each whole or not at all. Errors of whatever writes: InfrastructureError, if the disk is full."""

    def __init__(self, run: RunDir):
        self._run = run
        for path in (run.metrics, run.ledger):
            cut_torn_line(path)
        self._metrics, self._ledger = AppendFile(run.metrics), AppendFile(run.ledger)
        self._num_moves: int | None = None  # counted when they are first asked for

    def metrics(self, step: int, metrics: Mapping[str, Metric], **more: Any) -> None:
        """One row of metrics.jsonl. A metric without a value (0 of 0) is left out."""
        numbers = {name: value for name, value in values(metrics).items() if not math.isnan(value)}
        row = {"step": step, "time": unix_now(), **more, **numbers}
        self._metrics.append(json.dumps(row).encode() + b"\n")

    def ledger(self, entry: LedgerEntry) -> None:
        self._ledger.append(msgspec.json.encode(entry) + b"\n")

    def moves(self, rows: Sequence[Mapping[str, Any]], *, total: int) -> None:
        """The last rows of curriculum.jsonl, which has `total` then; those that are there are not written again."""
        if self._num_moves is None:
            cut_torn_line(self._run.moves)
            self._num_moves = len(_lines(self._run.moves))
        missing = rows[max(len(rows) - (total - self._num_moves), 0) :]
        if missing:
            with closing(AppendFile(self._run.moves)) as file:
                file.append("".join(json.dumps(row) + "\n" for row in missing).encode())
        self._num_moves += len(missing)

    def summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self._run.summary, (json.dumps(summary, indent=2) + "\n").encode())

    def close(self) -> None:
        self._metrics.close()
        self._ledger.close()


class Restarted(Struct, frozen=True, kw_only=True):
    """A process died and another took its place, `gone_s` later ready to work; None: it died again before that."""

    attempt: int
    process: str
    life: int  # of the one that took its place
    why: str
    ended_at: float
    gone_s: float | None


def append_restart(run: RunDir, restarted: Restarted) -> None:
    _append(run.restarts, restarted)


def read_restarts(run: RunDir) -> list[Restarted]:
    return read_rows(run.restarts, Restarted)


def as_rows(restarts: list[Restarted]) -> list[dict[str, Any]]:
    """For summary.json."""
    return [msgspec.to_builtins(restarted) for restarted in restarts]


def account_for_gap(run: RunDir, process: str, *, since: float, ended_at: float, started_at: float) -> None:
    """Ledger of a process (and its ranks) while it was gone: `restart`; what it had done since its last entry, or
    `since` the attempt began: `lost`."""
    entries = read_ledger(run)
    ranks = {entry.process for entry in entries if entry.process.startswith(f"{process}-")}
    for name in sorted({process, *ranks}):
        known = [entry.started_at + entry.wall_s for entry in entries if entry.process == name]
        begin = min(max([since, *known]), ended_at)
        parts = {"lost": ended_at - begin, "restart": started_at - ended_at}
        _append(run.ledger, LedgerEntry(process=name, started_at=begin, wall_s=started_at - begin, parts_s=parts))


def _append(path: Path, row: Struct) -> None:
    """On a line of its own, whatever was left before it. Errors: InfrastructureError, if it was not written whole."""
    is_torn = path.exists() and bool(data := path.read_bytes()) and not data.endswith(b"\n")
    with closing(AppendFile(path)) as file:
        file.append((b"\n" if is_torn else b"") + msgspec.json.encode(row) + b"\n")


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Rows in the order written; a step that was trained again after a resume is there twice, the later one counts."""
    return read_rows(run.metrics, dict[str, Any])


def read_moves(run: RunDir) -> list[dict[str, Any]]:
    """Moves between the pools of the curriculum, in the order they happened."""
    return read_rows(run.moves, dict[str, Any])


def read_warnings(run: RunDir) -> list[dict[str, Any]]:
    """`step`, `rule` and `text` of every warning of the run, in the order they were said."""
    rows = [row for row in read_metrics(run) if row.get("phase") == WARNING]
    return [{key: row[key] for key in ("step", "rule", "text")} for row in rows]


def read_ledger(run: RunDir) -> list[LedgerEntry]:
    return read_rows(run.ledger, LedgerEntry)


def read_spans(run: RunDir, process: str) -> list[dict[str, Any]]:
    """Rows of `core.spans`, in the order they ended."""
    return read_rows(run.spans(process), dict[str, Any])


def read_summary(run: RunDir) -> dict[str, Any] | None:
    return json.loads(run.summary.read_text()) if run.summary.exists() else None


def cut_torn_line(path: Path) -> None:
    """A kill or a full disk may have left half a line: the next one must not be joined to it."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Of every line that was written whole: a full disk may have left half of one."""
    rows: list[Row] = []
    for line in _lines(path):
        with contextlib.suppress(msgspec.DecodeError):
            rows.append(msgspec.json.decode(line, type=kind))
    return rows


def _lines(path: Path) -> list[bytes]:
    """Lines that were written to their end."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
