"""The loop's state, changed by events only, so that a journal of events is the state.

Every decision (which task, which groups in a batch) is made outside and recorded here as an event. Replaying a
snapshot's journal gives the state the process had when it was killed: nothing finished is lost or shipped twice.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Self

import msgspec
from msgspec import Struct, field

from palestra.core.metrics import Metric, Metrics
from palestra.core.records import ChatReply, Ending, Reply, RolloutRecord, Task
from palestra.orchestrate.curriculum import Found, Observation, Pool, Rating, Result, SourcePools

CUT = "stopped in flight: too old to train (algo.max_age)"  # the error of such a rollout


class GroupStatus(StrEnum):
    OPEN = "open"  # members are waiting, running or being scored
    PARTED = "parted"  # the members that ended may train without the others
    READY = "ready"  # all members ended and there is signal
    LATE = "late"  # members are in a batch; others are still out, or ended later and may train
    DROPPED = "dropped"  # never trains; see `GroupClosed.outcome`
    SHIPPED = "shipped"  # all of it is in batches


_ALLOWED = {
    GroupStatus.OPEN: {GroupStatus.READY, GroupStatus.PARTED, GroupStatus.DROPPED},
    GroupStatus.PARTED: {GroupStatus.READY, GroupStatus.LATE, GroupStatus.SHIPPED, GroupStatus.DROPPED},
    GroupStatus.READY: {GroupStatus.SHIPPED, GroupStatus.LATE, GroupStatus.DROPPED},
    GroupStatus.LATE: {GroupStatus.LATE, GroupStatus.SHIPPED, GroupStatus.DROPPED},
    GroupStatus.DROPPED: set(),
    GroupStatus.SHIPPED: set(),
}


class Cursor(Struct, kw_only=True):
    """How far a task source has been read. `taken` counts tasks of the epoch that groups were opened for."""

    epoch: int = 0
    taken: int = 0


class Baseline(Struct, frozen=True, array_like=True):
    """What rewards of one seat are compared with: the mean and the standard deviation of a group's members."""

    mean: float
    std: float


class Average(Struct, frozen=True, array_like=True):
    """A moving average of returns, and of their squares."""

    mean: float
    square: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(sum(values) / len(values), sum(value**2 for value in values) / len(values))


class Group(Struct, kw_only=True):
    """The rollouts of one task. Member m has rollout id `group_id * size + m`.

    `settled` are members that a batch has taken, or that were too old for it; `baselines`, by seat and turn
    (`buffer.Part.key`), are what members that end after that are compared with.
    """

    group_id: int
    source: str
    task: Task
    size: int
    has_group_rewards: bool = False
    status: GroupStatus = GroupStatus.OPEN
    records: dict[int, RolloutRecord] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    is_observed: bool = False  # a curriculum knows what its rollouts were worth

    @property
    def rollout_ids(self) -> range:
        return range(self.group_id * self.size, (self.group_id + 1) * self.size)

    @property
    def all_ended(self) -> bool:
        return len(self.records) == self.size

    @property
    def valid(self) -> list[RolloutRecord]:
        """Members that have a reward, in member order."""
        return [
            self.records[i] for i in self.rollout_ids if i in self.records and self.records[i].ending != Ending.INVALID
        ]

    @property
    def unsettled(self) -> list[RolloutRecord]:
        """Valid members that no batch has taken yet."""
        return [record for record in self.valid if record.rollout_id not in self.settled]

    def move(self, status: GroupStatus) -> None:
        if status not in _ALLOWED[self.status]:
            raise ValueError(f"group {self.group_id} cannot go from {self.status} to {status}")
        self.status = status


class JournalledReply(Struct, frozen=True, kw_only=True):
    """One engine reply, found again by what was asked: the call's number and a hash of its prompt."""

    call: int
    prompt_hash: int
    reply: Reply


class SeatReply(Struct, frozen=True, kw_only=True):
    """What the endpoint of a seat said, found again in the same way."""

    call: int
    prompt_hash: int
    reply: ChatReply


# --- events


class GroupOpened(Struct, frozen=True, kw_only=True, tag=True):
    """`cursor_*` is the source's position after this task was taken; `pool` is where a curriculum drew it from."""

    group_id: int
    source: str
    task: Task
    size: int
    cursor_epoch: int
    cursor_taken: int
    has_group_rewards: bool = False
    pool: str = ""


