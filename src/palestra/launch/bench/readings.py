"""From what runs wrote to the numbers of the bench. Pure functions of rows, ledger entries, spans and `Alone`s.

A loop is read over a window of whole steps: its first steps, which fill the pipeline, and its last ones, for which
nothing more is generated, say nothing of how it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palestra.core.ledger import LedgerEntry
from palestra.launch.bench.bare import Alone

Row = dict[str, Any]

_EDGE_S = 0.05  # rows and ledger entries of one step are written within this
_PUBLISH_PARTS = ("pause", "load", "resume")


@dataclass(frozen=True)
class Window:
    """Steps (first, last], from the end of `first` to the end of `last` on the clock of all processes."""

    first: int
    last: int
    began_at: float
    ended_at: float

    @property
    def steps(self) -> int:
        return self.last - self.first

    @property
    def step_s(self) -> float:
        return (self.ended_at - self.began_at) / self.steps


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One run of the loop. Shares are by cause of a process's ledger, within the window."""

    window: Window
    sampled_tokens_per_step: float  # of the rollouts that were trained
    tokens_per_step: float  # prompts too
    sampled_tokens_per_s: float
    shares: dict[str, dict[str, float]]
    stall_parts_s: dict[str, float]
    mean_age: float
    reward: float
    packing_fill: float
    wire_bytes_per_token: float
    loop_lag_p99_ms: float

    @property
    def trainer_idle(self) -> float:
        return self.share("trainer", "wait_for_batch")

    @property
    def stall_s(self) -> float:
        """An engine cannot sample for so long per update."""
        return sum(self.stall_parts_s.values())

    def share(self, process: str, cause: str) -> float:
        """Mean over the processes whose names begin so."""
        found = [causes.get(cause, 0.0) for name, causes in self.shares.items() if name.startswith(process)]
        return sum(found) / len(found) if found else 0.0


def trained(rows: Sequence[Row]) -> dict[int, Row]:
    """Rows by step, warm-up and evaluations left out."""
    return {row["step"]: row for row in rows if "phase" not in row}


def window(rows: Sequence[Row], *, skip: int, leave: int) -> Window:
    """Without the first `skip` steps and the last `leave`. Errors: ValueError, if no step is left."""
    steps = trained(rows)
    first, last = skip - 1, max(steps) - leave
    if first not in steps or last <= first:
        raise ValueError(f"of {len(steps)} steps none is left without the first {skip} and the last {leave}")
    return Window(first, last, steps[first]["time"], steps[last]["time"])


def shares(entries: Sequence[LedgerEntry], within: Window) -> dict[str, dict[str, float]]:
    """process -> cause -> share of the wall of its entries that lie in the window."""
    parts: dict[str, dict[str, float]] = {}
    walls: dict[str, float] = {}
    for entry in entries:
        if entry.started_at < within.began_at - _EDGE_S or entry.started_at + entry.wall_s > within.ended_at + _EDGE_S:
            continue
        known = parts.setdefault(entry.process, {})
        walls[entry.process] = walls.get(entry.process, 0.0) + entry.wall_s
        for cause, seconds in entry.parts_s.items():
            known[cause] = known.get(cause, 0.0) + seconds
    return {name: {cause: s / walls[name] for cause, s in causes.items()} for name, causes in parts.items()}


def read(rows: Sequence[Row], entries: Sequence[LedgerEntry], *, rollouts_per_step: int, within: Window) -> Reading:
    steps = trained(rows)
    inside = [steps[step] for step in range(within.first + 1, within.last + 1)]
    found = shares(entries, within)
    sampled = sum(row.get("rollout/sampled_tokens", 0.0) * row.get("rollout/finished", 0.0) for row in inside)
    return Reading(
        window=within,
        sampled_tokens_per_step=rollouts_per_step * _mean(inside, "rollout/trained_tokens"),
        tokens_per_step=_mean(inside, "train/tokens"),
        sampled_tokens_per_s=sampled / (within.ended_at - within.began_at),
        shares=found,
        stall_parts_s=_stall_parts_s(inside, found, within),
        mean_age=_mean(inside, "age/mean"),
        reward=inside[-1]["reward/trained"],
        packing_fill=_mean(inside, "packing/fill"),
        wire_bytes_per_token=_mean(inside, "wire/bytes_per_token"),
        loop_lag_p99_ms=max(row["orchestrator/loop_lag_p99_ms"] for row in inside),
    )


