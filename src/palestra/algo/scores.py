"""What an evaluation says: means with their uncertainty, pass@k, endings. Pure functions of its records.

Rollouts of one task are not independent, so standard errors are clustered by task (Miller 2024, arXiv:2411.00640).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from palestra.core.records import Ending, RolloutRecord

SOLVED_AT = 1.0  # a rollout of this reward or more has solved its task
_Z = 1.959964  # of the normal distribution, for 95 %
_LONGEST_CAUSE = 120  # characters


class Estimate(Struct, frozen=True, kw_only=True):
    """A mean over rollouts; `low` and `high` bound it with 95 %. None where one task alone tells nothing of others."""

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    num_rollouts: int
    num_tasks: int


def by_task(records: Sequence[RolloutRecord]) -> dict[str, list[RolloutRecord]]:
    """Records that have a reward, by the key of their task."""
    tasks: dict[str, list[RolloutRecord]] = {}
    for record in records:
        if record.ending != Ending.INVALID:
            tasks.setdefault(record.task.key, []).append(record)
    return tasks


def estimate(values: Mapping[str, Sequence[float]]) -> Estimate:
    """Of values by task. Errors: ValueError, if there are none."""
    clusters = [list(of_task) for of_task in values.values() if of_task]
    count = sum(map(len, clusters))
    if not count:
        raise ValueError("no rollout has a reward")
    mean = sum(map(sum, clusters)) / count
    num_tasks = len(clusters)
    if num_tasks < 2:
        return Estimate(mean=mean, standard_error=None, low=None, high=None, num_rollouts=count, num_tasks=num_tasks)
    spread = sum((sum(of_task) - mean * len(of_task)) ** 2 for of_task in clusters)
    error = math.sqrt(num_tasks / (num_tasks - 1) * spread) / count
    return Estimate(
        mean=mean,
        standard_error=error,
        low=mean - _Z * error,
        high=mean + _Z * error,
        num_rollouts=count,
        num_tasks=num_tasks,
    )


def of_rewards(values: Mapping[str, Sequence[float]]) -> Estimate:
    """`estimate`; but where all are 0, or all 1, which have no spread to judge by, the other bound is the share that
    tasks would still have shown none of with a chance of 5 % (the "rule of three": 3 / tasks)."""
    found = estimate(values)
    if found.standard_error != 0 or found.mean not in (0.0, 1.0):
        return found
    unseen = 1 - 0.05 ** (1 / found.num_tasks)
    low, high = (0.0, unseen) if found.mean == 0 else (1 - unseen, 1.0)
    return msgspec.structs.replace(found, low=low, high=high)


def pass_at_k(num: int, num_solved: int, k: int) -> float:
    """Chance that one of `k` rollouts solves, drawn without putting back (Chen et al. 2021, arXiv:2107.03374)."""
    return 1.0 - math.comb(num - num_solved, k) / math.comb(num, k)


def scores(records: Sequence[RolloutRecord]) -> dict[str, Any]:
    """The summary of one set. Errors: ValueError, if no rollout has a reward."""
    tasks = by_task(records)
    reward = of_rewards({key: [record.reward for record in of_task] for key, of_task in tasks.items()})
    valid = [record for of_task in tasks.values() for record in of_task]
    fewest = min(map(len, tasks.values()))
    return {
        "reward": _as_json(reward),
        "pass_at": {
            str(k): sum(pass_at_k(len(t), _solved(t), k) for t in tasks.values()) / len(tasks) for k in powers(fewest)
        },
        "rewards": _means([record.rewards for record in valid]),
        "metrics": _means([record.metrics for record in valid]),
        "tokens": sum(record.num_tokens for record in valid) / len(valid),
        "prompt_tokens": sum(record.num_prompt_tokens for record in valid) / len(valid),
        "turns": sum(record.num_turns for record in valid) / len(valid),
        "endings": dict(Counter(str(record.ending) for record in records)),
        "errors": dict(Counter(cause(record) for record in records if record.ending == Ending.INVALID)),
        "versions": sorted({version for record in records for version in record.versions}),
    }


def difference(one: Sequence[RolloutRecord], other: Sequence[RolloutRecord]) -> Estimate:
    """Reward of `other` minus that of `one`, over the tasks that both have, each against itself.

    Errors: ValueError, if they share no task.
    """
    before, after = task_means(one), task_means(other)
    shared = before.keys() & after.keys()
    if not shared:
        raise ValueError("no task is in both")
    return estimate({key: [after[key] - before[key]] for key in sorted(shared)})


def task_means(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """By the key of the task."""
    return {key: sum(r.reward for r in of_task) / len(of_task) for key, of_task in by_task(records).items()}


def _solved(records: Sequence[RolloutRecord]) -> int:
    return sum(record.reward >= SOLVED_AT for record in records)


def powers(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`, and itself."""
    return sorted({*(1 << power for power in range(largest.bit_length())), largest})


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cause(record: RolloutRecord) -> str:
    """Why it is invalid: the first line of its error."""
    first = record.error.splitlines()[0] if record.error else "no reason given"
    return first[:_LONGEST_CAUSE]


def _as_json(found: Estimate) -> dict[str, Any]:
    return {name: getattr(found, name) for name in found.__struct_fields__}
