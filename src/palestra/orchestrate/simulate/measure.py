"""Curves from the files of a finished run, and what the run itself was like, to compare."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import UserError
from palestra.core.ledger import LedgerEntry, total
from palestra.core.records import Ending, RolloutRecord
from palestra.orchestrate.simulate.curves import (
    Curves,
    EngineCurve,
    PublishCurve,
    Recorded,
    RecordedGroup,
    TrainerCurve,
)
from palestra.orchestrate.simulate.speed import Flights, Stop, fit_speed, relative_speed
from palestra.orchestrate.state import BatchShipped, Event, GroupClosed, GroupOpened, RolloutEnded
from palestra.wire.framelog import read_frames
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_ledger, read_metrics, read_spans

_OF_A_STEP = ("read_batch", "plan", "optimizer", "other")  # whatever the tokens
_OF_A_STAGE = ("stage", "probe", "record")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Means over the steps after the first `skipped` ones."""

    skipped: int
    steps: int
    step_s: float
    mean_age: float
    trainer_idle: float


def measured(run: RunDir) -> Measured:
    """Steps that ended before the evaluations at the start did, or are among the first tenth, do not count.

    Errors: UserError, if there are too few steps.
    """
    rows, entries = _steps(run), _trainer_entries(run)
    skip = _skip(run, rows)
    window_s = rows[-1]["time"] - rows[skip]["time"]
    num_steps = len(rows) - skip - 1
    waited_s = sum(entry.parts_s.get("wait_for_batch", 0.0) for entry in entries[skip + 1 : len(rows)])
    return Measured(
        skipped=skip,
        steps=num_steps,
        step_s=window_s / num_steps,
        mean_age=sum(row["age/mean"] for row in rows[skip + 1 :]) / num_steps,
        trainer_idle=waited_s / window_s,
    )


def curves_from(run: RunDir) -> Curves:
    """Errors: UserError, if the run's files do not tell what is needed."""
    config, rows = read_resolved(run.config), _steps(run)
    skip = _skip(run, rows)
    since, until = rows[skip]["time"], rows[-1]["time"]
    publishes = _publishes(run, since, until)
    groups, records = groups_of(run, config)
    return Curves(
        source=f"measured from {run.path}, {len(rows) - skip - 1} steps",
        engine=fit_speed(_flights(records, since, until), _stops(publishes), engines=config.engine.replicas),
        trainer=_trainer(run, config, rows, skip),
        publish=_publish(publishes, rows[skip + 1 :], config),
        batch_s=_batch_s(run, since, until, len(rows) - skip - 1),
        work=Recorded(groups=tuple(groups)),
    )


def at_speed_of(run: RunDir, curves: Curves) -> Curves:
    """Curves of another run, on a machine as fast as it was in this one: one factor for the engine, and this run's
    times of trainer and publishes. The shape of the engine's curve and the work stay the other's. Errors: UserError."""
    own, config, rows = curves_from(run), read_resolved(run.config), _steps(run)
    since, until = rows[_skip(run, rows)]["time"], rows[-1]["time"]
    _, records = groups_of(run, config)
    flights, stops = _flights(records, since, until), _stops(_publishes(run, since, until))
    factor = relative_speed(flights, stops, curves.engine, engines=config.engine.replicas)
    speeds = tuple(factor * speed for speed in curves.engine.tokens_per_s)
    engine = EngineCurve.model_validate({**curves.engine.model_dump(), "tokens_per_s": speeds})
    times = {"trainer": own.trainer, "publish": own.publish, "batch_s": own.batch_s}
    return curves.model_copy(update={"engine": engine, **times})


def _steps(run: RunDir) -> list[dict[str, Any]]:
    """The row of every step. Errors: UserError."""
    rows = {row["step"]: row for row in read_metrics(run) if "phase" not in row}
    if sorted(rows) != list(range(len(rows))) or len(rows) < 8:
        raise UserError(
            f"{run.path} has {len(rows)} steps in metrics.jsonl; curves need a run of at least 8, from 0 on"
        )
    if run.last_attempt_number() > 1:
        raise UserError(f"{run.path} was interrupted and resumed; take a run that was not: its pauses are no steps")
    return [rows[step] for step in range(len(rows))]