def _mean(rows: Sequence[Row], key: str) -> float:
    found = [row[key] for row in rows if key in row]
    return sum(found) / len(found) if found else float("nan")


def _stall_parts_s(rows: Sequence[Row], found: dict[str, dict[str, float]], within: Window) -> dict[str, float]:
    """Per update. What stops an engine beside its three steps is `other`; prefilling again is booked in the ledger."""
    parts = {name: _mean(rows, f"publish/{name}_s") for name in _PUBLISH_PARTS}
    parts["other"] = max(0.0, _mean(rows, "publish/stopped_s") - sum(parts.values()))
    engines = [causes for name, causes in found.items() if name.startswith("engine")]
    publishes = sum("publish/stopped_s" in row for row in rows)
    again = sum(causes.get("prefill again", 0.0) for causes in engines) / max(len(engines), 1)
    parts["prefill_again"] = again * (within.ended_at - within.began_at) / max(publishes, 1)
    return parts


def train_s_per_token(rows: Sequence[Row], *, skip: int = 1) -> float:
    """Of a trainer alone, over its steps after the first `skip`, which set things up."""
    later = [row for step, row in sorted(trained(rows).items()) if step >= skip]
    return sum(row["train/step_s"] for row in later) / sum(row["train/tokens"] for row in later)


# --- the numbers


def generate_alone_s(reading: Reading, alone: Alone) -> float:
    """Seconds in which saturated engines alone sample the tokens of a step."""
    return reading.sampled_tokens_per_step / alone.saturated_tokens_per_s


def pipeline_efficiency(*, train_s: float, generate_s: float, step_s: float) -> float:
    """M1: the slower side alone against the step."""
    return max(train_s, generate_s) / step_s


def engine_utilisation(reading: Reading, alone: Alone) -> float:
    """M2: tokens/s in the loop against the same engines alone."""
    return reading.sampled_tokens_per_s / alone.saturated_tokens_per_s


def stall_decode_steps(reading: Reading, alone: Alone) -> float:
    """M3, in steps of decoding at the same concurrency."""
    return reading.stall_s / alone.decode_step_s


def overhead(*, ours_s: Sequence[float], bare_s: Sequence[float]) -> float:
    """M4: (ours - bare) / bare of the same rollouts."""
    return (sum(ours_s) - sum(bare_s)) / sum(bare_s)


def async_gain(*, sync_step_s: float, async_step_s: float) -> float:
    """S_async: how much faster a step is than one after the other."""
    return sync_step_s / async_step_s


def async_bound(*, in_turns_s: float, slower_s: float) -> float:
    """S_max: generating with its tail, then training, against the slower side alone, saturated; devices are apart."""
    return in_turns_s / slower_s


def lost_by_draining_s(alone: Alone) -> float:
    """What a publish costs that waits for rollouts to end: the tail, in which ever fewer run."""
    return max(0.0, alone.wall_s - alone.sampled_tokens / alone.saturated_tokens_per_s)


def waiting_bound(*, generate_s: float, lost_s: float, train_s: float) -> float:
    """How much faster steps can be whose updates are in flight than ones that lose so much at each publish."""
    return max(train_s, generate_s + lost_s) / max(train_s, generate_s)


def generate_walls_s(spans: Sequence[dict[str, Any]]) -> list[float]:
    """Of a run that never generates while it trains: from each version in the engines to the step's last group."""
    published = {s["version"]: s["started_at"] + s["wall_s"] for s in spans if s["name"] == "publish"}
    batches = {s["step"]: s["started_at"] for s in spans if s["name"] == "batch"}
    return [batches[step] - published[step] for step in sorted(batches) if step in published]


def closure(entries: Sequence[LedgerEntry]) -> float:
    """The worst process's |sum of parts - wall| / wall."""
    walls: dict[str, float] = {}
    booked: dict[str, float] = {}
    for entry in entries:
        walls[entry.process] = walls.get(entry.process, 0.0) + entry.wall_s
        booked[entry.process] = booked.get(entry.process, 0.0) + sum(entry.parts_s.values())
    return max((abs(booked[name] - wall) / wall for name, wall in walls.items() if wall), default=0.0)