class Replied(Struct, frozen=True, kw_only=True, tag=True):
    rollout_id: int
    reply: JournalledReply


class SeatReplied(Struct, frozen=True, kw_only=True, tag=True):
    rollout_id: int
    reply: SeatReply


class PartlyReplied(Struct, frozen=True, kw_only=True, tag=True):
    """The next piece of a reply that is on its way; it counts until the whole reply is there."""

    rollout_id: int
    piece: JournalledReply


class RolloutEnded(Struct, frozen=True, kw_only=True, tag=True):
    record: RolloutRecord


class RolloutRetried(Struct, frozen=True, kw_only=True, tag=True):
    """An invalid rollout starts over; its replies are forgotten."""

    rollout_id: int
    error: str


class GroupClosed(Struct, frozen=True, kw_only=True, tag=True):
    """All members ended. `records` replace the members' (group rewards are in them). Outcome: see `buffer.outcome`; or
    `quarantined`, whatever its members did. `observed` is what a curriculum learns of the task; of no rollouts without
    one."""

    group_id: int
    outcome: str
    records: list[RolloutRecord] = []
    observed: Result = Result(0.0, 0)


class GroupParted(Struct, frozen=True, kw_only=True, tag=True):
    """The members that ended may train without the others."""

    group_id: int


class RolloutCut(Struct, frozen=True, kw_only=True, tag=True):
    """A rollout in flight became too old to train: it is stopped. `num_tokens`: how far it had come."""

    rollout_id: int
    num_tokens: int


class GroupExpired(Struct, frozen=True, kw_only=True, tag=True):
    """What of a group has not trained yet became too old to train."""

    group_id: int


class BatchShipped(Struct, frozen=True, kw_only=True, tag=True):
    """The batch file of `step` is complete on disk and holds these rollouts of these groups; the rollouts in `too_old`
    were past the age bound. `baselines`, by group and seat, are those of groups with members still out: they train
    later against the same ones. `metrics` are those of its rollouts; `observed` is what a curriculum learns of groups
    that train before they closed. `averages` are the moving averages of returns after it."""

    step: int
    group_ids: list[int]
    rollout_ids: list[int]
    too_old: list[int] = []
    baselines: dict[int, dict[str, Baseline]] = {}
    metrics: dict[str, Metric] = {}
    observed: dict[int, Result] = {}
    averages: dict[str, Average] = {}


class Published(Struct, frozen=True, kw_only=True, tag=True):
    """Engines hold `version`: no older one is published any more."""

    version: int


class TaskQuarantined(Struct, frozen=True, kw_only=True, tag=True):
    """Environment workers die of this task (`quarantine.name_of`): it is not played again in this run."""

    task: str
    reason: str


class StepsSaved(Struct, frozen=True, kw_only=True, tag=True):
    """A checkpoint holds `version`: no step before it is ever trained again."""

    version: int


class EvalEnded(Struct, frozen=True, kw_only=True, tag=True):
    """`version` was in the engines at the start; `versions` are those that sampled its tokens."""

    name: str
    version: int
    versions: list[int]
    reward: float
    num_rollouts: int
    when: str  # start, end or during


class TasksSeeded(Struct, frozen=True, kw_only=True, tag=True):
    """The curriculum begins with these results, by task key."""

    results: dict[str, Result]


class SourceRead(Struct, frozen=True, kw_only=True, tag=True):
    """A curriculum read `num_tasks` further tasks of a source and met these for the first time."""

    source: str
    cursor_epoch: int
    cursor_taken: int
    num_tasks: int
    found: list[Found] = []
    forgotten: list[str] = []
    barren: int = 0
    is_whole: bool = False


class TasksRated(Struct, frozen=True, kw_only=True, tag=True):
    """All pending observations count from now on. `step` is the step that the next batch is for."""

    step: int
    ratings: list[Rating]


Event = (
    GroupOpened
    | Replied
    | SeatReplied
    | PartlyReplied
    | RolloutEnded
    | RolloutRetried
    | GroupClosed
    | GroupParted
    | RolloutCut
    | GroupExpired
    | BatchShipped
    | Published
    | TaskQuarantined
    | StepsSaved
    | EvalEnded
    | TasksSeeded
    | SourceRead
    | TasksRated
)


