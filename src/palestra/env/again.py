"""`python -m palestra.env.again DIRECTORY`: rollouts of an evaluation, scored again by the environment as it is here.

Consumes: `asked.json`, `rollouts.jsonl`. Produces: `verdict.json`. Whoever does not trust what was pushed runs it in
a sandbox. The tasks are listed anew, so that an answer that was changed in a rollout makes nothing right.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from palestra.config.schema import EvalSet
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.env.environment import Environment
from palestra.env.load import make_environment
from palestra.env.rescore import rescore
from palestra.env.tasklist import TaskList
from palestra.env.worker import source_seed

ASKED, ROLLOUTS, VERDICT = "asked.json", "rollouts.jsonl", "verdict.json"
_SAME = 1e-9
_MOST_TOLD = 20
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


class Asked(Struct, frozen=True, kw_only=True):
    environment: str
    split: str
    args: dict[str, Any]
    num_tasks: int
    rollouts_per_task: int


class Other(Struct, frozen=True, kw_only=True):
    """A rollout that has another reward now, or an error."""

    rollout_id: int
    before: float
    now: float | None
    why: str = ""


class Verdict(Struct, frozen=True, kw_only=True):
    """`problem`: why it cannot be told at all; "" where all were scored again."""

    num_rollouts: int = 0
    num_same: int = 0
    others: tuple[Other, ...] = ()  # the first ones
    problem: str = ""

    @property
    def is_same(self) -> bool:
        return not self.problem and 0 < self.num_rollouts == self.num_same


def verdict_of(asked: Asked, records: Sequence[RolloutRecord]) -> Verdict:
    """Whatever the environment's code does, there is a verdict."""
    if any(_is_given_by_run(record) for record in records):
        return Verdict(problem="Some rewards were given while rollouts were played: these cannot be scored again.")
    try:
        environment, tasks = _opened(asked)
    except (UserError, TypeError, ValueError, OSError) as error:
        return Verdict(problem=f"Its tasks could not be listed: {str(error)[:500]}")
    if len(tasks) < asked.num_tasks:
        return Verdict(problem=f"The environment has {len(tasks)} tasks of this split, not {asked.num_tasks}.")
    by_task: dict[int, list[RolloutRecord]] = {}
    for record in records:
        by_task.setdefault(record.rollout_id // asked.rollouts_per_task, []).append(record)
    return asyncio.run(_scored(environment, tasks, by_task))


def _is_given_by_run(record: RolloutRecord) -> bool:
    return len(record.seats) > 1 or any(seat.rewards for seat in record.seats)


def _opened(asked: Asked) -> tuple[Environment, list[Task]]:
    source = EvalSet(id=asked.environment, split=asked.split, args=asked.args)

    def make(epoch: int) -> Environment:
        return make_environment(source.id, split=source.split, seed=source_seed(source, 0, epoch), args=source.args)

    tasks, _ = TaskList(make).take(0, 0, asked.num_tasks)
    return make(0), tasks


async def _scored(environment: Environment, tasks: list[Task], by_task: dict[int, list[RolloutRecord]]) -> Verdict:
    num_rollouts, others = 0, list[Other]()
    for number, records in sorted(by_task.items()):
        num_rollouts += len(records)
        if other := next((record for record in records if not _is_same_task(record.task, tasks[number])), None):
            why = f"Task {number} is another one than the environment's: {other.task.key[:100]!r} was played."
            return Verdict(problem=why)
        now = await rescore(environment, records)
        others += [_other(*pair) for pair in zip(records, now, strict=True) if not _is_same(*pair)]
    return Verdict(num_rollouts=num_rollouts, num_same=num_rollouts - len(others), others=tuple(others[:_MOST_TOLD]))


def _is_same_task(played: Task, listed: Task) -> bool:
    """As both are after they were written down."""
    return _encode(msgspec.json.decode(msgspec.json.encode(played))) == _encode(
        msgspec.json.decode(msgspec.json.encode(listed))
    )


def _is_same(before: RolloutRecord, now: RolloutRecord) -> bool:
    return before.ending == now.ending and abs(before.reward - now.reward) <= _SAME


def _other(before: RolloutRecord, now: RolloutRecord) -> Other:
    is_invalid = now.ending == Ending.INVALID
    return Other(
        rollout_id=before.rollout_id,
        before=before.reward,
        now=None if is_invalid else now.reward,
        why=now.error[-500:] if is_invalid else "",
    )


def main(directory: Path) -> None:
    asked = msgspec.json.decode((directory / ASKED).read_bytes(), type=Asked)
    lines = (directory / ROLLOUTS).read_bytes().splitlines()
    verdict = verdict_of(asked, [msgspec.json.decode(line, type=RolloutRecord) for line in lines])
    write_atomically(directory / VERDICT, msgspec.json.encode(verdict))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
