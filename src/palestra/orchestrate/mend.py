"""Batch files that are torn or gone are made anew from the journal, which has every rollout in them.

Consumes: the journal from its beginning. Produces: the files that a trainer is about to be sent to.
Waits for: answers of frozen models about those rollouts, as long as the shipper would. Ends when: all files are whole.
"""

import asyncio
import sys
from collections.abc import Iterable

import msgspec

from palestra.core.errors import FencedError, InfrastructureError
from palestra.orchestrate.batcher import Averages, make_batch, rules_of
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.journal import events
from palestra.orchestrate.state import BatchShipped, Group, LoopState


async def mend_batches(desk: Desk, steps: Iterable[int]) -> None:
    """Errors: InfrastructureError, if the journal does not have a batch that was shipped."""
    for step in steps:
        if why := _why_unreadable(desk, step):
            print(f"the batch of step {step} is made anew from the journal: {why}", file=sys.stderr)
            await _make_anew(desk, step)


def _why_unreadable(desk: Desk, step: int) -> str:
    try:
        desk.run.batches.read(step, attempt=desk.attempt.number)
    except FencedError:
        raise
    except (InfrastructureError, OSError) as error:
        return str(error)
    return ""


async def _make_anew(desk: Desk, step: int) -> None:
    groups, averages = await asyncio.to_thread(_groups_of, desk, step)
    records = [record for group in groups for record in group.unsettled]
    if not desk.frozen.has_answers(records):
        await desk.frozen.wait(records)
    logprobs = desk.frozen.take(records)
    batch, _, _ = make_batch(
        groups, logprobs, step=step, attempt=desk.attempt.number, rules=rules_of(desk.config), averages=averages
    )
    await asyncio.to_thread(desk.run.batches.write, batch)


def _groups_of(desk: Desk, step: int) -> tuple[list[Group], Averages]:
    """As they were when the batch was made, without members that ended while it was written; and the averages then."""
    state = LoopState()
    for event in events(desk.journal.directory):
        if isinstance(event, BatchShipped) and event.step == step:
            return [_as_taken(state.groups[group_id], event) for group_id in event.group_ids], state.averages
        state.apply(event)
    raise InfrastructureError(f"the journal {desk.journal.directory} has no batch of step {step}")


def _as_taken(group: Group, event: BatchShipped) -> Group:
    taken = {*event.rollout_ids, *event.too_old, *group.settled}
    return msgspec.structs.replace(group, records={i: r for i, r in group.records.items() if i in taken})