class LoopState(Struct, kw_only=True):
    """Everything the loop must know to go on. Only `apply` changes it.

    `groups` holds groups that are not wholly trained or dropped; `replies`, the `begun` ones and `seat_replies` those
    of rollouts that have not ended; `next_step` is the step the next batch is for. `pools`, by source, and `seeds`, by
    task key, are the curriculum's; `moves` are those of the last ratings, of step `rated_at`.
    """

    next_group: int = 0
    next_step: int = 0
    groups: dict[int, Group] = field(default_factory=dict)
    replies: dict[int, list[JournalledReply]] = field(default_factory=dict)
    begun: dict[int, list[JournalledReply]] = field(default_factory=dict)
    seat_replies: dict[int, list[SeatReply]] = field(default_factory=dict)
    cursors: dict[str, Cursor] = field(default_factory=dict)
    evals: list[EvalEnded] = field(default_factory=list)
    batch_metrics: dict[int, Metrics] = field(default_factory=dict)  # by step, of batches that may be trained again
    counts: dict[str, int] = field(default_factory=dict)
    max_versions_in_a_rollout: int = 0
    published: int = -1  # the newest version that engines held; -1: none yet
    quarantined: dict[str, str] = field(default_factory=dict)  # task -> why
    pools: dict[str, SourcePools] = field(default_factory=dict)
    seeds: dict[str, Result] = field(default_factory=dict)
    moves: list[Rating] = field(default_factory=list)
    rated_at: int = 0
    averages: dict[str, Average] = field(default_factory=dict)  # moving ones, see `batcher.moved`

    def apply(self, event: Event) -> None:
        """Errors: ValueError for an event that cannot follow (a rollout that ends twice, a batch out of order)."""
        _APPLY[type(event)](self, event)

    def reply_to(self, rollout_id: int, call: int, prompt_hash: int) -> Reply | None:
        """The whole reply to this call, if it was journalled."""
        return _find(self.replies.get(rollout_id, []), call, prompt_hash)

    def seat_reply_to(self, rollout_id: int, call: int, prompt_hash: int) -> ChatReply | None:
        """What the endpoint of a seat said to it, if it was journalled."""
        return _find(self.seat_replies.get(rollout_id, []), call, prompt_hash)

    def reply_begun(self, rollout_id: int, call: int, prompt_hash: int) -> Reply | None:
        """What was journalled of a reply that broke off."""
        return _find(self.begun.get(rollout_id, []), call, prompt_hash)

    def oldest_version(self, rollout_id: int) -> int | None:
        """Of the tokens that a rollout in flight is known to have; None before the first of them."""
        return min((span.version for reply in self._known(rollout_id) for span in reply.spans), default=None)

    def num_known_tokens(self, rollout_id: int) -> int:
        """That a rollout in flight is known to have sampled."""
        return sum(len(reply.token_ids) for reply in self._known(rollout_id))

    def _known(self, rollout_id: int) -> list[Reply]:
        return [known.reply for known in (*self.replies.get(rollout_id, []), *self.begun.get(rollout_id, []))]

    @property
    def length_drift(self) -> float:
        """How much longer the rollouts that trained are than those dispatched in groups with signal, as a share: the
        loop selects by length, if it is not about 0."""
        counts = self.counts
        if not counts.get("tokens_dispatched") or not counts.get("rollouts_shipped"):
            return 0.0
        dispatched = counts["tokens_dispatched"] / counts["rollouts_dispatched"]
        return counts.get("tokens_trained", 0) / counts["rollouts_shipped"] / dispatched - 1

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount


def _find(replies: Sequence[Any], call: int, prompt_hash: int) -> Any:
    found = (known.reply for known in replies if known.call == call and known.prompt_hash == prompt_hash)
    return next(found, None)


def _group_opened(state: LoopState, event: GroupOpened) -> None:
    if event.group_id != state.next_group:
        raise ValueError(f"group {event.group_id} opened where group {state.next_group} is next")
    state.groups[event.group_id] = Group(
        group_id=event.group_id,
        source=event.source,
        task=event.task,
        size=event.size,
        has_group_rewards=event.has_group_rewards,
    )
    state.cursors[event.source] = Cursor(epoch=event.cursor_epoch, taken=event.cursor_taken)
    state.next_group += 1
    state.count("groups_opened")
    if event.pool:
        state.pools[event.source].draw(event.task.key, event.group_id)
        state.count(f"draws_{event.pool}")


