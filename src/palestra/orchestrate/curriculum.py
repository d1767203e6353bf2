"""The curriculum: which pool a task is in, and which pool the next task comes from. Pure.

A task that was read is in exactly one pool of its source, by its rate: what the rollouts of its last groups were worth.
A pool is a queue: tasks never drawn come first, then the one drawn longest ago, so each is drawn once before any is
drawn twice. Observations wait until `rate` is asked; between two ratings no draw depends on which group ended first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct, field

from palestra.core.metrics import Last, Mean, Metrics
from palestra.core.records import Ending, RolloutRecord, Task

_SLACK = 1e-9  # weighted rewards of 1.0 are sums of floats
_REPEATS = 4  # an endless source that brings nothing new this often over is known whole


class Pool(StrEnum):
    EASY = "easy"
    NORMAL = "normal"
    HARD = "hard"
    RETIRED = "retired"


class Result(Struct, frozen=True, array_like=True):
    """Valid rollouts of one group of a task, or of the file it was seeded from: their worth together, and how many."""

    total: float
    count: int


class Standing(Struct, frozen=True, array_like=True):
    """What is known of a task: where it stands in its source, when it was drawn last, its last results, oldest first.

    `drawn_at` is the group it was drawn for, -1 for none.
    """

    epoch: int
    offset: int
    drawn_at: int = -1
    recent: tuple[Result, ...] = ()


class Found(Struct, frozen=True, array_like=True):
    """A task met for the first time."""

    key: str
    pool: Pool
    standing: Standing


class Observation(Struct, frozen=True, array_like=True):
    """What a closed group tells of its task, before it counts."""

    group_id: int
    key: str
    result: Result


class Rating(Struct, frozen=True, kw_only=True):
    """A task's results after new ones, and the pool it was in and is in now."""

    source: str
    key: str
    recent: tuple[Result, ...]
    before: Pool
    after: Pool

    @property
    def rate(self) -> float:
        return rate_of(self.recent).value


@dataclass(frozen=True)
class Rules:
    """The part of the config that the curriculum needs. `weights` are positive: pools that are drawn from."""

    weights: dict[Pool, float]
    easy_above: float
    hard_below: float
    window_groups: int
    retire_at: float
    retire_rollouts: int
    solved_at: float | None  # reward from which a rollout is worth 1, others 0; None: worth its reward
    rest_groups: int  # a task is not drawn again for so many groups, where another can be
    remember: int
    seed: int


class Queue(Struct, kw_only=True):
    """The tasks of one pool, and the sum of their results."""

    fresh: dict[str, Standing] = field(default_factory=dict)  # never drawn
    drawn: dict[str, Standing] = field(default_factory=dict)  # longest ago first
    total: float = 0.0
    count: int = 0

    def __len__(self) -> int:
        return len(self.fresh) + len(self.drawn)

    def __contains__(self, key: str) -> bool:
        return key in self.fresh or key in self.drawn

    def __getitem__(self, key: str) -> Standing:
        return self.fresh[key] if key in self.fresh else self.drawn[key]

    @property
    def head(self) -> str:
        """The key that is drawn next. Errors: StopIteration, if the pool is empty."""
        return next(iter(self.fresh or self.drawn))

    def put(self, key: str, standing: Standing) -> None:
        """At the end."""
        (self.fresh if standing.drawn_at < 0 else self.drawn)[key] = standing
        self._count(standing, 1)

    def take(self, key: str) -> Standing:
        standing = self.fresh.pop(key) if key in self.fresh else self.drawn.pop(key)
        self._count(standing, -1)
        return standing

    def replace(self, key: str, standing: Standing) -> None:
        """In its place."""
        queue = self.fresh if key in self.fresh else self.drawn
        self._count(queue[key], -1)
        queue[key] = standing
        self._count(standing, 1)

    def _count(self, standing: Standing, sign: int) -> None:
        rate = rate_of(standing.recent)
        self.total += sign * rate.total
        self.count += sign * int(rate.count)


