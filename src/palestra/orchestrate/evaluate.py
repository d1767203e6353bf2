"""Evaluation: the same workers and engines, without a trainer."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import msgspec

from palestra.config.schema import EvalSet
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import Ending, RolloutRecord, Sampling, Task
from palestra.orchestrate.sources import ListTasksCall, seed_for

PlayEval = Callable[[str, Task, Sampling, int], Awaitable[RolloutRecord]]  # source, task, sampling, seed


@dataclass(frozen=True)
class EvalResult:
    """What a set measured: all its rollouts, and the mean over those that have a reward."""

    name: str
    records: list[RolloutRecord]

    @property
    def valid(self) -> list[RolloutRecord]:
        return [record for record in self.records if record.ending != Ending.INVALID]

    @property
    def reward(self) -> float:
        return sum(record.reward for record in self.valid) / len(self.valid)

    @property
    def versions(self) -> set[int]:
        return {version for record in self.records for version in record.versions}


def sampling_of(entry: EvalSet, default: Sampling) -> Sampling:
    return Sampling(temperature=entry.temperature, top_p=entry.top_p, max_tokens=entry.max_tokens or default.max_tokens)


@dataclass(frozen=True)
class Means:
    """What an evaluation is done with. `score_group` adds the rewards that look at all rollouts of a task.

    `ended` hears of every record that is final, of a task's records together where they have group rewards.
    """

    list_tasks: ListTasksCall
    play: PlayEval
    score_group: Callable[[str, list[RolloutRecord]], Awaitable[list[RolloutRecord]]]
    max_in_flight: int
    retries: int
    ended: Callable[[Sequence[RolloutRecord]], None] = lambda records: None


async def evaluate(
    entry: EvalSet,
    means: Means,
    *,
    default: Sampling,
    seed: int,
    known: Mapping[int, RolloutRecord] = MappingProxyType({}),
) -> EvalResult:
    """Play `num_tasks` x `rollouts_per_task` rollouts; the same tasks and seeds every time.

    `known` records, by number, are not played again. Rollout `i` is of task `i // rollouts_per_task`.
    Errors: UserError, if the environment raises or has too few tasks; or if no rollout at all got a reward.
    """
    listed = await means.list_tasks(entry.label, 0, 0, entry.num_tasks)
    if listed.error:
        raise UserError(f"evaluation {entry.label!r} could not list its tasks: {listed.error}")
    if len(listed.tasks) < entry.num_tasks:
        raise UserError(f"evaluation {entry.label!r} has {len(listed.tasks)} tasks; lower num_tasks={entry.num_tasks}")
    measuring = _Measuring(entry, means, sampling_of(entry, default), seed, listed.has_group_rewards, known)
    async with asyncio.TaskGroup() as playing:
        started = [playing.create_task(measuring.task(number, task)) for number, task in enumerate(listed.tasks)]
    result = EvalResult(entry.label, [record for task in started for record in task.result()])
    if not result.valid:
        raise UserError(
            f"evaluation {entry.label!r}: no rollout got a reward; the first says: {result.records[0].error}"
        )
    return result


class _Measuring:
    """One set while it is played."""

    def __init__(
        self,
        entry: EvalSet,
        means: Means,
        sampling: Sampling,
        seed: int,
        has_group_rewards: bool,
        known: Mapping[int, RolloutRecord],
    ):
        self._entry, self._means, self._sampling, self._seed = entry, means, sampling, seed
        self._has_group_rewards, self._known = has_group_rewards, known
        self._slots = asyncio.Semaphore(means.max_in_flight)

    async def task(self, number: int, task: Task) -> list[RolloutRecord]:
        """All rollouts of one task. With group rewards, a task of which some are unknown is played as a whole."""
        count = self._entry.rollouts_per_task
        places = range(number * count, (number + 1) * count)
        known = {place: self._known[place] for place in places if place in self._known}
        if self._has_group_rewards and len(known) < count:
            known = {}
        async with asyncio.TaskGroup() as playing:
            missing = [place for place in places if place not in known]
            started = {place: playing.create_task(self._rollout(place, task)) for place in missing}
        played = {place: started[place].result() for place in missing}
        if self._has_group_rewards and played:
            played = dict(zip(places, await self._scored(list(played.values())), strict=True))
            self._means.ended(list(played.values()))
        return [(known | played)[place] for place in places]

    async def _rollout(self, place: int, task: Task) -> RolloutRecord:
        async with self._slots:
            record = await self._tried(place, task)
        if not self._has_group_rewards:
            self._means.ended([record])
        return record

    async def _tried(self, place: int, task: Task) -> RolloutRecord:
        label = self._entry.label
        for attempt in range(self._means.retries + 1):
            record = await self._means.play(label, task, self._sampling, seed_for(self._seed, label, place))
            if record.ending != Ending.INVALID or attempt == self._means.retries:
                return msgspec.structs.replace(record, rollout_id=place)
        raise AssertionError("unreachable")

    async def _scored(self, records: list[RolloutRecord]) -> list[RolloutRecord]:
        try:
            return await self._means.score_group(self._entry.label, records)
        except InfrastructureError as failure:
            return [
                msgspec.structs.replace(record, ending=Ending.INVALID, error=str(failure), reward=0.0, rewards={})
                for record in records
            ]
