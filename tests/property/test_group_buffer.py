"""The loop's state as a state machine: random endings, retries, drops, batches and kills keep its laws."""

from collections import Counter

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from palestra.algo.shaping import LengthShaping
from palestra.core.records import Ending, Reply, RolloutRecord, Sample, Seat, Span, Task
from palestra.orchestrate.batcher import BatchRules, SourceRules, baselines, make_batch
from palestra.orchestrate.buffer import (
    expired,
    last_chances,
    may_part,
    outcome,
    take,
    too_old_in_flight,
)
from palestra.orchestrate.state import (
    BatchShipped,
    Group,
    GroupClosed,
    GroupExpired,
    GroupOpened,
    GroupParted,
    GroupStatus,
    JournalledReply,
    LoopState,
    PartlyReplied,
    RolloutCut,
    RolloutEnded,
    RolloutRetried,
)

SIZE, GROUPS_PER_STEP, WINDOW, MAX_AGE = 3, 2, 4, 2
LENGTH = LengthShaping(max_tokens=8)
RULES = BatchRules(
    default=SourceRules(baseline="mean", advantage_scale="std", length=LENGTH, temperature=1.0),
    max_age=MAX_AGE,
    max_pack_tokens=16,
    num_ranks=1,
    reference_weight=0.0,
    teacher_weight=0.0,
    reward_weight=1.0,
)


class BufferMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.state = LoopState()
        self.journal: list[bytes] = []
        self.shipped: Counter[int] = Counter()
        self.ended: set[int] = set()
        self.valid: set[int] = set()
        self.given_up: set[int] = set()
        self.taken = 0  # groups that a batch took for the first time

    def record(self, event) -> None:
        """Notes what the event gives up, as it is meant to."""
        if isinstance(event, GroupExpired):
            self.given_up |= {r.rollout_id for r in self.state.groups[event.group_id].unsettled}
        elif isinstance(event, GroupClosed) and event.outcome != "ready":
            self.given_up |= set(self.state.groups[event.group_id].rollout_ids)
        elif isinstance(event, BatchShipped):
            self.given_up |= set(event.too_old)
        self.journal.append(msgspec.msgpack.encode(event))
        self.state.apply(event)

    @precondition(lambda self: len(self.state.groups) < 8)
    @rule()
    def open_group(self):
        group_id = self.state.next_group
        task = Task(prompt=str(group_id))
        self.record(
            GroupOpened(group_id=group_id, source="s", task=task, size=SIZE, cursor_epoch=0, cursor_taken=group_id + 1)
        )

    def running(self) -> list[int]:
        return [i for g in self.state.groups.values() for i in g.rollout_ids if i not in g.records]

    @precondition(lambda self: self.running())
    @rule(data=st.data(), reward=st.sampled_from([0.0, 1.0]), valid=st.booleans(), late=st.integers(0, 3))
    def end_rollout(self, data, reward, valid, late):
        rollout_id = data.draw(st.sampled_from(self.running()))
        version = max(self.state.next_step - late, 0)
        record = _record(rollout_id, reward, version) if valid else _invalid(rollout_id)
        self.ended.add(rollout_id)
        self.valid |= {rollout_id} if valid else set()
        group = self.state.groups[rollout_id // SIZE]
        self.record(RolloutEnded(record=record))
        self.close(group)

    def close(self, group: Group) -> None:
        if group.all_ended and group.status in (GroupStatus.OPEN, GroupStatus.PARTED):
            self.record(GroupClosed(group_id=group.group_id, outcome=outcome(group, drop_zero_signal=True)))

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def retry(self, data):
        self.record(RolloutRetried(rollout_id=data.draw(st.sampled_from(self.running())), error="x"))

    @precondition(lambda self: self.running())
    @rule(data=st.data(), late=st.integers(0, 4))
    def begin_to_reply(self, data, late):
        """A rollout in flight has its first token of some version: it becomes too old while it runs on."""
        rollout_id = data.draw(st.sampled_from(self.running()))
        spans = (Span(max(self.state.next_step - late, 0), 0, 1),)
        reply = Reply(token_ids=[1], logprobs=[-1.0], spans=spans, finish_reason="abort")
        piece = JournalledReply(call=0, prompt_hash=0, reply=reply)
        self.record(PartlyReplied(rollout_id=rollout_id, piece=piece))

    @rule()
    def cut(self):
        for rollout_id in too_old_in_flight(self.state, self.running(), max_age=MAX_AGE):
            group = self.state.groups[rollout_id // SIZE]
            self.record(RolloutCut(rollout_id=rollout_id, num_tokens=1))
            self.close(group)

    @precondition(lambda self: any(may_part(g, drop_zero_signal=True) for g in self.state.groups.values()))
    @rule(data=st.data())
    def part(self, data):
        able = [g.group_id for g in self.state.groups.values() if may_part(g, drop_zero_signal=True)]
        self.record(GroupParted(group_id=data.draw(st.sampled_from(able))))

    @rule(data=st.data(), reward=st.sampled_from([0.0, 1.0]))
    def ship(self, data, reward):
        for group_id in expired(self.state, max_age=MAX_AGE):
            self.record(GroupExpired(group_id=group_id))
        oldest_open = min(
            (g.group_id for g in self.state.groups.values() if g.status == GroupStatus.OPEN), default=None
        )
        groups = take(self.state, groups_per_step=GROUPS_PER_STEP, window=WINDOW, max_age=MAX_AGE)
        if groups is None:
            return
        new = [g for g in groups if g.status is not GroupStatus.LATE]
        ids = [g.group_id for g in new]
        assert ids == sorted(ids), "dispatch order"
        assert len(ids) == GROUPS_PER_STEP
        assert oldest_open is None or max(ids) < oldest_open + WINDOW
        for group in last_chances(self.state, before=max(ids), max_age=MAX_AGE):
            assert group.status is GroupStatus.OPEN
            assert group.group_id < max(ids)
        self.write_batch(groups, new, data, reward)

    def write_batch(self, groups: list[Group], new: list[Group], data, reward: float) -> None:
        """While the batch is written one more rollout may end: it is not in the batch, and must not be lost."""
        step = self.state.next_step
        kept = {g.group_id: baselines(g, RULES, {}) for g in groups if not g.all_ended and not g.settled}
        unsettled = [r.rollout_id for g in groups for r in g.unsettled]
        _, _, trained = make_batch(groups, {}, step=step, attempt=1, rules=RULES)
        assert {r.rollout_id // SIZE for r in trained} == {g.group_id for g in groups}, "nothing is taken in vain"
        rollout_ids = [r.rollout_id for r in trained]
        self.shipped.update(rollout_ids)
        if self.running() and data.draw(st.booleans()):
            rollout_id = self.running()[0]
            group = self.state.groups[rollout_id // SIZE]
            self.ended.add(rollout_id)
            self.valid.add(rollout_id)
            self.record(RolloutEnded(record=_record(rollout_id, reward, step)))
            self.close(group)
        self.record(
            BatchShipped(
                step=step,
                group_ids=[g.group_id for g in groups],
                rollout_ids=rollout_ids,
                too_old=sorted(set(unsettled) - set(rollout_ids)),
                baselines=kept,
            )
        )
        self.taken += len(new)

    @rule()
    def kill_and_replay(self):
        """The state is its journal."""
        replayed = LoopState()
        for frame in self.journal:
            replayed.apply(_decode(frame))
        assert msgspec.msgpack.encode(replayed) == msgspec.msgpack.encode(self.state)
        self.state = replayed

    @invariant()
    def nothing_is_shipped_twice_or_without_having_ended(self):
        assert all(count == 1 for count in self.shipped.values())
        assert set(self.shipped) <= self.ended

    @invariant()
    def groups_are_conserved(self):
        counts = self.state.counts
        gone = sum(counts.get(f"groups_{name}", 0) for name in ("zero_signal", "all_invalid", "too_old"))
        untaken = [g for g in self.state.groups.values() if g.status is not GroupStatus.LATE]
        assert counts.get("groups_opened", 0) == len(untaken) + gone + self.taken

    @invariant()
    def nothing_that_may_still_train_is_forgotten(self):
        """A valid rollout is in a batch, waits for one, or was given up for a reason that an event names."""
        counts = self.state.counts
        waiting = {r.rollout_id for g in self.state.groups.values() for r in g.unsettled}
        assert self.valid == set(self.shipped) | waiting | (self.given_up & self.valid)
        assert not waiting & set(self.shipped)
        late = [g for g in self.state.groups.values() if g.status is GroupStatus.LATE]
        assert all(g.baselines for g in late), "late members have something to be compared with"
        assert all(set(g.settled) <= set(g.records) for g in late)
        assert counts.get("rollouts_shipped", 0) == sum(self.shipped.values())


def _decode(frame: bytes):
    from palestra.orchestrate.state import Event

    return msgspec.msgpack.decode(frame, type=Event)


def _record(rollout_id: int, reward: float, version: int) -> RolloutRecord:
    sample = Sample(token_ids=[1, 2], logprobs=[0.0, -1.0], sampled=[0, 1], spans=(Span(version, 1, 2),))
    return RolloutRecord(
        rollout_id=rollout_id,
        environment="s",
        task=Task(),
        ending=Ending.OK,
        reward=reward,
        seats=(Seat(samples=(sample,)),),
    )


def _invalid(rollout_id: int) -> RolloutRecord:
    return RolloutRecord(rollout_id=rollout_id, environment="s", task=Task(), ending=Ending.INVALID)


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