class SourcePools(Struct, kw_only=True):
    """The pools of one source. Only events change them.

    `pending` are observations that do not count yet; `barren` tasks were read in a row that were known already;
    `is_whole`: nothing new is expected of the source, it is not read any more.
    """

    easy: Queue = field(default_factory=Queue)
    normal: Queue = field(default_factory=Queue)
    hard: Queue = field(default_factory=Queue)
    retired: Queue = field(default_factory=Queue)
    pending: list[Observation] = field(default_factory=list)
    barren: int = 0
    is_whole: bool = False

    def __getitem__(self, pool: Pool) -> Queue:
        return getattr(self, pool)

    @property
    def num_tasks(self) -> int:
        return sum(len(self[pool]) for pool in Pool)

    def pool_of(self, key: str) -> Pool | None:
        return next((pool for pool in Pool if key in self[pool]), None)

    # --- what events do

    def read(self, found: Iterable[Found], forgotten: Iterable[str], *, barren: int, is_whole: bool) -> None:
        for key in forgotten:
            self.forget(key)
        for task in found:
            self[task.pool].put(task.key, task.standing)
        self.barren, self.is_whole = barren, is_whole

    def forget(self, key: str) -> None:
        if (pool := self.pool_of(key)) is not None:
            self[pool].take(key)

    def draw(self, key: str, group_id: int) -> None:
        """To the end of its pool, which may be another one by now than the one it was drawn from."""
        if (pool := self.pool_of(key)) is not None:
            standing = self[pool].take(key)
            self[pool].put(key, msgspec.structs.replace(standing, drawn_at=group_id))

    def rate(self, rating: Rating) -> None:
        standing = msgspec.structs.replace(self[rating.before][rating.key], recent=rating.recent)
        if rating.after == rating.before:
            self[rating.before].replace(rating.key, standing)
        else:
            self[rating.before].take(rating.key)
            self[rating.after].put(rating.key, standing)


# --- the law


def observe(records: Iterable[RolloutRecord], solved_at: float | None) -> Result:
    """What rollouts of one task are worth together; invalid ones are not counted."""
    valid = [record for record in records if record.ending != Ending.INVALID]
    return result_of([record.reward for record in valid], solved_at)


def result_of(rewards: list[float], solved_at: float | None) -> Result:
    worth = rewards if solved_at is None else [float(reward >= solved_at - _SLACK) for reward in rewards]
    return Result(float(sum(worth)), len(rewards))


def rate_of(recent: Iterable[Result]) -> Mean:
    """Over rollouts, not over groups."""
    recent = list(recent)
    return Mean(sum(result.total for result in recent), sum(result.count for result in recent))


def pool_for(recent: tuple[Result, ...], rules: Rules) -> Pool:
    """A task of which nothing is known is normal."""
    rate = rate_of(recent)
    if not rate.count:
        return Pool.NORMAL
    if rate.value >= rules.retire_at - _SLACK and rate.count >= rules.retire_rollouts:
        return Pool.RETIRED
    if rate.value > rules.easy_above:
        return Pool.EASY
    return Pool.HARD if rate.value < rules.hard_below else Pool.NORMAL


def decide(pools: SourcePools, rules: Rules, *, group_id: int) -> Pool | None:
    """The pool that the task of this group comes from; None: the source must be read on first.

    Pools are taken by weight among those that have a task to draw. The normal pool has one as long as the source has
    unread tasks. Where every task was drawn only just now, it is drawn all the same; where only retired ones and those
    of pools without a weight are left, those are.
    """
    order = _order(rules, group_id)
    for pool in order:
        queue = pools[pool]
        if pool == Pool.NORMAL and not queue.fresh and not pools.is_whole:
            return None
        if queue and queue[queue.head].drawn_at < max(group_id - rules.rest_groups, 0):
            return pool
    left = [pool for pool in (*order, Pool.NORMAL, Pool.HARD, Pool.EASY, Pool.RETIRED) if pools[pool]]
    return left[0]


