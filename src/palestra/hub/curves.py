"""Metrics of a run as curves, what happened beside them, and where the time went, in slices.

Legend: P points of a curve, B slices of time.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from palestra.core.ledger import LedgerEntry, total
from palestra.hub.answers import Band, Curve, Mark
from palestra.wire.accounts import by_size

OVERVIEW = (
    "reward/trained",
    "age/mean",
    "age/max",
    "age/predicted",
    "train/rl/entropy",
    "train/ce/loss",
    "train/rl/mismatch_abs",
    "train/rl/mismatch_max",
    "rollout/tokens_per_s",
    "train/tokens_per_s",
)
NUM_SLICES = 160
_NOT_METRICS = {"step", "time", "phase", "rule", "text"}


def names_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row if name not in _NOT_METRICS)
    return sorted(names)


def curve(rows: Sequence[dict[str, Any]], name: str, most_points: int) -> Curve:
    """Values as they were written, thinned out evenly, the last one kept; of a step trained twice the later row counts.
    What a warm-up or another phase says is kept apart from steps: evaluations alone count with them."""
    found: dict[int, tuple[float, float]] = {}
    for row in rows:
        if name in row and (_is_step(row) or name.startswith("eval/")) and _is_number(row[name]):
            found[int(row["step"])] = (float(row.get("time", 0.0)), float(row[name]))
    steps = sorted(found)
    if len(steps) > most_points:
        kept = np.unique(np.linspace(0, len(steps) - 1, most_points).round().astype(int))
        steps = [steps[i] for i in kept.tolist()]
    times, values = ([found[step][i] for step in steps] for i in (0, 1))
    return Curve(name=name, steps=steps, times=times, values=values)


def _is_step(row: dict[str, Any]) -> bool:
    return "phase" not in row and "step" in row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def latest(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The row of the latest step, warm-up apart; empty before the first one."""
    steps = [row for row in rows if _is_step(row)]
    return max(steps, key=lambda row: (row["step"], row.get("time", 0.0)), default={})


# --- marks


def marks(
    rows: Sequence[dict[str, Any]], spans: Iterable[dict[str, Any]], restarts: Iterable[dict[str, Any]]
) -> list[Mark]:
    """In the order of time. A restart stands between the steps that ended before and after it."""
    steps = sorted((row.get("time", 0.0), row["step"]) for row in rows if _is_step(row))
    times, numbers = [time for time, _ in steps], [float(step) for _, step in steps]

    def at(time: float) -> float:
        return float(np.interp(time, times, numbers)) if times else 0.0

    found = [_of_span(row, at) for row in spans if row.get("name") in ("publish", "checkpoint", "evaluate")]
    for row in restarts:
        time = float(row.get("ended_at", 0.0))
        text = f"{row.get('process')} was started again: {row.get('why')}"
        found.append(Mark(kind="restart", step=at(time), time=time, text=text))
    for row in rows:
        if row.get("phase") == "warning":
            text, time = str(row.get("text", "")), float(row.get("time", 0.0))
            found.append(Mark(kind="warning", step=float(row.get("step", 0)), time=time, text=text))
    return sorted(found, key=lambda mark: mark.time)


def _of_span(row: dict[str, Any], at: Callable[[float], float]) -> Mark:
    kind = "evaluation" if row["name"] == "evaluate" else str(row["name"])
    end = float(row.get("started_at", 0.0)) + float(row.get("wall_s", 0.0))
    details = {
        "publish": f"version {row.get('version')} published in {float(row.get('wall_s', 0)):.2f} s",
        "checkpoint": f"checkpoint of version {row.get('version')}",
        "evaluation": f"{row.get('set')} measured at version {row.get('version')}",
    }
    return Mark(kind=kind, step=at(end), time=end, text=details[kind])


# --- where the time went


def bands(entries: Sequence[LedgerEntry], num_slices: int = NUM_SLICES) -> list[Band]:
    """One for each process; ranks of the trainer and workers are shown as what they are."""
    of_process: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        of_process.setdefault(entry.process, []).append(entry)
    if not entries:
        return []
    begin = min(entry.started_at for entry in entries)
    end = max(entry.started_at + entry.wall_s for entry in entries)
    edges_B = np.linspace(begin, max(end, begin + 1e-6), num_slices + 1)
    return [_band(name, of_process[name], edges_B) for name in sorted(of_process, key=_rank)]


def _rank(process: str) -> tuple[int, str]:
    order = ("trainer", "engine", "orchestrator", "env")
    return next((i for i, name in enumerate(order) if process.startswith(name)), len(order)), process


def _band(process: str, entries: list[LedgerEntry], edges_B: np.ndarray) -> Band:
    """An entry's seconds are spread evenly over its time: what it did when inside of it is not known."""
    whole = total(sorted(entries, key=lambda entry: entry.started_at))
    causes = [cause for cause, _ in by_size(whole)]
    spread = np.zeros((len(causes), len(edges_B) - 1))
    number = {cause: i for i, cause in enumerate(causes)}
    for entry in entries:
        if entry.wall_s <= 0:
            continue
        upto_B = np.clip((edges_B - entry.started_at) / entry.wall_s, 0.0, 1.0)
        share_B = np.diff(upto_B)
        where = slice(*_nonzero(share_B))
        for cause, seconds in entry.parts_s.items():
            spread[number[cause], where] += seconds * share_B[where]
    shares = spread / np.diff(edges_B)
    return Band(
        process=process,
        times=edges_B.tolist(),
        shares={cause: np.round(shares[i], 5).tolist() for cause, i in number.items()},
        seconds=dict(by_size(whole)),
        wall_s=whole.wall_s,
        closure=whole.closure,
    )


def _nonzero(values: np.ndarray) -> tuple[int, int]:
    found = np.flatnonzero(values)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)
