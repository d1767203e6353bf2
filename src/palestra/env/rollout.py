"""A rollout as authors of environments see it."""

from dataclasses import dataclass, field
from typing import Any

from palestra.core.records import Ending, RolloutRecord
from palestra.env.agent import replies


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One finished attempt at one task; of several seats, the conversation of the first that trains.

    `rewards` are those it was given during `run`. `ending` is never `invalid` here: such a rollout is not scored.
    """

    messages: list[dict[str, Any]]
    num_turns: int
    num_tokens: int
    ending: Ending = Ending.OK
    rewards: dict[str, float] = field(default_factory=dict)

    @property
    def replies(self) -> list[str]:
        """What the agent said in each turn, without its reasoning; "" where it was cut off while still thinking."""
        return replies(self.messages, self.num_turns)

    @property
    def reply(self) -> str:
        """The last of `replies`; "" if there is none."""
        return next(reversed(self.replies), "")


def rollout_of(record: RolloutRecord) -> Rollout:
    """The author's view of a record, for group rewards."""
    return Rollout(
        messages=record.messages,
        num_turns=record.num_turns,
        num_tokens=record.num_tokens,
        ending=record.ending,
        rewards=record.rewards,
    )
