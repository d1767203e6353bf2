"""Messages between our processes. One direction of one boundary is one union; frames carry the run's attempt."""

from typing import Any, Literal

from msgspec import Struct

from palestra.core.ledger import LedgerEntry
from palestra.core.metrics import Metric
from palestra.core.records import ChatReply, Reply, RolloutRecord, Sampling, Task
from palestra.wire.weights.manifest import Staged

# --- orchestrator -> environment worker


class ListTasks(Struct, frozen=True, kw_only=True, tag=True):
    """Ask for tasks [offset, offset + count) of an environment, in its own order, for one epoch."""

    request_id: int
    source: str  # name of an entry of env.mix or eval.sets
    epoch: int
    offset: int
    count: int


class Play(Struct, frozen=True, kw_only=True, tag=True):
    """Start one rollout. `seed` is the environment's; engine seeds are the gateway's."""

    rollout_id: int
    source: str
    task: Task
    sampling: Sampling
    seed: int


class CallReply(Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a `Call`: a reply of tokens, one in words where messages were asked, or why there is none: the
    rollout is invalid then, or `is_too_long` for the model's context."""

    rollout_id: int
    call: int
    reply: Reply | None = None
    chat: ChatReply | None = None
    error: str = ""
    is_too_long: bool = False


class ScoreGroup(Struct, frozen=True, kw_only=True, tag=True):
    """Run the group rewards of an environment over the rollouts of one group."""

    request_id: int
    source: str
    records: list[RolloutRecord]


class Cancel(Struct, frozen=True, kw_only=True, tag=True):
    """Stop a rollout whose result is no longer wanted. The worker answers `Cancelled`, whether it knows it or not."""

    rollout_id: int


class Stop(Struct, frozen=True, kw_only=True, tag=True):
    """Finish cleanly."""


ToWorker = ListTasks | Play | CallReply | ScoreGroup | Cancel | Stop


# --- environment worker -> orchestrator


class WorkerReady(Struct, frozen=True, kw_only=True, tag=True):
    """The worker has nothing to do: what it was asked before, in another life or by another orchestrator, is gone.

    `sources` are the entries of env.mix and eval.sets that it plays; all, if none is named.
    """

    index: int
    pid: int
    life: int = 0
    sources: list[str] = []


class Tasks(Struct, frozen=True, kw_only=True, tag=True):
    """`exhausted`: the environment has no task after these in this epoch. `error`: its `tasks` raised."""

    request_id: int
    tasks: list[Task]
    exhausted: bool
    has_group_rewards: bool = False
    error: str = ""


class Call(Struct, frozen=True, kw_only=True, tag=True):
    """One call of a rollout: exact token ids in, for an engine; or messages, for an endpoint that takes no tokens.

    `seat` is the one whose model the recipe names (`seats` of the source); "": the model that trains or is measured.
    """

    rollout_id: int
    call: int
    token_ids: list[int]
    sampling: Sampling
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []
    seat: str = ""


class Ended(Struct, frozen=True, kw_only=True, tag=True):
    record: RolloutRecord


class Cancelled(Struct, frozen=True, kw_only=True, tag=True):
    """The rollout is stopped: the worker's event loop is alive."""

    rollout_id: int


class GroupScored(Struct, frozen=True, kw_only=True, tag=True):
    """The records with group rewards added, in the order asked. `error`: a group reward raised."""

    request_id: int
    records: list[RolloutRecord]
    error: str = ""


class LedgerClosed(Struct, frozen=True, kw_only=True, tag=True):
    """Ledger entry of a process, sent to the orchestrator, which owns the files. `is_last`: the process ends now.

    `resident_bytes`: its memory, if it says so.
    """

    entry: LedgerEntry
    is_last: bool = False
    resident_bytes: int = 0


FromWorker = WorkerReady | Tasks | Call | Ended | Cancelled | GroupScored | LedgerClosed


# --- orchestrator -> trainer


class TrainBatch(Struct, frozen=True, kw_only=True, tag=True):
    """Train the batch file of `step`; stage the weights after it where `publish` says so, save where `save` does."""

    step: int
    publish: bool
    save: bool


class WeightsLoaded(Struct, frozen=True, kw_only=True, tag=True):
    """Engines hold `version`: older staged weights may be discarded."""

    version: int


class Finish(Struct, frozen=True, kw_only=True, tag=True):
    """No batch follows: export and end."""


class StillEvaluating(Struct, frozen=True, kw_only=True, tag=True):
    """The orchestrator is at work, although no batch and no word of weights comes: its deadline begins anew."""


class TurnGiven(Struct, frozen=True, kw_only=True, tag=True):
    """The device that engine and trainer share is the receiver's: the trainer's until it says `TurnOver`, an engine's
    until it is put to sleep, either's until it ends."""


class SendWeights(Struct, frozen=True, kw_only=True, tag=True):
    """Engines are stopped and wait for `version`: send it to their `num_workers` workers now. `is_new_group`: they are
    others than those of the last send, or of another life."""

    version: int
    num_workers: int
    is_new_group: bool


class StageFiles(Struct, frozen=True, kw_only=True, tag=True):
    """Engines wait that missed what was sent: stage the version that there is as files."""


Order = TrainBatch | WeightsLoaded | Finish | SendWeights | StageFiles
ToTrainer = Order | StillEvaluating | TurnGiven


# --- trainer or engine, before it begins -> orchestrator


class TurnAsked(Struct, frozen=True, kw_only=True, tag=True):
    """The sender shares its device, uses nothing of it, and waits for `TurnGiven`."""


class TurnOver(Struct, frozen=True, kw_only=True, tag=True):
    """The trainer has left the device to others."""


# --- trainer -> orchestrator


class WarmedUp(Struct, frozen=True, kw_only=True, tag=True):
    """One supervised step before version 0."""

    step: int
    metrics: dict[str, Metric]


class StepTrained(Struct, frozen=True, kw_only=True, tag=True):
    """`step` turned version `step` into `step + 1`. `ledgers`: an entry of every rank, the first rank's first."""

    step: int
    metrics: dict[str, Metric]
    ledgers: list[LedgerEntry]


class WeightsStaged(Struct, frozen=True, kw_only=True, tag=True):
    staged: Staged


class EnginesAsked(Struct, frozen=True, kw_only=True, tag=True):
    """What vLLM's trainer side says to engines that it sends a version: `init` how to meet, `update` what comes."""

    what: Literal["init", "update"]
    info: dict[str, Any]


class WeightsSent(Struct, frozen=True, kw_only=True, tag=True):
    """The trainer has sent `version`, in `send_s`, or tells why it could not."""

    version: int
    send_s: float = 0.0
    error: str = ""


class TrainerSaved(Struct, frozen=True, kw_only=True, tag=True):
    """The trainer's part of the checkpoint of `version` is complete in `directory`."""

    version: int
    directory: str


class TrainerReady(Struct, frozen=True, kw_only=True, tag=True):
    """The trainer holds `version`: said at its start, and again to an orchestrator that took another's place, who may
    have died before it heard of the newest `staged` and `saved` versions and the latest `steps`."""

    version: int
    staged: Staged | None = None
    saved: TrainerSaved | None = None
    steps: list[StepTrained] = []


class Exported(Struct, frozen=True, kw_only=True, tag=True):
    """Weights in Hugging Face layout. `ledgers`: as in `StepTrained`."""

    directory: str
    ledgers: list[LedgerEntry]


FromTrainer = (
    TrainerReady
    | WarmedUp
    | StepTrained
    | WeightsStaged
    | TrainerSaved
    | Exported
    | LedgerClosed
    | TurnAsked
    | TurnOver
    | EnginesAsked
    | WeightsSent
)


# --- any process -> supervisor


class Progress(Struct, frozen=True, kw_only=True, tag=True):
    """One line of the live view. `stage` is what the run is doing now, in words."""

    process: str
    stage: str
    step: int = 0
    steps: int = 0
    numbers: dict[str, float] = {}


class Ready(Struct, frozen=True, kw_only=True, tag=True):
    """The process has what it needs: an end from now on is no failed start. Engines answer at /health instead, and the
    leader is ready when it says anything."""

    process: str


class Notice(Struct, frozen=True, kw_only=True, tag=True):
    """A line that stays in the live view, above what changes."""

    process: str
    text: str


class Done(Struct, frozen=True, kw_only=True, tag=True):
    """The process has done all it had to."""

    process: str


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """The process is about to end with an error. `is_user_error`: the message names the fix. `is_final`: the run cannot
    go on, so that the process is not started again."""

    process: str
    error: str
    is_user_error: bool
    is_final: bool = False


class Restart(Struct, frozen=True, kw_only=True, tag=True):
    """`process` is not to be trusted any more: end this `life` of it, if it still runs, and start it again.

    `is_planned`: it did its work, and that it ends counts for no storm.
    """

    process: str
    why: str
    life: int = 0
    is_planned: bool = False


ToSupervisor = Progress | Notice | Ready | Done | Failed | Restart


# --- supervisor -> orchestrator


class ProcessEnded(Struct, frozen=True, kw_only=True, tag=True):
    """A process of the run is gone; the supervisor starts it again. `life` is the one that ended."""

    process: str
    why: str
    life: int = 0


class ProcessStarted(Struct, frozen=True, kw_only=True, tag=True):
    """A process under its name. `life` counts its starts in this attempt, from 0; one that is known already says
    nothing new."""

    process: str
    life: int


ToOrchestrator = ProcessEnded | ProcessStarted
