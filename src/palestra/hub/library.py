"""The runs below a directory, and each run as it is now. Nothing is read before somebody asks for it.

What grows is read on from where the last look ended; how many runs are held in memory is bounded.
"""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec

from palestra.core.errors import PalestraError
from palestra.core.ledger import LedgerEntry
from palestra.hub import curves
from palestra.hub.answers import Indexed, RunRow
from palestra.hub.index import RunIndex
from palestra.hub.jsonlines import Growing, last_rows
from palestra.wire.rundir import RunDir
from palestra.wire.status import Status, read_status

MOST_OPEN = 6
_SEPARATOR = "~"  # of directories in an id; no name of a run holds it


class UnknownRunError(PalestraError):
    """There is no run of this id."""


class OpenRun:
    """One run's files, read as far as they go. Methods may be called from any thread."""

    def __init__(self, run_id: str, run: RunDir):
        self.id, self.run = run_id, run
        self.index = RunIndex(run)
        self._lock = threading.Lock()
        self._metrics, self._ledger = Growing(run.metrics), Growing(run.ledger)
        self._spans, self._restarts = Growing(run.spans("orchestrator")), Growing(run.restarts)
        self._moves = Growing(run.moves)

    def _rows(self, growing: Growing) -> list[dict[str, Any]]:
        with self._lock:  # held while what is new of one file is read, which ends
            growing.update()
            return growing.rows[:]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self._rows(self._metrics)

    @property
    def spans(self) -> list[dict[str, Any]]:
        return self._rows(self._spans)

    @property
    def restarts(self) -> list[dict[str, Any]]:
        return self._rows(self._restarts)

    @property
    def moves(self) -> list[dict[str, Any]]:
        return self._rows(self._moves)

    @property
    def ledger(self) -> list[LedgerEntry]:
        entries = []
        for row in self._rows(self._ledger):
            try:
                entries.append(msgspec.convert(row, LedgerEntry))
            except msgspec.ValidationError:
                continue
        return entries

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.run.config) or {}

    @property
    def kind(self) -> str:
        return _kind(self.config, self.run)

    @property
    def summary(self) -> dict[str, Any] | None:
        return read_json(self.run.summary)

    @property
    def group_size(self) -> int:
        return max(int(part(self.config, "algo", "group_size") or 1), 1)

    @property
    def model(self) -> Path | None:
        """Where its tokenizer is, if here."""
        given = part(self.config, "model", "path")
        places = [Path(given)] if given else []
        return next((place for place in [self.run.model, *places] if (place / "tokenizer.json").is_file()), None)

    @property
    def indexed(self) -> Indexed:
        parts = self.index.parts
        return Indexed(
            share=self.index.progress.share,
            num_rollouts=sum(of.num_rows for of in parts),
            num_training=sum(of.num_rows for of in parts if of.is_training),
        )


class Library:
    """Runs are directories with a config.json or a results.jsonl, at most two levels below `outputs`, or itself."""

    def __init__(self, outputs: Path):
        self.outputs = outputs
        self._lock = threading.Lock()
        self._open: OrderedDict[str, OpenRun] = OrderedDict()
        self._rows: dict[str, tuple[Any, RunRow]] = {}

    def directories(self) -> dict[str, RunDir]:
        """By id, in the order of ids."""
        if _is_run(self.outputs):
            return {self.outputs.resolve().name: RunDir(self.outputs)}
        found = {}
        for path in _subdirectories(self.outputs):
            if _is_run(path):
                found[path.name] = RunDir(path)
                continue
            for inner in _subdirectories(path):
                if _is_run(inner):
                    found[f"{path.name}{_SEPARATOR}{inner.name}"] = RunDir(inner)
        return dict(sorted(found.items()))

    def places(self) -> list[Path]:
        """Directories that are runs, or may become some."""
        if _is_run(self.outputs):
            return [self.outputs]
        first = _subdirectories(self.outputs)
        return [*first, *(inner for path in first if not _is_run(path) for inner in _subdirectories(path))]

    def open(self, run_id: str) -> OpenRun:
        """Errors: UnknownRunError. An id is looked up, never made a path."""
        run = self.directories().get(run_id)
        if run is None:
            raise UnknownRunError(f"there is no run {run_id[:200]!r} in {self.outputs}; / lists those that are there")
        with self._lock:  # held for lookups alone
            known = self._open.pop(run_id, None) or OpenRun(run_id, run)
            self._open[run_id] = known
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            return known

    def opened(self) -> list[OpenRun]:
        with self._lock:
            return list(self._open.values())

    def rows(self) -> list[RunRow]:
        """The latest first."""
        rows = [self.row(run_id, run) for run_id, run in self.directories().items()]
        return sorted(rows, key=lambda row: row.started_at or 0.0, reverse=True)

    def row(self, run_id: str, run: RunDir) -> RunRow:
        status = _status(run)
        mark = (status, *(_mtime(path) for path in (run.config, run.metrics, run.results)))
        known = self._rows.get(run_id)
        if known is None or known[0] != mark:
            known = self._rows[run_id] = (mark, _row(run_id, run, status))
        return known[1]


def _row(run_id: str, run: RunDir, status: Status | None) -> RunRow:
    config, newest = read_json(run.config) or {}, curves.latest(last_rows(run.metrics))
    ended_at = status.ended_at if status else 0.0
    kind = _kind(config, run)
    reward, age = newest.get("reward/trained"), newest.get("age/mean")
    return RunRow(
        id=run_id,
        name=run_id.replace(_SEPARATOR, "/"),
        kind=kind,
        state=status.state.value if status else ("imported" if run.results.exists() else "never started"),
        what=_what(config),
        steps=int(newest["step"]) + 1 if newest else 0,
        total_steps=part(config, "train", "steps") if kind in ("rl", "sft") else None,
        reward=reward,
        age=age,
        started_at=status.started_at if status else None,
        wall_s=ended_at - status.started_at if status and ended_at else None,
        error=(status.error.splitlines() or [""])[0] if status else "",
    )


def _kind(config: dict[str, Any], run: RunDir) -> str:
    if run.results.exists():
        return "eval"
    if part(config, "env", "mix"):
        return "rl"
    return "sft" if part(config, "data", "sources") else "eval" if part(config, "eval", "sets") else ""


def _what(config: dict[str, Any]) -> str:
    model = part(config, "model", "path") or part(config, "model", "build", "architecture") or ""
    sources = part(config, "env", "mix") or part(config, "eval", "sets") or []
    names = [str(one.get("name") or one.get("id")) for one in sources if isinstance(one, dict)]
    return f"{Path(str(model)).name} on {', '.join(dict.fromkeys(names))}" if names else str(model)


def part(tree: Any, *keys: str) -> Any:
    """A value inside of parsed JSON; None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def read_json(path: Path) -> dict[str, Any] | None:
    """None for what is not there, or is no object."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    return found if isinstance(found, dict) else None


def _status(run: RunDir) -> Status | None:
    try:
        return read_status(run)
    except (OSError, msgspec.DecodeError):
        return None


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "results.jsonl").is_file()


def _subdirectories(path: Path) -> list[Path]:
    try:
        return [inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith(".")]
    except OSError:
        return []


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
