"""Simulated against measured: `python benchmarks/simulate_check.py RUN [RUN ...]`.

Curves are measured from the first run; every run, with its own settings, is predicted from them. A machine that other
work shares is not as fast in one run as in another, so each prediction is made twice more. `at its speed`: lengths and
the shape of the engine's curve from the first run, the machine as fast as it was in that run. `its own`: all curves
from the run itself, which leaves only the loop to be compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from palestra.config import read_resolved
from palestra.core.errors import UserError
from palestra.orchestrate.simulate.curves import Curves
from palestra.orchestrate.simulate.loop import simulate
from palestra.orchestrate.simulate.measure import at_speed_of, curves_from, measured
from palestra.orchestrate.simulate.rules import rules_of
from palestra.wire.rundir import RunDir, require_run

_SEEDS = range(5)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Means over seeds. `*_ratio` is simulated over measured; `age_error` is a difference, for ages near 0."""

    run: str
    curves: str
    step_s: float
    simulated_step_s: float
    step_ratio: float
    age: float
    simulated_age: float
    age_error: float
    trainer_idle: float
    simulated_trainer_idle: float


def compare(run: RunDir, curves: Curves, name: str) -> Comparison:
    real, rules = measured(run), rules_of(read_resolved(run.config))
    found = [simulate(rules, curves, seed=seed, skip=real.skipped, steps=real.steps) for seed in _SEEDS]
    step_s, age, idle = (
        sum(getattr(outcome, field) for outcome in found) / len(found)
        for field in ("step_s", "mean_age", "trainer_idle")
    )
    return Comparison(
        run=run.name,
        curves=name,
        step_s=real.step_s,
        simulated_step_s=step_s,
        step_ratio=step_s / real.step_s,
        age=real.mean_age,
        simulated_age=age,
        age_error=age - real.mean_age,
        trainer_idle=real.trainer_idle,
        simulated_trainer_idle=idle,
    )


def comparisons(runs: Sequence[RunDir]) -> list[Comparison]:
    """Errors: UserError, for a run that does not tell enough."""
    first = curves_from(runs[0])
    rows = [compare(run, first, runs[0].name) for run in runs]
    for run in runs[1:]:
        rows += [compare(run, at_speed_of(run, first), "at its speed"), compare(run, curves_from(run), "its own")]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        rows = comparisons([require_run(path) for path in arguments.runs])
    except UserError as mistake:
        parser.error(str(mistake))
    if arguments.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=2)
        return
    table = Table("run", "curves", "step", "simulated", "ratio", "age", "simulated", "idle", "simulated", box=None)
    for row in rows:
        steps = f"{row.step_s:.2f} s", f"{row.simulated_step_s:.2f} s", f"{row.step_ratio:.2f}"
        idle = f"{row.trainer_idle:.0%}", f"{row.simulated_trainer_idle:.0%}"
        table.add_row(row.run, row.curves, *steps, f"{row.age:.2f}", f"{row.simulated_age:.2f}", *idle)
    Console().print(table)


if __name__ == "__main__":
    main()
