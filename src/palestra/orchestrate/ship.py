"""Ship: full batches, in dispatch order.

Consumes: ready groups of the state. Produces: batch files, and word of them to the trainer.
Waits for: enough ready groups, and room at the trainer. Woken by: `changed`. Ends when: every step has its batch.
"""

import asyncio

from palestra.core.metrics import Mean, Metrics
from palestra.orchestrate.batcher import BatchRules, make_batch
from palestra.orchestrate.buffer import expired, take
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.report import trained_metrics
from palestra.orchestrate.state import BatchShipped, Group, GroupExpired


async def ship_all(desk: Desk) -> None:
    while (step := desk.state.next_step) < desk.config.train.steps:
        groups = _take(desk) if desk.trainer.has_room(step) else None
        if groups is None:
            await desk.changed.wait(f"{desk.config.algo.groups_per_step} ready groups for step {step}")
        else:
            await _ship(desk, step, groups)


def _take(desk: Desk) -> list[Group] | None:
    algo = desk.config.algo
    for group_id in expired(desk.state, max_age=algo.max_age):
        desk.journal.record(GroupExpired(group_id=group_id))
        desk.changed.tell()  # there is room for another group
    return take(desk.state, groups_per_step=algo.groups_per_step, window=algo.window)


async def _ship(desk: Desk, step: int, groups: list[Group]) -> None:
    with desk.teller.ledger.spend("batch"), desk.teller.spans.span("batch", step=step):
        batch, packing, trained = make_batch(groups, step=step, attempt=desk.attempt.number, rules=_rules(desk))
    path = await asyncio.to_thread(desk.run.batches.write, batch)
    if desk.config.log.keep_rollouts:
        await asyncio.to_thread(desk.teller.write_rollouts, f"step-{step:06d}", trained)
    metrics: Metrics = trained_metrics(trained, step) | {
        "packing/fill": Mean(packing.num_tokens, packing.num_packs * packing.max_tokens),
        "wire/bytes_per_token": Mean(path.stat().st_size, batch.num_tokens),
    }
    event = BatchShipped(
        step=step,
        group_ids=[group.group_id for group in groups],
        rollout_ids=[record.rollout_id for record in trained],
        metrics=metrics,
    )
    desk.journal.record(event)
    desk.teller.totals.note_age(metrics["age/mean"])
    await desk.trainer.ship(step, len(trained))
    desk.changed.tell()


def _rules(desk: Desk) -> BatchRules:
    config = desk.config
    return BatchRules(
        baseline=config.algo.baseline,
        advantage_scale=config.algo.advantage_scale,
        max_age=config.algo.max_age,
        max_pack_tokens=config.train.max_pack_tokens,
        num_ranks=config.train.num_ranks,
        temperature=config.sampling.temperature,
    )
