"""Dispatch: per rollout, slots refilled at once.

Consumes: tasks. Produces: finished rollouts and closed groups, as events in the journal.
Waits for: a free slot, a published version. Woken by: `changed`. Ends when: cancelled, or an environment is broken.
"""

import asyncio
import sys
from collections import deque

import msgspec

from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import Ending, Reply, RolloutRecord
from palestra.orchestrate.buffer import outcome
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.report import finished_metrics
from palestra.orchestrate.sources import TaskSources, seed_for
from palestra.orchestrate.state import (
    Group,
    GroupClosed,
    GroupOpened,
    GroupStatus,
    JournalledReply,
    PartlyReplied,
    Replied,
    RolloutEnded,
    RolloutRetried,
)
from palestra.orchestrate.workers import PlayOrder
from palestra.wire.draft import NOTHING
from palestra.wire.messages import Call

_INVALID_GROUPS = 4  # in a row, after which the environment is taken to be broken


class Dispatcher:
    """Starts rollouts while pacing allows it, and sees each to its end."""

    def __init__(self, desk: Desk):
        self._desk = desk
        config = desk.config
        self._sources = TaskSources(
            config.env.mix, desk.pool.list_tasks, seed=config.train.seed, chunk_tasks=config.env.chunk_tasks
        )
        self._sources.resume(desk.state.cursors)
        self._waiting: deque[int] = deque()
        self._plays: set[asyncio.Task[None]] = set()
        self._fruitless = 0  # groups since the last one that trains
        self._invalid: dict[str, int] = {}  # by source: groups in a row without a valid rollout

    async def run(self) -> None:
        await self._take_up()
        while True:
            if self._waiting and self._may_start():
                play = self._desk.tasks.create_task(self._play_to_end(self._waiting.popleft()))
                self._plays.add(play)
                play.add_done_callback(self._free_slot)
            elif not self._waiting and self._may_open():
                await self._open_group()
            else:
                await self._desk.changed.wait("a free slot to dispatch a rollout")

    def cancel(self) -> None:
        """Rollouts that no step is left for."""
        for play in self._plays:
            play.cancel()

    def _free_slot(self, play: asyncio.Task[None]) -> None:
        self._plays.discard(play)
        self._desk.changed.tell()

    async def _take_up(self) -> None:
        """Groups that an earlier attempt left open."""
        for group in list(self._desk.state.groups.values()):
            if group.status == GroupStatus.OPEN:
                self._waiting += [i for i in group.rollout_ids if i not in group.records]
                if group.all_ended:
                    await self._close_group(group)

    def _may_start(self) -> bool:
        desk = self._desk
        return len(self._plays) < desk.capacity and desk.trainer.is_current and not desk.fleet.holds

    def _may_open(self) -> bool:
        """Pacing: bounds the rollouts dispatched and not yet in the engines' weights; none more than can be trained."""
        config, state, trainer = self._desk.config, self._desk.state, self._desk.trainer
        needed = (config.train.steps - state.next_step) * config.algo.groups_per_step
        outstanding = len(state.groups) * config.algo.group_size + trainer.rollouts_on_the_way
        has_room = outstanding + config.algo.group_size <= config.algo.max_outstanding
        return trainer.is_current and len(state.groups) < needed and has_room

    async def _open_group(self) -> None:
        group_id = self._desk.state.next_group
        label, task, cursor = await self._sources.next(group_id)
        event = GroupOpened(
            group_id=group_id,
            source=label,
            task=task,
            size=self._desk.config.algo.group_size,
            cursor_epoch=cursor.epoch,
            cursor_taken=cursor.taken,
            has_group_rewards=self._sources.has_group_rewards[label],
        )
        self._desk.journal.record(event)
        self._waiting += self._desk.state.groups[group_id].rollout_ids

    # --- one rollout

    async def _play_to_end(self, rollout_id: int) -> None:
        """Play a rollout until it is valid or its retries are used up. Infrastructure failures are never rewards."""
        desk, group = self._desk, self._desk.state.groups[rollout_id // self._desk.config.algo.group_size]
        while True:
            record = await desk.pool.play(self._order(group, rollout_id))
            if record.ending != Ending.INVALID or group.tries.get(rollout_id, 0) >= desk.config.env.retries:
                break
            print(f"rollout {rollout_id} of {group.source} is invalid and retried: {record.error}", file=sys.stderr)
            desk.journal.record(RolloutRetried(rollout_id=rollout_id, error=record.error))
        desk.journal.record(RolloutEnded(record=record))
        desk.teller.note(finished_metrics(record))
        desk.teller.totals.note_tokens(record.num_sampled_tokens)
        if group.all_ended:
            await self._close_group(group)

    def _order(self, group: Group, rollout_id: int) -> PlayOrder:
        seed = self._desk.config.train.seed
        member = rollout_id - group.rollout_ids.start

        async def answer(call: Call) -> Reply:
            return await self._answer(group, rollout_id, call, seed=seed_for(seed, group.group_id, call.call) + member)

        return PlayOrder(
            rollout_id=rollout_id,
            source=group.source,
            task=group.task,
            sampling=self._desk.sampling,
            seed=seed_for(seed, "play", rollout_id),
            answer=answer,
        )

    async def _answer(self, group: Group, rollout_id: int, call: Call, *, seed: int) -> Reply:
        """From the journal, if this call was answered before a restart; from an engine otherwise, going on with what
        the journal has of it."""
        state, prompt_hash = self._desk.state, seed_for(*call.token_ids)
        if (known := state.reply_to(rollout_id, call.call, prompt_hash)) is not None:
            return known

        def journalled(reply: Reply) -> JournalledReply:
            return JournalledReply(call=call.call, prompt_hash=prompt_hash, reply=reply)

        def note(piece: Reply) -> None:
            if rollout_id not in group.records:  # of a try that was given up, nobody would ever ask for it again
                self._desk.journal.record(PartlyReplied(rollout_id=rollout_id, piece=journalled(piece)))

        reply = await self._desk.gateway.call(
            group.group_id,
            call.token_ids,
            call.sampling,
            seed=seed,
            begun=state.reply_begun(rollout_id, call.call, prompt_hash) or NOTHING,
            note=note,
        )
        if rollout_id not in group.records:
            self._desk.journal.record(Replied(rollout_id=rollout_id, reply=journalled(reply)))
        return reply

    # --- one group

    async def _close_group(self, group: Group) -> None:
        records: list[RolloutRecord] = []
        if group.has_group_rewards and group.valid:
            records = await self._score_group(group)
        scored = {record.rollout_id: record for record in records}
        judged = msgspec.structs.replace(group, records=group.records | scored)
        result = outcome(judged, drop_zero_signal=self._desk.config.algo.drop_zero_signal)
        self._desk.journal.record(GroupClosed(group_id=group.group_id, outcome=result, records=records))
        self._desk.fleet.forget(group.group_id)
        self._desk.changed.tell()
        await self._watch_outcomes(judged, result)

    async def _score_group(self, group: Group) -> list[RolloutRecord]:
        """Group rewards; where they cannot be had, the members become invalid, never worth 0."""
        error = ""
        for _ in range(self._desk.config.env.retries + 1):
            try:
                return await self._desk.pool.score_group(group.source, group.valid)
            except InfrastructureError as failure:
                error = str(failure)
        unscored = {"ending": Ending.INVALID, "error": error, "rewards": {}, "reward": 0.0, "seats": ()}
        return [msgspec.structs.replace(record, **unscored) for record in group.valid]

    async def _watch_outcomes(self, group: Group, result: str) -> None:
        """Groups that never train, one after another: said in words, and an error where nothing in them is valid.

        Errors: UserError, if no rollout of many groups of one environment in a row was valid.
        """
        self._invalid[group.source] = self._invalid.get(group.source, 0) + 1 if result == "all_invalid" else 0
        self._fruitless = self._fruitless + 1 if result != "ready" else 0
        if self._invalid[group.source] == _INVALID_GROUPS:
            error = next(iter(group.records.values())).error
            raise UserError(
                f"no rollout of the last {_INVALID_GROUPS} groups of {group.source!r} was valid; the last says: {error}"
            )
        if self._fruitless and self._fruitless % (10 * self._desk.config.algo.groups_per_step) == 0:
            await self._desk.progress(
                f"no signal: within each of the last {self._fruitless} groups all rewards are equal"
            )
