"""Rewards and metrics of finished rollouts. A reward that raises, or is no number, makes a rollout invalid, never 0."""

import asyncio
import inspect
import math
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import msgspec

from palestra.core.records import Ending, RolloutRecord, Task
from palestra.env.endings import Limit
from palestra.env.environment import Environment, Scorer, scorers
from palestra.env.rollout import Rollout, rollout_of


class InvalidRollout(Exception):
    """The rollout has no reward; the message says why, for the author of the environment. Never seen by one."""


RAISED = (Exception, BaseExceptionGroup, Limit, SystemExit, asyncio.CancelledError)
"""What environment code may raise. KeyboardInterrupt is the user's."""


@dataclass
class Earned:
    """`total` is the weighted sum of `rewards`."""

    rewards: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    total: float = 0.0

    def enter(self, scorer: Scorer, given: Any) -> None:
        """Errors: InvalidRollout, if it is no number or its name is taken."""
        amount = number(f"{scorer.kind} {scorer.name}", given)
        if scorer.kind == "metric":
            self.metrics[scorer.name] = amount
        elif scorer.name in self.rewards:
            raise InvalidRollout(f"the reward {scorer.name!r} was given in run and is a @reward method too; rename one")
        else:
            self.rewards[scorer.name] = amount
            self.total += scorer.weight * amount


async def earn(environment: Environment, task: Task, rollout: Rollout) -> Earned:
    """The rollout's own rewards, those of its group excepted. Errors: InvalidRollout."""
    earned = Earned(rewards=dict(rollout.rewards), total=sum(rollout.rewards.values()))
    for scorer in scorers(type(environment)):
        if not scorer.group:
            earned.enter(scorer, await _called(environment, scorer, task, rollout))
    return earned


async def score_group(environment: Environment, records: Sequence[RolloutRecord]) -> list[RolloutRecord]:
    """Add the group rewards to the records of one task, in their order; invalid records stay as they are.

    Errors: InvalidRollout that names the reward and says what it raised or returned.
    """
    valid = [record for record in records if record.ending != Ending.INVALID]
    if not valid:
        return list(records)
    rollouts = [rollout_of(record) for record in valid]
    all_earned = [Earned(dict(record.rewards), total=record.reward) for record in valid]
    for scorer in scorers(type(environment)):
        if scorer.group:
            given = await _called(environment, scorer, valid[0].task, rollouts)
            for earned, one in zip(all_earned, _one_each(scorer, given, len(valid)), strict=True):
                earned.enter(scorer, one)
    scored = iter(
        msgspec.structs.replace(record, rewards=earned.rewards, reward=earned.total)
        for record, earned in zip(valid, all_earned, strict=True)
    )
    return [record if record.ending == Ending.INVALID else next(scored) for record in records]


async def _called(environment: Environment, scorer: Scorer, task: Task, scored: Rollout | list[Rollout]) -> Any:
    """What the marked method returns. Errors: InvalidRollout with the last lines of its traceback."""
    try:
        given = getattr(environment, scorer.name)(task, scored)
        return await given if inspect.isawaitable(given) else given
    except RAISED as error:
        unless_cancelled(error)
        raise InvalidRollout(describe(f"{scorer.kind} {scorer.name}", error)) from error


def _one_each(scorer: Scorer, given: Any, count: int) -> list[Any]:
    amounts = list(given) if isinstance(given, Iterable) else [given]
    if len(amounts) != count:
        raise InvalidRollout(
            f"reward {scorer.name} returned {len(amounts)} numbers for {count} rollouts; return one for each"
        )
    return amounts


def number(what: str, amount: Any) -> float:
    """Errors: InvalidRollout, if it is not a finite number."""
    try:
        if isinstance(amount, Real) and math.isfinite(number := float(amount)):
            return number
        shown = repr(amount)
    except (OverflowError, ValueError):  # an integer of hundreds of digits, or of more than are ever shown
        shown = "too large"
    raise InvalidRollout(f"{what} is {shown} ({type(amount).__name__}); rewards and metrics are finite numbers")


def unless_cancelled(error: BaseException) -> None:
    """Raise `error`, if it cancels this rollout from outside; code that cancels itself made an error like any other."""
    current = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and current is not None and current.cancelling():
        raise error


def describe(where: str, error: BaseException, last: int = 3) -> str:
    """What was raised and the last lines of its traceback."""
    lines = "".join(traceback.format_tb(error.__traceback__)[-last:])
    return f"{where} raised {type(error).__name__}: {error}\n{lines}".rstrip()
