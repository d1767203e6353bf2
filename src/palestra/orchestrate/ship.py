"""Ship: full batches, in dispatch order.

Consumes: ready groups of the state. Produces: batch files, and word of them to the trainer.
Waits for: enough ready groups, and room at the trainer. Woken by: `changed`. Ends when: every step has its batch.
"""

import asyncio
import time

from palestra.core.metrics import Mean, Metrics, Sum
from palestra.core.records import RolloutRecord
from palestra.orchestrate.batcher import baselines, make_batch, moved, rules_of
from palestra.orchestrate.buffer import expired, last_chances, length_added, may_part, num_nearly_ready, take
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.frozen import frozen_metrics
from palestra.orchestrate.ratings import observe_unclosed, rate_tasks
from palestra.orchestrate.report import trained_metrics
from palestra.orchestrate.state import BatchShipped, Group, GroupExpired, GroupParted, GroupStatus


async def ship_all(desk: Desk) -> None:
    while (step := desk.state.next_step) < desk.config.train.steps:
        groups = _take(desk) if desk.trainer.has_room(step) else None
        if groups is None:
            await _wait_for_groups(desk, step)
        elif not desk.frozen.has_answers(_untrained(groups)):
            await _wait_for_answers(desk, groups)  # meanwhile other groups may have become the ones to take
        else:
            await _ship(desk, step, groups)


async def _wait_for_groups(desk: Desk, step: int) -> None:
    """Time in which tails alone held the trainer up is a metric."""
    is_for_tails = desk.trainer.has_room(step) and num_nearly_ready(desk.state) >= desk.config.algo.groups_per_step
    began = time.monotonic()
    await desk.changed.wait(f"{desk.config.algo.groups_per_step} ready groups for step {step}")
    desk.teller.note({"batch/tail_wait_s": Sum(time.monotonic() - began if is_for_tails else 0.0)})


def _untrained(groups: list[Group]) -> list[RolloutRecord]:
    return [record for group in groups for record in group.unsettled]


async def _wait_for_answers(desk: Desk, groups: list[Group]) -> None:
    began = time.monotonic()
    await desk.frozen.wait(_untrained(groups))
    desk.teller.note({"frozen/wait_s": Sum(time.monotonic() - began)})


def _take(desk: Desk) -> list[Group] | None:
    """The groups of the next batch; with them go those that it would leave behind for ever."""
    algo, state = desk.config.algo, desk.state
    for group_id in expired(state, max_age=algo.max_age):
        desk.frozen.forget(state.groups[group_id].rollout_ids)
        desk.journal.record(GroupExpired(group_id=group_id))
        desk.changed.tell()  # there is room for another group
    rules = {"groups_per_step": algo.groups_per_step, "window": algo.window, "max_age": algo.max_age}
    if (groups := take(state, **rules)) is None:
        return None
    newest = max(group.group_id for group in groups if group.status is not GroupStatus.LATE)
    leaving = [
        group
        for group in last_chances(state, before=newest, max_age=algo.max_age)
        if may_part(group, drop_zero_signal=desk.config.algo_of(group.source).filters_groups)
    ]
    for group in leaving:
        desk.journal.record(GroupParted(group_id=group.group_id))
    return take(state, **rules) if leaving else groups


async def _ship(desk: Desk, step: int, groups: list[Group]) -> None:
    rules, considered = rules_of(desk.config), _untrained(groups)
    averages = desk.state.averages
    kept = {g.group_id: baselines(g, rules, averages) for g in groups if not g.all_ended and not g.settled}
    after = moved(averages, groups, rules)
    num_late = sum(len(group.unsettled) for group in groups if group.status is GroupStatus.LATE)
    logprobs = desk.frozen.take(considered)
    with desk.teller.ledger.spend("batch"), desk.teller.spans.span("batch", step=step):
        batch, packing, trained = make_batch(
            groups, logprobs, step=step, attempt=desk.attempt.number, rules=rules, averages=averages
        )
    path = await asyncio.to_thread(desk.run.batches.write, batch)
    if desk.config.log.keep_rollouts:
        await asyncio.to_thread(desk.teller.write_rollouts, f"step-{step:06d}", trained)
    metrics: Metrics = trained_metrics(trained, step) | {
        "packing/fill": Mean(packing.num_tokens, packing.num_packs * packing.max_tokens),
        "wire/bytes_per_token": Mean(path.stat().st_size, batch.num_tokens),
        "rollout/late": Mean(num_late, len(trained)),
    }
    if desk.config.algo.frozen:
        metrics |= frozen_metrics(trained, logprobs)
    added = [
        length_added(seat, shaping)
        for record in trained
        if not (shaping := rules.of(record.environment).length).is_off
        for seat in record.seats
    ]
    if added:
        metrics["reward/length_added"] = Mean(sum(added), len(added))
    rollout_ids = [record.rollout_id for record in trained]
    group_ids, live = [group.group_id for group in groups], desk.state.groups
    event = BatchShipped(
        step=step,
        group_ids=group_ids,
        rollout_ids=rollout_ids,
        too_old=sorted({record.rollout_id for record in considered} - set(rollout_ids)),
        baselines=kept,
        metrics=metrics,
        observed=observe_unclosed(desk.config, [live[group_id] for group_id in group_ids if group_id in live]),
        averages=after,
    )
    rate_tasks(desk)
    desk.journal.record(event)
    desk.frozen.forget([*rollout_ids, *event.too_old])  # a group that closed meanwhile has asked about them again
    desk.teller.totals.note_age(metrics["age/mean"])
    await desk.trainer.ship(step)
    desk.changed.tell()
