"""The loop's state, changed by events only, so that a journal of events is the state.

Every decision (which task, which groups in a batch) is made outside and recorded here as an event. Replaying a
snapshot's journal gives the state the process had when it was killed: nothing finished is lost or shipped twice.
"""

from enum import StrEnum

import msgspec
from msgspec import Struct, field

from palestra.core.metrics import Metric, Metrics
from palestra.core.records import Ending, Reply, RolloutRecord, Task
from palestra.orchestrate.curriculum import Found, Observation, Pool, Rating, Result, SourcePools


class GroupStatus(StrEnum):
    OPEN = "open"  # members are waiting, running or being scored
    READY = "ready"  # all members ended and there is signal
    DROPPED = "dropped"  # never trains; see `GroupClosed.outcome`
    SHIPPED = "shipped"  # in a batch


_ALLOWED = {
    GroupStatus.OPEN: {GroupStatus.READY, GroupStatus.DROPPED},
    GroupStatus.READY: {GroupStatus.SHIPPED, GroupStatus.DROPPED},
    GroupStatus.DROPPED: set(),
    GroupStatus.SHIPPED: set(),
}


class Cursor(Struct, kw_only=True):
    """How far a task source has been read. `taken` counts tasks of the epoch that groups were opened for."""

    epoch: int = 0
    taken: int = 0


class Group(Struct, kw_only=True):
    """The rollouts of one task. Member m has rollout id `group_id * size + m`."""

    group_id: int
    source: str
    task: Task
    size: int
    has_group_rewards: bool = False
    status: GroupStatus = GroupStatus.OPEN
    records: dict[int, RolloutRecord] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
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

    def move(self, status: GroupStatus) -> None:
        if status not in _ALLOWED[self.status]:
            raise ValueError(f"group {self.group_id} cannot go from {self.status} to {status}")
        self.status = status


class JournalledReply(Struct, frozen=True, kw_only=True):
    """One engine reply, found again by what was asked: the call's number and a hash of its prompt."""

    call: int
    prompt_hash: int
    reply: Reply


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
    """All members ended. `records` replace the members' (group rewards are in them). Outcome: see `buffer.outcome`.
    `observed` is what a curriculum learns of the task; of no rollouts without one."""

    group_id: int
    outcome: str
    records: list[RolloutRecord] = []
    observed: Result = Result(0.0, 0)


class GroupExpired(Struct, frozen=True, kw_only=True, tag=True):
    """A ready group became too old to train."""

    group_id: int


class BatchShipped(Struct, frozen=True, kw_only=True, tag=True):
    """The batch file of `step` is complete on disk and holds these groups. `metrics` are those of its rollouts;
    `observed` is what a curriculum learns of groups that train before they closed."""

    step: int
    group_ids: list[int]
    rollout_ids: list[int]
    metrics: dict[str, Metric] = {}
    observed: dict[int, Result] = {}


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
    | PartlyReplied
    | RolloutEnded
    | RolloutRetried
    | GroupClosed
    | GroupExpired
    | BatchShipped
    | StepsSaved
    | EvalEnded
    | TasksSeeded
    | SourceRead
    | TasksRated
)


class LoopState(Struct, kw_only=True):
    """Everything the loop must know to go on. Only `apply` changes it.

    `groups` holds open and ready groups; `replies` and the `begun` ones those of rollouts that have not ended;
    `next_step` is the step the next batch is for. `pools`, by source, and `seeds`, by task key, are the curriculum's;
    `moves` are those of the last ratings, of step `rated_at`.
    """

    next_group: int = 0
    next_step: int = 0
    groups: dict[int, Group] = field(default_factory=dict)
    replies: dict[int, list[JournalledReply]] = field(default_factory=dict)
    begun: dict[int, list[JournalledReply]] = field(default_factory=dict)
    cursors: dict[str, Cursor] = field(default_factory=dict)
    evals: list[EvalEnded] = field(default_factory=list)
    batch_metrics: dict[int, Metrics] = field(default_factory=dict)  # by step, of batches that may be trained again
    counts: dict[str, int] = field(default_factory=dict)
    max_versions_in_a_rollout: int = 0
    pools: dict[str, SourcePools] = field(default_factory=dict)
    seeds: dict[str, Result] = field(default_factory=dict)
    moves: list[Rating] = field(default_factory=list)
    rated_at: int = 0

    def apply(self, event: Event) -> None:
        """Errors: ValueError for an event that cannot follow (a rollout that ends twice, a batch out of order)."""
        _APPLY[type(event)](self, event)

    def reply_to(self, rollout_id: int, call: int, prompt_hash: int) -> Reply | None:
        """The whole reply to this call, if it was journalled."""
        return _find(self.replies.get(rollout_id, []), call, prompt_hash)

    def reply_begun(self, rollout_id: int, call: int, prompt_hash: int) -> Reply | None:
        """What was journalled of a reply that broke off."""
        return _find(self.begun.get(rollout_id, []), call, prompt_hash)

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount


def _find(replies: list[JournalledReply], call: int, prompt_hash: int) -> Reply | None:
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
    group = _live_group(state, record.rollout_id)
    if record.rollout_id in group.records:
        raise ValueError(f"rollout {record.rollout_id} ended twice")
    group.records[record.rollout_id] = record
    state.replies.pop(record.rollout_id, None)
    state.begun.pop(record.rollout_id, None)
    state.max_versions_in_a_rollout = max(state.max_versions_in_a_rollout, len(record.versions))
    state.count(f"rollouts_{record.ending}")
    state.count("tokens_sampled", record.num_sampled_tokens)


def _rollout_retried(state: LoopState, event: RolloutRetried) -> None:
    group = _live_group(state, event.rollout_id)
    group.tries[event.rollout_id] = group.tries.get(event.rollout_id, 0) + 1
    state.replies.pop(event.rollout_id, None)
    state.begun.pop(event.rollout_id, None)
    state.count("rollouts_retried")


def _group_closed(state: LoopState, event: GroupClosed) -> None:
    group = state.groups[event.group_id]
    for record in event.records:
        group.records[record.rollout_id] = record
    state.count(f"groups_{event.outcome}")
    _note_observed(state, group, event.observed)
    if event.outcome == "ready":
        group.move(GroupStatus.READY)
    else:
        group.move(GroupStatus.DROPPED)
        del state.groups[event.group_id]


def _group_expired(state: LoopState, event: GroupExpired) -> None:
    state.groups.pop(event.group_id).move(GroupStatus.DROPPED)
    state.count("groups_too_old")


def _batch_shipped(state: LoopState, event: BatchShipped) -> None:
    if event.step != state.next_step:
        raise ValueError(f"batch of step {event.step} shipped where step {state.next_step} is next")
    for group_id, result in event.observed.items():
        _note_observed(state, state.groups[group_id], result)
    for group_id in event.group_ids:
        state.groups.pop(group_id).move(GroupStatus.SHIPPED)
    state.batch_metrics[event.step] = event.metrics
    state.next_step += 1
    state.count("rollouts_shipped", len(event.rollout_ids))


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
    PartlyReplied: _partly_replied,
    RolloutEnded: _rollout_ended,
    RolloutRetried: _rollout_retried,
    GroupClosed: _group_closed,
    GroupExpired: _group_expired,
    BatchShipped: _batch_shipped,
    StepsSaved: _steps_saved,
    EvalEnded: _eval_ended,
    TasksSeeded: _tasks_seeded,
    SourceRead: _source_read,
    TasksRated: _tasks_rated,
}
