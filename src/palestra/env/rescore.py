"""Finished rollouts scored again: what another reward would have given."""

from collections.abc import Sequence

import msgspec

from palestra.core.records import Ending, RolloutRecord
from palestra.env.environment import Environment, has_group_rewards
from palestra.env.rollout import Rollout
from palestra.env.scoring import InvalidRollout, earn, score_group

_OF_TOOLS = ("tool_calls", "tool_errors")


async def rescore(environment: Environment, records: Sequence[RolloutRecord]) -> list[RolloutRecord]:
    """All rollouts of one task, with the rewards and metrics that the environment's methods give now.

    What `run` gave stands. A reward that raises makes its rollout invalid, or all, if it is the group's.
    Metrics of the tools stay, and what `run` gave to seats (`SEAT.NAME`); those that no method gives any more are gone.
    """
    scored = [await _rescored(environment, record) for record in records]
    if not has_group_rewards(type(environment)):
        return scored
    try:
        return await score_group(environment, scored)
    except InvalidRollout as invalid:
        return [_invalid(record, str(invalid)) for record in scored]


async def _rescored(environment: Environment, record: RolloutRecord) -> RolloutRecord:
    if record.ending == Ending.INVALID:
        return record
    rollout = Rollout(
        messages=record.messages,
        num_turns=record.num_turns,
        num_tokens=record.num_tokens,
        ending=record.ending,
        rewards=record.seats[0].rewards if len(record.seats) == 1 else {},
    )
    try:
        earned = await earn(environment, record.task, rollout)
    except InvalidRollout as invalid:
        return _invalid(record, str(invalid))
    kept = {name: amount for name, amount in record.metrics.items() if name in _OF_TOOLS or "." in name}
    return msgspec.structs.replace(record, rewards=earned.rewards, metrics=kept | earned.metrics, reward=earned.total)


def _invalid(record: RolloutRecord, error: str) -> RolloutRecord:
    return msgspec.structs.replace(record, ending=Ending.INVALID, reward=0.0, rewards={}, error=error)
