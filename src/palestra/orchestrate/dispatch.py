"""Dispatch: per rollout, slots refilled at once.

Consumes: tasks. Produces: finished rollouts and closed groups, as events in the journal.
Waits for: a free slot, a published version. Woken by: `changed`. Ends when: cancelled, or an environment is broken.

A group whose members in flight make no progress for `algo.stuck_s` is parted: those that ended may train without them.
A rollout in flight that became too old to train is stopped.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import msgspec

from palestra.core.errors import InfrastructureError, UserError
from palestra.core.metrics import Mean
from palestra.core.records import ChatReply, Ending, Reply, RolloutRecord
from palestra.orchestrate.buffer import may_part, outcome, too_old_in_flight
from palestra.orchestrate.curriculum import draw_metrics
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.endpoints import hash_of_chat
from palestra.orchestrate.pacing import predicted_age
from palestra.orchestrate.pooled import open_sources
from palestra.orchestrate.pulse import Pulse
from palestra.orchestrate.ratings import observe_group, rate_if_long_without_batch
from palestra.orchestrate.report import Tails, finished_metrics
from palestra.orchestrate.sources import seed_for
from palestra.orchestrate.state import (
    Group,
    GroupClosed,
    GroupParted,
    GroupStatus,
    JournalledReply,
    PartlyReplied,
    Replied,
    RolloutCut,
    RolloutEnded,
    RolloutRetried,
    SeatReplied,
    SeatReply,
)
from palestra.orchestrate.workers import PlayOrder
from palestra.wire.draft import NOTHING
from palestra.wire.messages import Call

_INVALID_GROUPS = 4  # in a row, after which the environment is taken to be broken


class Dispatcher:
    """Starts rollouts while pacing allows it, and sees each to its end."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self._sources = open_sources(desk)
        self._waiting: deque[int] = deque()
        self._plays: dict[int, asyncio.Task[None]] = {}  # by rollout, from its start to the close of what it ends
        self._pulses: dict[int, Pulse] = {}
        self._tails = Tails(desk.teller.note)
        self._cut_at = desk.state.next_step  # nothing in flight is too old for this step
        self._fruitless = 0  # groups since the last one that trains
        self._invalid: dict[str, int] = {}  # by source: groups in a row without a valid rollout

    async def begin(self) -> None:
        """Before engines are waited for. Errors: UserError, if an environment cannot list its tasks."""
        await self._sources.begin()

    async def run(self) -> None:
        await self._take_up()
        while True:
            self._cut_too_old()
            if self._waiting and self._may_start():
                self._start(self._waiting.popleft())
            elif not self._waiting and self._may_open():
                await self._open_group()
            else:
                await self._desk.changed.wait("a free slot to dispatch a rollout")

    def cancel(self) -> None:
        """Rollouts that no step is left for."""
        for play in self._plays.values():
            play.cancel()

    def _start(self, rollout_id: int) -> None:
        self._admit(rollout_id)
        self._plays[rollout_id] = play = self._desk.tasks.create_task(self._play_to_end(rollout_id))
        play.add_done_callback(lambda _: self._free_slot(rollout_id))

    def _admit(self, rollout_id: int) -> None:
        desk, group_id = self._desk, rollout_id // self._desk.config.algo.group_size
        desk.fleet.admit(rollout_id, group_id)
        if rollout_id not in desk.state.replies and rollout_id not in desk.state.begun:  # its first token is to come
            groups_per_step, loaded = desk.config.algo.groups_per_step, desk.trainer.loaded
            age = predicted_age(desk.state, group_id, groups_per_step=groups_per_step, loaded=loaded)
            desk.teller.note_predicted_age(age)

    def _free_slot(self, rollout_id: int) -> None:
        del self._plays[rollout_id]
        self._desk.fleet.release(rollout_id)  # of a play that was cancelled, too
        self._desk.changed.tell()

    async def _take_up(self) -> None:
        """Groups that an earlier attempt left open."""
        for group in list(self._desk.state.groups.values()):
            self._waiting += [i for i in group.rollout_ids if i not in group.records]
            if group.all_ended:
                await self._close_group(group)

    def _may_start(self) -> bool:
        fleet = self._desk.fleet
        return fleet.room > 0 and self._desk.trainer.is_current and not fleet.holds

    def _may_open(self) -> bool:
        """Pacing: bounds the rollouts dispatched and not yet in the engines' weights, but for those without which there
        would be no others; none more than can be trained. Late members count nowhere: no step waits for them."""
        algo, state, trainer = self._desk.config.algo, self._desk.state, self._desk.trainer
        untrained = sum(group.status is not GroupStatus.LATE for group in state.groups.values())
        outstanding = untrained * algo.group_size + trainer.steps_on_the_way * algo.rollouts_per_step
        has_room = outstanding + algo.group_size <= algo.max_outstanding
        is_needed = untrained < trainer.steps_to_publish * algo.groups_per_step
        left = (self._desk.config.train.steps - state.next_step) * algo.groups_per_step
        return trainer.is_current and untrained < left and (has_room or is_needed)

    async def _open_group(self) -> None:
        opened = await self._sources.open(self._desk.state.next_group, self._desk.config.algo.group_size)
        self._desk.journal.record(opened)
        self._desk.teller.note(draw_metrics(opened.source, opened.pool))
        self._waiting += self._desk.state.groups[opened.group_id].rollout_ids

    # --- one rollout

    async def _play_to_end(self, rollout_id: int) -> None:
        """Play a rollout until it is valid or its retries are used up. Infrastructure failures are never rewards."""
        desk, group = self._desk, self._desk.state.groups.get(rollout_id // self._desk.config.algo.group_size)
        if group is None:
            return  # its task was put into quarantine meanwhile
        with Pulse(desk.config.algo.stuck_s, lambda: self._part_if_stuck(group)) as pulse:
            self._pulses[rollout_id] = pulse
            try:
                record = await self._play_validly(group, rollout_id)
            finally:
                del self._pulses[rollout_id]
        desk.fleet.release(rollout_id)  # before it is scored
        if record is None:
            return
        desk.journal.record(RolloutEnded(record=record))
        desk.teller.note(finished_metrics(record))
        desk.teller.totals.note_tokens(record.num_sampled_tokens)
        self._tails.ended(group)
        if group.all_ended:
            await self._close_group(group)
        else:
            self._part_if_stuck(group)

    async def _play_validly(self, group: Group, rollout_id: int) -> RolloutRecord | None:
        """None, if its task turned out not to be played any more."""
        desk = self._desk
        while True:
            record = await desk.pool.play(self._order(group, rollout_id))
            if self._quarantined(group):
                return None
            if record.ending != Ending.INVALID or group.tries.get(rollout_id, 0) >= desk.config.env.retries:
                return record
            print(f"rollout {rollout_id} of {group.source} is invalid and retried: {record.error}", file=sys.stderr)
            desk.journal.record(RolloutRetried(rollout_id=rollout_id, error=record.error))

    def _part_if_stuck(self, group: Group) -> None:
        """Every member that is not done has made no progress for a while: the others train without it."""
        out = [self._pulses.get(i) for i in group.rollout_ids if i not in group.records]
        if (
            out
            and all(pulse is not None and pulse.is_quiet for pulse in out)
            and may_part(group, drop_zero_signal=self._desk.config.algo_of(group.source).filters_groups)
        ):
            self._desk.journal.record(GroupParted(group_id=group.group_id))
            self._tails.closed(group)
            self._desk.changed.tell()

    def _cut_too_old(self) -> None:
        """Stop what can never train. Once a step: nothing becomes too old in between."""
        desk, step = self._desk, self._desk.state.next_step
        if step == self._cut_at:
            return
        self._cut_at = step
        for rollout_id in too_old_in_flight(desk.state, self._pulses, max_age=desk.config.algo.max_age):
            group = desk.state.groups[rollout_id // desk.config.algo.group_size]
            desk.journal.record(RolloutCut(rollout_id=rollout_id, num_tokens=desk.state.num_known_tokens(rollout_id)))
            self._plays[rollout_id].cancel()
            if group.all_ended:  # its rewards take their time, in which others may end
                desk.tasks.create_task(self._close_group(group))

    def _order(self, group: Group, rollout_id: int) -> PlayOrder:
        seed = self._desk.config.train.seed
        member = rollout_id - group.rollout_ids.start

        async def answer(call: Call) -> Reply | ChatReply:
            of_call = seed_for(seed, group.group_id, call.call) + member
            ask = self._answer_seat if call.seat else self._answer
            return await ask(group, rollout_id, call, seed=of_call)

        return PlayOrder(
            rollout_id=rollout_id,
            source=group.source,
            task=group.task,
            sampling=self._desk.sampling_of(group.source),
            seed=seed_for(seed, "play", rollout_id),
            answer=answer,
        )

    async def _answer(self, group: Group, rollout_id: int, call: Call, *, seed: int) -> Reply:
        """From the journal, if this call was answered before a restart; from an engine otherwise, going on with what
        the journal has of it."""
        state, prompt_hash = self._desk.state, seed_for(*call.token_ids)
        if (known := state.reply_to(rollout_id, call.call, prompt_hash)) is not None:
            return known

        def beat() -> None:
            if (pulse := self._pulses.get(rollout_id)) is not None:
                pulse.beat()

        def journalled(reply: Reply) -> JournalledReply:
            return JournalledReply(call=call.call, prompt_hash=prompt_hash, reply=reply)

        def note(piece: Reply) -> None:
            if rollout_id not in group.records:  # of a try that was given up, nobody would ever ask for it again
                self._desk.journal.record(PartlyReplied(rollout_id=rollout_id, piece=journalled(piece)))

        reply = await self._desk.gateway.call(
            rollout_id,
            call.token_ids,
            call.sampling,
            seed=seed,
            begun=state.reply_begun(rollout_id, call.call, prompt_hash) or NOTHING,
            note=note,
            beat=beat,
            at_work=self._at_work(rollout_id),
        )
        beat()
        if rollout_id not in group.records:
            self._desk.journal.record(Replied(rollout_id=rollout_id, reply=journalled(reply)))
        return reply

    def _at_work(self, rollout_id: int) -> Callable[[], AbstractContextManager[None]]:
        """Around waits for an engine: where turns are taken, one that sleeps makes nobody a straggler."""
        pulse = self._pulses.get(rollout_id) if self._desk.config.takes_turns else None
        return nullcontext if pulse is None else pulse.at_work

    async def _answer_seat(self, group: Group, rollout_id: int, call: Call, *, seed: int) -> ChatReply:
        """From the journal, or from the endpoint that the recipe names for the seat."""
        prompt_hash, pulse = hash_of_chat(call.seat, call.messages, call.tools), self._pulses.get(rollout_id)
        reply = self._desk.state.seat_reply_to(rollout_id, call.call, prompt_hash)
        if reply is None:
            at_work = nullcontext if pulse is None else pulse.at_work
            reply = await self._desk.seats.ask(group.source, call, seed=seed, at_work=at_work)
            if rollout_id not in group.records:
                said = SeatReply(call=call.call, prompt_hash=prompt_hash, reply=reply)
                self._desk.journal.record(SeatReplied(rollout_id=rollout_id, reply=said))
        if pulse is not None:
            pulse.beat()
        return reply

    # --- one group

    async def _close_group(self, group: Group) -> None:
        """All its members ended. A group that trained before has no outcome left."""
        self._desk.fleet.forget(group.group_id)
        self._tails.closed(group)
        if group.status in (GroupStatus.OPEN, GroupStatus.PARTED):
            await self._judge(group)
        self._desk.changed.tell()

    async def _judge(self, group: Group) -> None:
        records: list[RolloutRecord] = []
        if group.has_group_rewards and group.valid:
            records = await self._score_group(group)
        if self._quarantined(group):
            return
        scored = {record.rollout_id: record for record in records}
        judged = msgspec.structs.replace(group, records=group.records | scored)
        result = outcome(judged, drop_zero_signal=self._desk.config.algo_of(group.source).filters_groups)
        if result == "ready":
            self._desk.frozen.begin(judged.unsettled)
        observed = observe_group(self._desk.config, judged)
        closed = GroupClosed(group_id=group.group_id, outcome=result, records=records, observed=observed)
        self._desk.journal.record(closed)
        rate_if_long_without_batch(self._desk)
        self._desk.teller.note(
            {"groups/zero_signal_share": Mean(outcome(judged, drop_zero_signal=True) == "zero_signal")}
        )
        await self._watch_outcomes(judged, result)

    def _quarantined(self, group: Group) -> bool:
        """Whether its task is not to be played any more; then the group is dropped, if it was not yet."""
        desk = self._desk
        if not desk.pool.quarantine.reason(group.source, group.task):
            return False
        if group.group_id in desk.state.groups:
            desk.journal.record(GroupClosed(group_id=group.group_id, outcome="quarantined"))
            desk.fleet.forget(group.group_id)
            self._waiting = deque(i for i in self._waiting if i not in group.rollout_ids)
            desk.changed.tell()
        return True

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
        if result == "too_old":
            return  # it says nothing of the environment
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
