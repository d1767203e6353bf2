"""`palestra replay`: the trainer alone, fed with the recorded batches of a run, and how its steps differ."""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import UserError
from palestra.launch import run as training
from palestra.launch.machine import this_machine
from palestra.launch.plan import Plan, Program, Role, config_path, make_plan
from palestra.launch.start import Origin
from palestra.wire.rundir import RunDir, checkpoint_dir, link_or_copy, read_manifests
from palestra.wire.runlog import read_metrics

_CLOCK_SUFFIXES = ("_s", "_ms", "per_s", "mfu")  # what depends on the machine's speed is not compared


@dataclass(frozen=True)
class Difference:
    """One metric over all steps: the largest absolute difference and the first step that differs at all."""

    metric: str
    num_steps: int
    largest: float
    first_step: int | None


def show(run: RunDir, *, as_json: bool) -> None:
    copy = replay(run)
    differences = compare(read_metrics(run), read_metrics(copy))
    if as_json:
        json.dump({"replay": str(copy.path), "metrics": [asdict(one) for one in differences]}, sys.stdout, indent=2)
        print()
        return
    print(in_words(differences), file=sys.stderr)
    table = Table("metric", "steps", "largest difference", "first at step", box=None, pad_edge=False)
    for one in differences:
        at = "-" if one.first_step is None else str(one.first_step)
        table.add_row(one.metric, str(one.num_steps), f"{one.largest:.3g}", at)
    Console(highlight=False).print(table)


def in_words(differences: list[Difference]) -> str:
    if not differences:
        return "no step of the run was recorded: there is nothing to compare with"
    differing = [one for one in differences if one.first_step is not None]
    steps = max(one.num_steps for one in differences)
    if not differing:
        return f"identical: {len(differences)} metrics over {steps} steps"
    first = min(one.first_step for one in differing if one.first_step is not None)
    return f"{len(differing)} of {len(differences)} metrics differ over {steps} steps, the first at step {first}"


def replay(run: RunDir) -> RunDir:
    """Train the batches of `run` again in RUN-replay; returns that run.

    Errors: UserError, if there are no batches to start from, or RUN-replay exists.
    """
    origin = origin_of(run)
    config, copy = copy_of(run)
    link_record(run, copy, origin)
    plan = make_plan(config, this_machine(), is_model_built=copy.model.exists())
    training.carry_out(config, led_by("palestra.launch.feed", config, plan, names=("model", "trainer")), origin)
    return copy


def copy_of(run: RunDir) -> tuple[RunConfig, RunDir]:
    """Where a run is replayed: RUN-replay, beside it. Errors: UserError, if that exists."""
    before = read_resolved(run.config)
    # Elsewhere nobody is told of a replay.
    log = before.log.model_copy(update={"name": f"{run.name}-replay", "outputs": run.path.parent, "to": ()})
    # Its leader is not made to go on, and gives no turns: one process has the device to itself.
    launch = before.launch.model_copy(update={"max_restarts": 0, "turns": False})
    config = before.model_copy(update={"log": log, "launch": launch})
    copy = RunDir(config.run_dir)
    if copy.path.exists():
        raise UserError(f"{copy.path} exists; delete it, or keep it under another name")
    return config, copy


def origin_of(run: RunDir) -> Origin:
    """The earliest version that the batches on disk lead on from. Errors: UserError."""
    steps = run.batches.steps()
    if not steps:
        raise UserError(f"{run.path} has no recorded batches; they are kept where log.keep_batches is true")
    number = run.last_attempt_number()
    if steps[0] == 0:
        return Origin(number, None)
    versions = sorted(manifest.version for manifest in read_manifests(run) if manifest.version in steps)
    if not versions:
        raise UserError(
            f"{run.path} has batches from step {steps[0]} on, but no checkpoint to start from; "
            "batches from step 0 are kept where log.keep_batches is true"
        )
    return Origin(number, versions[0])


def link_record(run: RunDir, copy: RunDir, origin: Origin) -> None:
    """Batches, a built model and the checkpoint to start from; nothing in `run` can be changed through `copy`."""
    link(run.batches.directory, copy.batches.directory)
    link(run.model, copy.model)
    if origin.version is not None:
        link(checkpoint_dir(run, origin.version), checkpoint_dir(copy, origin.version))


def link(source: Path, target: Path) -> None:
    """A directory of the run under a second name, if there is one."""
    if source.exists():
        shutil.copytree(source, target, copy_function=link_or_copy)


def led_by(module: str, config: RunConfig, plan: Plan, *, names: Sequence[str]) -> Plan:
    """The plan's programs `names`, led by a feed instead of the orchestrator."""
    kept = tuple(program for program in plan.programs if program.name in names)
    lead = replace(plan.lead, argv=(sys.executable, "-m", module, config_path(config)), role=Role.LEAD)
    programs: tuple[Program, ...] = (*kept, lead)
    return replace(plan, programs=programs)


def compare(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[Difference]:
    """Metrics that both have, step by step, warm-up apart; of a step that was trained twice, the later row counts."""
    old, new = ({row["step"]: row for row in rows if "phase" not in row} for rows in (before, after))
    steps = sorted(old.keys() & new.keys())
    names = sorted({name for step in steps for name in old[step].keys() & new[step].keys() if _is_compared(name)})
    return [
        _difference(name, [(step, old[step][name], new[step][name]) for step in steps if name in old[step]])
        for name in names
    ]


def _difference(name: str, rows: list[tuple[int, float, float]]) -> Difference:
    gaps = {step: abs(one - other) for step, one, other in rows if not math.isclose(one, other, rel_tol=0, abs_tol=0)}
    return Difference(name, len(rows), max(gaps.values(), default=0.0), min(gaps, default=None))


def _is_compared(name: str) -> bool:
    return name not in ("step", "time") and not name.endswith(_CLOCK_SUFFIXES)
