"""What a leaderboard says of one evaluation: how good, how sure, at what cost. Pure functions of its records.

Errors are never rewards: a rollout that is invalid is counted apart, and is in no mean.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from palestra.algo.intervals import Interval, over_tasks
from palestra.algo.scores import SOLVED_AT, by_task, cause, of_rewards, pass_at_k, powers
from palestra.core.records import Ending, RolloutRecord

_MOST_CAUSES = 100  # whoever pushes an evaluation writes them


class Tokens(Struct, frozen=True, kw_only=True):
    """What the rollouts cost, invalid ones included: they were paid for too. None where nobody counted prompts."""

    completion: int
    prompt: int | None
    per_rollout: float  # of both, where both are known


class Standing(Struct, frozen=True, kw_only=True):
    """`reward` is the mean over rollouts; `avg_at_k` the mean over tasks of their means, `k` rollouts of each.

    `pass_at` by k: the chance that one of k rollouts of a task solves it, without bias.
    """

    reward: Interval
    avg_at_k: Interval
    pass_at: dict[str, Interval]
    k: int  # rollouts with a reward that every task has
    num_tasks: int
    num_rollouts: int  # with a reward
    num_errors: int
    errors: dict[str, int]  # by the first line of their cause
    endings: dict[str, int]
    tokens: Tokens


def standing(records: Sequence[RolloutRecord], *, seed: int = 0) -> Standing:
    """Errors: ValueError, if no rollout has a reward."""
    tasks = list(by_task(records).values())
    if not tasks:
        raise ValueError("no rollout has a reward")
    sums = [sum(record.reward for record in of_task) for of_task in tasks]
    counts = [len(of_task) for of_task in tasks]
    solved = [sum(record.reward >= SOLVED_AT for record in of_task) for of_task in tasks]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    k = min(counts)
    invalid = [record for record in records if record.ending == Ending.INVALID]
    return Standing(
        reward=_widened(over_tasks(sums, counts, seed=seed), len(tasks)),
        avg_at_k=_widened(over_tasks(means, seed=seed), len(tasks)),
        pass_at={str(one): _pass_at(counts, solved, one, seed) for one in powers(k)},
        k=k,
        num_tasks=len(tasks),
        num_rollouts=sum(counts),
        num_errors=len(invalid),
        errors=dict(Counter(cause(record) for record in invalid).most_common(_MOST_CAUSES)),
        endings=dict(Counter(str(record.ending) for record in records)),
        tokens=_tokens(records),
    )


def _pass_at(counts: Sequence[int], solved: Sequence[int], k: int, seed: int) -> Interval:
    chances = [pass_at_k(count, of_task, k) for count, of_task in zip(counts, solved, strict=True)]
    return _widened(over_tasks(chances, seed=seed), len(chances))


def _widened(found: Interval, num_tasks: int) -> Interval:
    """Where all are 0, or all 1, draws tell nothing: then the bound of `of_rewards`."""
    if found.low is None or found.value not in (0.0, 1.0) or found.low != found.high:
        return found
    bounds = of_rewards({str(task): [found.value] for task in range(num_tasks)})
    return msgspec.structs.replace(found, low=bounds.low, high=bounds.high)


def _tokens(records: Sequence[RolloutRecord]) -> Tokens:
    completion = sum(record.num_tokens for record in records)
    told = [record.num_prompt_tokens for record in records if record.num_turns and record.num_tokens]
    prompt = sum(record.num_prompt_tokens for record in records) if told and all(told) else None
    return Tokens(completion=completion, prompt=prompt, per_rollout=(completion + (prompt or 0)) / len(records))


# --- two evaluations beside each other


class TaskPair(Struct, frozen=True, kw_only=True):
    """A task that both have: the mean reward of each."""

    key: str
    one: float
    other: float

    @property
    def difference(self) -> float:
        return self.other - self.one

    @property
    def outcome(self) -> str:
        """won or lost, by `other`; or alike: within 1e-9."""
        if abs(self.difference) <= _ALIKE:
            return "alike"
        return "won" if self.difference > 0 else "lost"


class Duel(Struct, frozen=True, kw_only=True):
    """`difference` is that of `other` minus `one`, each task against itself; `won` by `other`."""

    difference: Interval
    won: int
    lost: int
    alike: int
    pairs: list[TaskPair]  # the largest difference first
    only_one: int  # tasks that the other evaluation lacks
    only_other: int


_ALIKE = 1e-9


def duel(one: dict[str, float], other: dict[str, float], *, seed: int = 0) -> Duel:
    """Of mean rewards by task. Errors: ValueError, if they share no task."""
    shared = sorted(one.keys() & other.keys())
    if not shared:
        raise ValueError("no task is in both")
    pairs = [TaskPair(key=key, one=one[key], other=other[key]) for key in shared]
    return Duel(
        difference=over_tasks([pair.difference for pair in pairs], seed=seed),
        won=sum(pair.outcome == "won" for pair in pairs),
        lost=sum(pair.outcome == "lost" for pair in pairs),
        alike=sum(pair.outcome == "alike" for pair in pairs),
        pairs=sorted(pairs, key=lambda pair: (-abs(pair.difference), pair.key)),
        only_one=len(one.keys() - other.keys()),
        only_other=len(other.keys() - one.keys()),
    )