def _skip(run: RunDir, rows: Sequence[dict[str, Any]]) -> int:
    """Steps at the start that are not like the others."""
    evaluations = [span for span in read_spans(run, "orchestrator") if span["name"] == "evaluate"]
    early = [span["started_at"] + span["wall_s"] for span in evaluations if span["version"] == 0]  # others run beside
    evaluated = sum(row["time"] <= max(early, default=0.0) for row in rows)
    return min(max(3, len(rows) // 10, evaluated), len(rows) - 4)


# --- rollouts


def groups_of(run: RunDir, config: RunConfig) -> tuple[list[RecordedGroup], list[RolloutRecord]]:
    """Groups whose members ended, in dispatch order, and all rollouts that did. Errors: UserError."""
    positions: dict[int, float] = {}
    outcomes: dict[int, str] = {}
    records: dict[int, RolloutRecord] = {}
    shipped = 0
    for event in _events(run):
        match event:
            case GroupOpened(group_id=group_id):
                positions[group_id] = shipped / config.train.steps
            case RolloutEnded(record=record) if record.ending != Ending.INVALID:
                records[record.rollout_id] = record
            case GroupClosed(group_id=group_id, outcome=outcome):
                outcomes[group_id] = outcome
            case BatchShipped():
                shipped += 1
    if not records:
        raise UserError(f"{run.path} has no finished rollout in its journal")
    if not all(record.ended_at for record in records.values()):
        raise UserError(f"{run.path} does not tell when its rollouts ended: an older version made it; run it again")
    size = config.algo.group_size
    groups = []
    for group_id, outcome in sorted(outcomes.items()):
        members = [records[i] for i in range(group_id * size, (group_id + 1) * size) if i in records]
        if members:
            groups.append(_recorded(members, positions[group_id], trains=outcome == "ready"))
    return groups, list(records.values())


def _events(run: RunDir) -> Iterable[Event]:
    for path in sorted(run.journal.glob("*.frames")):
        for frame in read_frames(path):
            yield msgspec.msgpack.decode(frame, type=Event)


def _recorded(members: list[RolloutRecord], position: float, *, trains: bool) -> RecordedGroup:
    return RecordedGroup(
        position=position,
        trains=trains,
        sampled_tokens=tuple(record.num_sampled_tokens for record in members),
        prompt_tokens=tuple(_all_tokens(record) - record.num_sampled_tokens for record in members),
        turns=tuple(max(record.num_turns, 1) for record in members),
        env_s=tuple(max(record.wall_s - record.engine_s, 0.0) for record in members),
    )


def _all_tokens(record: RolloutRecord) -> int:
    return sum(len(sample.token_ids) for seat in record.seats for sample in seat.samples)


def _flights(records: list[RolloutRecord], since: float, until: float) -> Flights:
    inside = [r for r in records if r.ended_at > since and r.ended_at - r.wall_s < until and r.wall_s > 0]
    ended_s = np.array([record.ended_at for record in inside])
    wall_s = np.array([record.wall_s for record in inside])
    engine_s = np.array([record.engine_s for record in inside])
    tokens = np.array([float(record.num_sampled_tokens) for record in inside])
    return Flights(ended_s - wall_s, ended_s, tokens, np.minimum(engine_s / wall_s, 1.0))


# --- trainer and publishes


def _trainer_entries(run: RunDir) -> list[LedgerEntry]:
    """Of the first rank, one for each step."""
    return [entry for entry in read_ledger(run) if entry.process in ("trainer", "trainer-0")]


def _trainer(run: RunDir, config: RunConfig, rows: list[dict[str, Any]], skip: int) -> TrainerCurve:
    window = rows[skip + 1 :]
    spent = total(_trainer_entries(run)[skip + 1 : len(rows)]).parts_s
    saves = [span["wall_s"] for span in read_spans(run, "trainer-0") if span["name"] == "checkpoint"]
    return TrainerCurve(
        base_s=sum(spent.get(cause, 0.0) for cause in _OF_A_STEP) / len(window),
        s_per_token=spent["forward_backward"] / sum(row["train/tokens"] for row in window),
        gpus=config.train.num_ranks,
        stage_s=sum(spent.get(cause, 0.0) for cause in _OF_A_STAGE) / len(window) * config.sync.every,
        checkpoint_s=_mean(saves),
    )


def _publishes(run: RunDir, since: float, until: float) -> list[dict[str, Any]]:
    spans = [span for span in read_spans(run, "orchestrator") if span["name"] == "publish"]
    return [span for span in spans if since <= span["started_at"] <= until]


def _publish(publishes: list[dict[str, Any]], rows: list[dict[str, Any]], config: RunConfig) -> PublishCurve:
    turns = -(-config.engine.replicas // config.sync.at_once)
    stop_s = _mean([row["publish/stopped_s"] for row in rows if "publish/stopped_s" in row])
    turn_s = _mean([span["wall_s"] for span in publishes]) / turns
    return PublishCurve(stop_s=stop_s, probe_s=max(turn_s - stop_s, 0.0))


def _stops(publishes: list[dict[str, Any]]) -> list[Stop]:
    return [
        Stop(span["started_at"], span["started_at"] + span["wall_s"], min(span["stopped_s"] / span["wall_s"], 1.0))
        for span in publishes
    ]


def _batch_s(run: RunDir, since: float, until: float, steps: int) -> float:
    entries = [entry for entry in read_ledger(run) if entry.process == "orchestrator"]
    return sum(entry.parts_s.get("batch", 0.0) for entry in entries if since < entry.started_at < until) / steps


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
