"""What a run tells about itself: metrics.jsonl, ledger.jsonl, summary.json. One process writes each run's files."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from palestra.core.ledger import LedgerEntry
from palestra.core.metrics import Metric, values
from palestra.wire.batches import write_atomically
from palestra.wire.rundir import RunDir


class RunLog:
    """Appends rows; each reaches the operating system before the call returns."""

    def __init__(self, run: RunDir):
        run.path.mkdir(parents=True, exist_ok=True)
        self._run = run
        for path in (run.metrics, run.ledger):
            _cut_torn_line(path)
        self._metrics = run.metrics.open("a", encoding="utf-8", buffering=1)
        self._ledger = run.ledger.open("a", encoding="utf-8", buffering=1)

    def metrics(self, step: int, metrics: Mapping[str, Metric], **more: Any) -> None:
        """One row of metrics.jsonl. A metric without a value (0 of 0) is left out."""
        numbers = {name: value for name, value in values(metrics).items() if not math.isnan(value)}
        self._metrics.write(json.dumps({"step": step, "time": time.time(), **more, **numbers}) + "\n")

    def ledger(self, entry: LedgerEntry) -> None:
        self._ledger.write(msgspec.json.encode(entry).decode() + "\n")

    def summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self._run.summary, (json.dumps(summary, indent=2) + "\n").encode())

    def close(self) -> None:
        self._metrics.close()
        self._ledger.close()


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Rows in the order written; a step that was trained again after a resume is there twice, the later one counts."""
    return [json.loads(line) for line in _whole_lines(run.metrics)]


def read_ledger(run: RunDir) -> list[LedgerEntry]:
    return [msgspec.json.decode(line, type=LedgerEntry) for line in _whole_lines(run.ledger)]


def read_spans(run: RunDir, process: str) -> list[dict[str, Any]]:
    """Rows of `core.spans`, in the order they ended."""
    return [json.loads(line) for line in _whole_lines(run.spans(process))]


def read_summary(run: RunDir) -> dict[str, Any] | None:
    return json.loads(run.summary.read_text()) if run.summary.exists() else None


def _cut_torn_line(path: Path) -> None:
    """A kill or a full disk may have left half a line: the next one must not be joined to it."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _whole_lines(path: Path) -> list[str]:
    """Lines that were written to their end."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
