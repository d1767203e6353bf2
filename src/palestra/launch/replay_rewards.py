"""`palestra replay DIR --rewards`: an evaluation's rollouts, scored by the rewards as they are now."""

import asyncio
import json
import sys
from typing import Any

import msgspec

from palestra.algo.scores import scores
from palestra.config import read_resolved
from palestra.config.schema import RunConfig
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.core.records import Ending, RolloutRecord
from palestra.env.environment import Environment
from palestra.env.rescore import rescore
from palestra.env.sandbox import Sandboxes
from palestra.env.worker import set_stages
from palestra.wire.results import read_results
from palestra.wire.rundir import RunDir


def show(run: RunDir, *, as_json: bool) -> int:
    """Before and after by environment; the rollouts with their new rewards go to rescored.jsonl. 0.

    Errors: UserError, if there are no results, or an environment cannot be made.
    """
    if not run.results.exists():
        raise UserError(f"{run.path} has no results.jsonl; give a directory that `palestra eval` wrote to")
    known = read_results(run)
    found = asyncio.run(_rescore_all(read_resolved(run.config), known))
    for name, records in found.items():
        if all(record.ending == Ending.INVALID for record in records):
            raise UserError(f"{name}: no rollout gets a reward now; the first says: {records[0].error}")
    path = run.path / "rescored.jsonl"
    lines = [msgspec.json.encode(record) + b"\n" for records in found.values() for record in records]
    write_atomically(path, b"".join(lines))
    told = {name: _compared(list(known[name].values()), records) for name, records in found.items()}
    if as_json:
        json.dump(told, sys.stdout, indent=2)
        print()
        return 0
    for name, row in told.items():
        print(
            f"{name}: reward {row['before']:.3f} -> {row['after']:.3f}; {row['changed']} of {row['rollouts']} changed"
        )
    print(f"with their new rewards: {path}", file=sys.stderr)
    return 0


async def _rescore_all(config: RunConfig, known: dict[str, dict[int, RolloutRecord]]) -> dict[str, list[RolloutRecord]]:
    for entry in config.eval.sets:
        if entry.python is not None:
            raise UserError(
                f"{entry.label} is played by {entry.python}; run this by that Python: -m palestra.launch.cli"
            )
    stages, found = set_stages(config), {}
    for entry in config.eval.sets:
        records, count = known.get(entry.label, {}), entry.rollouts_per_task
        tasks: dict[int, list[RolloutRecord]] = {}
        for number in sorted(records):
            tasks.setdefault(number // count, []).append(records[number])
        environment, slots = stages[entry.label].environment, asyncio.Semaphore(config.engine.max_in_flight)
        async with Sandboxes(config.env.sandbox, config.sandbox):
            scored = await asyncio.gather(*(_rescore(environment, of_task, slots) for of_task in tasks.values()))
        found[entry.label] = [record for of_task in scored for record in of_task]
    return {name: records for name, records in found.items() if records}


async def _rescore(
    environment: Environment, records: list[RolloutRecord], slots: asyncio.Semaphore
) -> list[RolloutRecord]:
    """As many tasks at once as the evaluation played rollouts: rewards may ask a judge."""
    async with slots:
        return await rescore(environment, records)


def _compared(before: list[RolloutRecord], after: list[RolloutRecord]) -> dict[str, Any]:
    was = {record.rollout_id: (record.ending, record.reward) for record in before}
    changed = sum(was[record.rollout_id] != (record.ending, record.reward) for record in after)
    return {
        "before": scores(before)["reward"]["mean"],
        "after": scores(after)["reward"]["mean"],
        "changed": changed,
        "rollouts": len(after),
    }