def _order(rules: Rules, group_id: int) -> list[Pool]:
    """Pools in a random order: the first by weight, the second by weight among the others, and so on."""
    pools = list(rules.weights)
    waits = np.random.default_rng((rules.seed, group_id, 1)).exponential(size=len(pools)) / list(rules.weights.values())
    return [pools[i] for i in np.argsort(waits)]


def find(
    pools: SourcePools, seeds: dict[str, Result], tasks: Iterable[tuple[int, Task]], rules: Rules, *, epoch: int
) -> list[Found]:
    """The new ones of tasks that were just read, each with its offset in the source: as seeded, or normal."""
    found: dict[str, Found] = {}
    for offset, task in tasks:
        if task.key not in found and pools.pool_of(task.key) is None:
            recent = (seeds[task.key],) if task.key in seeds else ()
            standing = Standing(epoch=epoch, offset=offset, recent=recent)
            found[task.key] = Found(task.key, pool_for(recent, rules), standing)
    return list(found.values())


def knows_whole(pools: SourcePools, *, barren: int, taken: int, chunk_tasks: int, exhausted: bool) -> bool:
    """Whether a source brings nothing new: a whole epoch of `taken` tasks did not, or an endless one long enough."""
    whole_epoch = exhausted and barren >= max(taken, 1)
    return whole_epoch or barren >= _REPEATS * (pools.num_tasks + chunk_tasks)


def forget(pools: SourcePools, num_found: int, rules: Rules) -> list[str]:
    """Keys to give up, so that no more than `remember` are kept: those that were drawn, longest ago first."""
    surplus = pools.num_tasks + num_found - rules.remember
    forgotten: list[str] = []
    for pool in (Pool.NORMAL, Pool.RETIRED, Pool.EASY, Pool.HARD):
        forgotten += [key for key, _ in zip(pools[pool].drawn, range(surplus - len(forgotten)), strict=False)]
    return forgotten


def rate(source: str, pools: SourcePools, rules: Rules) -> list[Rating]:
    """What the pending observations make of their tasks. Their order is that of dispatch, whichever ended first."""
    recent: dict[str, tuple[Result, ...]] = {}
    before: dict[str, Pool] = {}
    for seen in sorted(pools.pending, key=lambda observation: observation.group_id):
        if (pool := pools.pool_of(seen.key)) is not None:
            before[seen.key] = pool
            known = recent.get(seen.key, pools[pool][seen.key].recent)
            recent[seen.key] = (*known, seen.result)[-rules.window_groups :]
    return [
        Rating(source=source, key=key, recent=results, before=before[key], after=pool_for(results, rules))
        for key, results in recent.items()
    ]


# --- what is told


def num_strangers(pools: dict[str, SourcePools], seeds: dict[str, Result]) -> int:
    """Seeds whose task is known of no source."""
    return sum(all(of_source.pool_of(key) is None for of_source in pools.values()) for key in seeds)


def pool_metrics(pools: dict[str, SourcePools]) -> Metrics:
    """Tasks and solve rate by source and pool."""
    metrics: Metrics = {}
    for source, of_source in pools.items():
        for pool in Pool:
            queue = of_source[pool]
            metrics[f"curriculum/{source}/{pool}_tasks"] = Last(len(queue))
            metrics[f"curriculum/{source}/{pool}_rate"] = Mean(queue.total, queue.count)
    return metrics


def pool_summary(pools: dict[str, SourcePools], seeds: dict[str, Result]) -> dict[str, Any]:
    """Tasks by source and pool, and how many of the seeds were of no task; empty without a curriculum."""
    if not pools:
        return {}
    tasks = {source: {pool.value: len(of_source[pool]) for pool in Pool} for source, of_source in pools.items()}
    return {"tasks": tasks, "seeds": len(seeds), "seeds_of_no_task": num_strangers(pools, seeds)}


def draw_metrics(source: str, drawn: str) -> Metrics:
    """The share of draws by pool, of one draw."""
    return {f"curriculum/{source}/{pool}_draws": Mean(pool == drawn) for pool in Pool} if drawn else {}
