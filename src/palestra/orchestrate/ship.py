"""Ship: full batches, in dispatch order.

Consumes: ready groups of the state. Produces: batch files, and word of them to the trainer.
Waits for: enough ready groups, and room at the trainer. Woken by: `changed`. Ends when: every step has its batch.
"""

import asyncio
import time

from palestra.algo.shaping import LengthShaping
from palestra.core.metrics import Mean, Metrics, Sum
from palestra.core.records import RolloutRecord
from palestra.orchestrate.batcher import BatchRules, make_batch
from palestra.orchestrate.buffer import expired, length_added, take
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.frozen import frozen_metrics
from palestra.orchestrate.report import trained_metrics
from palestra.orchestrate.state import BatchShipped, Group, GroupExpired


async def ship_all(desk: Desk) -> None:
    while (step := desk.state.next_step) < desk.config.train.steps:
        groups = _take(desk) if desk.trainer.has_room(step) else None
        if groups is None:
            await desk.changed.wait(f"{desk.config.algo.groups_per_step} ready groups for step {step}")
        elif not desk.frozen.has_answers(_records(groups)):
            await _wait_for_answers(desk, groups)  # meanwhile other groups may have become the ones to take
        else:
            await _ship(desk, step, groups)


def _records(groups: list[Group]) -> list[RolloutRecord]:
    return [record for group in groups for record in group.valid]


async def _wait_for_answers(desk: Desk, groups: list[Group]) -> None:
    began = time.monotonic()
    await desk.frozen.wait(_records(groups))
    desk.teller.note({"frozen/wait_s": Sum(time.monotonic() - began)})


def _take(desk: Desk) -> list[Group] | None:
    algo = desk.config.algo
    for group_id in expired(desk.state, max_age=algo.max_age):
        desk.frozen.forget(desk.state.groups[group_id].rollout_ids)
        desk.journal.record(GroupExpired(group_id=group_id))
        desk.changed.tell()  # there is room for another group
    return take(desk.state, groups_per_step=algo.groups_per_step, window=algo.window)


async def _ship(desk: Desk, step: int, groups: list[Group]) -> None:
    logprobs = desk.frozen.take(_records(groups))
    with desk.teller.ledger.spend("batch"):
        rules = _rules(desk)
        batch, packing, trained = make_batch(groups, logprobs, step=step, attempt=desk.attempt.number, rules=rules)
    path = await asyncio.to_thread(desk.run.batches.write, batch)
    if desk.config.log.keep_rollouts:
        await asyncio.to_thread(desk.teller.write_rollouts, f"step-{step:06d}", trained)
    metrics: Metrics = trained_metrics(trained, step) | {
        "packing/fill": Mean(packing.num_tokens, packing.num_packs * packing.max_tokens),
        "wire/bytes_per_token": Mean(path.stat().st_size, batch.num_tokens),
    }
    if desk.config.algo.frozen:
        metrics |= frozen_metrics(trained, logprobs)
    if not rules.length.is_off:
        added = [length_added(seat, rules.length) for record in trained for seat in record.seats]
        metrics["reward/length_added"] = Mean(sum(added), len(added))
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
    config, algo = desk.config, desk.config.algo
    length = algo.length
    return BatchRules(
        baseline=algo.baseline,
        advantage_scale=algo.advantage_scale,
        max_age=algo.max_age,
        max_pack_tokens=config.train.max_pack_tokens,
        num_ranks=config.train.num_ranks,
        temperature=config.sampling.temperature,
        length=LengthShaping(
            max_tokens=length.max_tokens or config.sampling.max_tokens,
            penalty=length.penalty,
            overlong_tokens=length.overlong_tokens,
            overlong_penalty=length.overlong_penalty,
        ),
        reference_weight=algo.reference.weight if algo.reference else 0.0,
        teacher_weight=algo.teacher.weight if algo.teacher else 0.0,
        reward_weight=0.0 if algo.teacher and algo.teacher.replaces_reward else 1.0,
    )