def _replied(state: LoopState, event: Replied) -> None:
    state.replies.setdefault(event.rollout_id, []).append(event.reply)
    _drop_begun(state, event.rollout_id, event.reply.call)


def _seat_replied(state: LoopState, event: SeatReplied) -> None:
    state.seat_replies.setdefault(event.rollout_id, []).append(event.reply)


def _forget_replies(state: LoopState, rollout_id: int) -> None:
    for replies in (state.replies, state.begun, state.seat_replies):
        replies.pop(rollout_id, None)


def _partly_replied(state: LoopState, event: PartlyReplied) -> None:
    piece = event.piece
    known = state.reply_begun(event.rollout_id, piece.call, piece.prompt_hash)
    _drop_begun(state, event.rollout_id, piece.call)
    whole = piece if known is None else msgspec.structs.replace(piece, reply=known.then(piece.reply))
    state.begun.setdefault(event.rollout_id, []).append(whole)


def _drop_begun(state: LoopState, rollout_id: int, call: int) -> None:
    if left := [known for known in state.begun.pop(rollout_id, []) if known.call != call]:
        state.begun[rollout_id] = left


def _rollout_ended(state: LoopState, event: RolloutEnded) -> None:
    record = event.record
    state.max_versions_in_a_rollout = max(state.max_versions_in_a_rollout, len(record.versions))
    state.count(f"rollouts_{record.ending}")
    state.count("tokens_sampled", record.num_sampled_tokens)
    _note_end(state, record)


def _rollout_cut(state: LoopState, event: RolloutCut) -> None:
    group = _live_group(state, event.rollout_id)
    state.count("rollouts_cut")
    _count_dispatched(state, [event.num_tokens])
    _note_end(
        state,
        RolloutRecord(
            rollout_id=event.rollout_id, environment=group.source, task=group.task, ending=Ending.INVALID, error=CUT
        ),
    )


def _count_dispatched(state: LoopState, tokens: list[int]) -> None:
    """Lengths of rollouts whose group has signal, whether they train or not: at least these, of those that were cut."""
    state.count("rollouts_dispatched", len(tokens))
    state.count("tokens_dispatched", sum(tokens))


def _note_end(state: LoopState, record: RolloutRecord) -> None:
    group = _live_group(state, record.rollout_id)
    if record.rollout_id in group.records:
        raise ValueError(f"rollout {record.rollout_id} ended twice")
    group.records[record.rollout_id] = record
    _forget_replies(state, record.rollout_id)
    if group.status in (GroupStatus.PARTED, GroupStatus.LATE) and record.ending != Ending.INVALID:
        _count_dispatched(state, [record.num_sampled_tokens])
    if group.status is GroupStatus.LATE:
        state.count("rollouts_late")
        _leave_if_settled(state, group)


def _rollout_retried(state: LoopState, event: RolloutRetried) -> None:
    group = _live_group(state, event.rollout_id)
    group.tries[event.rollout_id] = group.tries.get(event.rollout_id, 0) + 1
    _forget_replies(state, event.rollout_id)
    state.count("rollouts_retried")


def _group_closed(state: LoopState, event: GroupClosed) -> None:
    group = state.groups[event.group_id]
    for record in event.records:
        group.records[record.rollout_id] = record
    state.count(f"groups_{event.outcome}")
    _note_observed(state, group, event.observed)
    if event.outcome == "ready":
        if group.status is GroupStatus.OPEN:
            _count_dispatched(state, [record.num_sampled_tokens for record in group.valid])
        group.move(GroupStatus.READY)
    else:
        group.move(GroupStatus.DROPPED)
        del state.groups[event.group_id]
        for rollout_id in group.rollout_ids:
            _forget_replies(state, rollout_id)


def _group_parted(state: LoopState, event: GroupParted) -> None:
    group = state.groups[event.group_id]
    group.move(GroupStatus.PARTED)
    _count_dispatched(state, [record.num_sampled_tokens for record in group.valid])
    state.count("groups_parted")


def _group_expired(state: LoopState, event: GroupExpired) -> None:
    group = state.groups.pop(event.group_id)
    if group.status is GroupStatus.LATE:
        state.count("rollouts_late_too_old", len(group.unsettled))
    else:
        state.count("groups_too_old")
    group.move(GroupStatus.DROPPED)


def _batch_shipped(state: LoopState, event: BatchShipped) -> None:
    if event.step != state.next_step:
        raise ValueError(f"batch of step {event.step} shipped where step {state.next_step} is next")
    trained = set(event.rollout_ids)
    for group in [state.groups[group_id] for group_id in event.group_ids if group_id in state.groups]:
        _note_observed(state, group, event.observed.get(group.group_id, Result(0.0, 0)))
        members = set(group.rollout_ids)
        tokens = sum(group.records[i].num_sampled_tokens for i in trained & members)
        state.count("tokens_trained", tokens)
        group.settled |= members & trained.union(event.too_old)
        group.baselines = event.baselines.get(group.group_id, group.baselines)
        group.move(GroupStatus.LATE)
        _leave_if_settled(state, group)
    state.averages |= event.averages
    state.batch_metrics[event.step] = event.metrics
    state.next_step += 1
    state.count("rollouts_shipped", len(event.rollout_ids))


def _leave_if_settled(state: LoopState, group: Group) -> None:
    if group.all_ended and not group.unsettled:
        state.groups.pop(group.group_id).move(GroupStatus.SHIPPED)


def _published(state: LoopState, event: Published) -> None:
    if event.version < state.published:
        raise ValueError(f"version {event.version} published after version {state.published}")
    state.published = event.version


def _task_quarantined(state: LoopState, event: TaskQuarantined) -> None:
    state.quarantined[event.task] = event.reason
    for source, pools in state.pools.items():
        if event.task.startswith(f"{source}/"):
            pools.forget(event.task.removeprefix(f"{source}/"))
    state.count("tasks_quarantined")


def _steps_saved(state: LoopState, event: StepsSaved) -> None:
    state.batch_metrics = {step: kept for step, kept in state.batch_metrics.items() if step >= event.version}


def _eval_ended(state: LoopState, event: EvalEnded) -> None:
    state.evals.append(event)


def _note_observed(state: LoopState, group: Group, result: Result) -> None:
    group.is_observed = True
    if result.count:
        state.pools[group.source].pending.append(Observation(group.group_id, group.task.key, result))


def _tasks_seeded(state: LoopState, event: TasksSeeded) -> None:
    state.seeds = event.results


def _source_read(state: LoopState, event: SourceRead) -> None:
    pools = state.pools.setdefault(event.source, SourcePools())
    pools.read(event.found, event.forgotten, barren=event.barren, is_whole=event.is_whole)
    state.cursors[event.source] = Cursor(epoch=event.cursor_epoch, taken=event.cursor_taken)
    state.count("tasks_found", len(event.found))
    state.count("tasks_seeded", sum(bool(found.standing.recent) for found in event.found))
    state.count("tasks_forgotten", len(event.forgotten))


def _tasks_rated(state: LoopState, event: TasksRated) -> None:
    for pools in state.pools.values():
        pools.pending = []
    for rating in event.ratings:
        state.pools[rating.source].rate(rating)
    state.rated_at = event.step
    state.moves = [rating for rating in event.ratings if rating.after != rating.before]
    state.count("pool_moves", len(state.moves))
    state.count("tasks_retired", sum(rating.after == Pool.RETIRED for rating in state.moves))


def _live_group(state: LoopState, rollout_id: int) -> Group:
    for group in state.groups.values():
        if rollout_id in group.rollout_ids:
            return group
    raise ValueError(f"rollout {rollout_id} belongs to no live group")


_APPLY = {
    GroupOpened: _group_opened,
    Replied: _replied,
    SeatReplied: _seat_replied,
    PartlyReplied: _partly_replied,
    RolloutEnded: _rollout_ended,
    RolloutRetried: _rollout_retried,
    GroupClosed: _group_closed,
    GroupParted: _group_parted,
    RolloutCut: _rollout_cut,
    GroupExpired: _group_expired,
    BatchShipped: _batch_shipped,
    Published: _published,
    TaskQuarantined: _task_quarantined,
    StepsSaved: _steps_saved,
    EvalEnded: _eval_ended,
    TasksSeeded: _tasks_seeded,
    SourceRead: _source_read,
    TasksRated: _tasks_rated,
}
