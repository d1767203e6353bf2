"""The trainer's loop in reinforcement learning.

Consumes: messages of the orchestrator, batch files of the run directory.
Produces: a policy version per batch, staged weights, checkpoints, and at the end the export.
Waits for: the orchestrator's next message, that engines load a version where too many are staged, its turn where it
shares the device, or that the files of a checkpoint are whole before the next one or the end; at most
`train.batch_deadline_s` each.
Woken by: that message, or by a checkpoint whose files are whole. Ends when: it is told to finish.
With several ranks the first one talks and tells the others. An orchestrator that was replaced is told again what the
one before may not have heard.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palestra.config import RunConfig
from palestra.core.errors import InfrastructureError
from palestra.core.ledger import Ledger, LedgerEntry
from palestra.core.process import life
from palestra.core.spans import SpanLog
from palestra.train.turns import OWN_DEVICE, OwnDevice, SharedDevice
from palestra.wire.batches import Batch
from palestra.wire.channel import BlockingCaller, Reconnected, Woken
from palestra.wire.messages import (
    EnginesAsked,
    Exported,
    Finish,
    FromTrainer,
    Order,
    Ready,
    SendWeights,
    StageFiles,
    StepTrained,
    StillEvaluating,
    ToTrainer,
    TrainBatch,
    TrainerReady,
    TrainerSaved,
    TurnAsked,
    TurnGiven,
    TurnOver,
    WarmedUp,
    WeightsLoaded,
    WeightsSent,
    WeightsStaged,
)
from palestra.wire.rundir import Attempt, RunDir, version_to_load
from palestra.wire.weights.manifest import Staged

if TYPE_CHECKING:  # the loop itself needs no torch: a trainer, whatever it computes with, is given to it
    from palestra.train.publish import Publisher, Sends
    from palestra.train.ranks import Ranks
    from palestra.train.trainer import Trainer


def reinforce(
    config: RunConfig, run: RunDir, attempt: Attempt, ranks: "Ranks", ledger: Ledger, tell: Callable[[Ready], None]
) -> None:
    from palestra.train.trainer import Trainer

    name = f"trainer-{ranks.rank}"
    orchestrator = Orchestrator(config, attempt, ranks, ledger)
    device = device_of(config, orchestrator, ledger)
    with closing(SpanLog(run.spans(name), name)) as spans:
        with device.taken():
            trainer = Trainer(config, ranks, ledger)
            device.keep(trainer.belongings())
            if ranks.is_first:
                tell(Ready(process="trainer"))
            publisher = _make_publisher(trainer, config, run, attempt)
            loop = Loop(trainer, publisher, orchestrator, run, attempt, ledger, spans, device, config.sync.deadline_s)
            _begin(loop, config)
        orchestrator.tell(TrainerReady(version=trainer.version))
        ledger.switch("other")
        loop.serve()


def device_of(config: RunConfig, orchestrator: "Orchestrator", ledger: Ledger) -> OwnDevice | SharedDevice:
    return SharedDevice(orchestrator, ledger) if config.takes_turns else OWN_DEVICE


def _begin(loop: "Loop", config: RunConfig) -> None:
    """Everything up to the first version: resume or warm up, stage."""
    from palestra.train.supervise import warm_up

    trainer, ledger, tell = loop.trainer, loop.ledger, loop.orchestrator.tell
    if (version := version_to_load(loop.run, loop.attempt, life())) is not None:
        trainer.resume(version, ledger)
    else:
        warm_up(trainer, config, ledger, lambda step, metrics: tell(WarmedUp(step=step, metrics=metrics)))
    loop.stage()


_SENDS: Mapping[str, "Sends"] = {"sparse_nccl": "changes", "nccl_m2n": "shards"}  # by sync.kind


def _make_publisher(trainer: "Trainer", config: RunConfig, run: RunDir, attempt: Attempt) -> "Publisher":
    from palestra.train.publish import Publisher
    from palestra.train.trainer import DTYPES

    return Publisher(
        trainer.policy,
        ranks=trainer.ranks,
        directory=Path(attempt.staging),
        attempt=attempt.number,
        life=life(),
        dtype=DTYPES[config.engine_dtype],
        probe_tokens=min(config.sync.probe_tokens, config.engine.max_model_len - 1),
        seed=config.train.seed,
        recorded_in=run.published if config.log.keep_weights else None,
        base=config.model_dir,
        full_every=config.sync.full_every if config.sync.difference else 1,
        local=str(config.sync.local.resolve()) if config.sync.local else "",
        by_handle=config.sync.kind == "ipc",
        send_from=config.launch.host if config.sync.is_sent else None,
        sends=_SENDS.get(config.sync.kind, "whole"),
    )


@dataclass(frozen=True)
class Loop:
    """Does what the orchestrator says, one message after the other."""

    trainer: "Trainer"
    publisher: "Publisher"
    orchestrator: "Orchestrator"
    run: RunDir
    attempt: Attempt
    ledger: Ledger
    spans: SpanLog
    device: OwnDevice | SharedDevice = OWN_DEVICE
    send_s: float = 300  # sync.deadline_s

    def serve(self) -> None:
        """Until `Finish`: then export."""
        try:
            self._serve()
        except Exception:
            with suppress(Exception):
                self.tell_saved()  # it counts, whatever ended the run
            raise
        with self.device.taken(), self.spans.span("export"):
            directory = self.trainer.export(self.ledger)
        self.orchestrator.tell(Exported(directory=str(directory), ledgers=self._close_ledgers()))

    def _serve(self) -> None:
        while not isinstance(message := self.orchestrator.next(self.trainer.version), Finish):
            match message:
                case WeightsLoaded():
                    self.publisher.loaded(message.version)
                case Woken():
                    self.tell_saved()
                case SendWeights():
                    self._send(message)
                case StageFiles():
                    self._stage_files()
                case TrainBatch():
                    with self.device.taken():
                        self._train(message)
        self.tell_saved()

    def _train(self, message: TrainBatch) -> None:
        if message.step < self.trainer.version:
            self._catch_up(message)
            return
        with self.spans.span("train", step=message.step):
            metrics = self.trainer.train(self._read(message.step), self.ledger)
        self.orchestrator.tell(StepTrained(step=message.step, metrics=metrics, ledgers=self._close_ledgers()))
        self._keep(publish=message.publish, save=message.save)

    def _catch_up(self, message: TrainBatch) -> None:
        """A step that is trained already, asked for by an orchestrator that did not know: only what is missing."""
        if message.step + 1 == self.trainer.version:
            staged = self.orchestrator.staged
            self._keep(
                publish=message.publish and (staged is None or staged.version < self.trainer.version),
                save=message.save and self.trainer.saved_version < self.trainer.version,
            )

    def _keep(self, *, publish: bool, save: bool) -> None:
        if publish:
            self.stage()
        if save:
            with self.spans.span("checkpoint", version=self.trainer.version):
                self.tell_saved()
                self.trainer.save(self.ledger, on_end=self.orchestrator.wake)

    def tell_saved(self) -> None:
        """Of the save that was begun, if there is one, and not before its files are whole: waits for it.

        Errors: InfrastructureError, if they could not be written.
        """
        if (written := self.trainer.finish_save(self.ledger)) is not None:
            self.spans.write("write_checkpoint", written.started_at, written.write_s, {"version": written.version})
            self.orchestrator.tell(TrainerSaved(version=written.version, directory=str(written.directory)))

    def _close_ledgers(self) -> list[LedgerEntry]:
        """Of all ranks, on the first one."""
        return self.trainer.ranks.to_first(self.ledger.close())

    def _read(self, step: int) -> Batch:
        with self.ledger.spend("read_batch"):
            return self.run.batches.read(step, attempt=self.attempt.number)

    def stage(self) -> None:
        """Stage the current version. What engines may be loading is never removed: where that leaves no room, wait."""
        while self.publisher.is_full:
            with self.device.left():
                loaded = self.orchestrator.next_loaded()
            self.publisher.loaded(loaded.version)
        with self.spans.span("stage", version=self.trainer.version):
            staged = self.publisher.stage(self.trainer.version, self.ledger)
        self.orchestrator.tell(WeightsStaged(staged=staged))
        if staged.is_sent:
            self._see_off(staged.version)

    def _see_off(self, version: int) -> None:
        """What is to be sent lies in the weights themselves: no step before engines have it, or do not want it."""
        while True:
            match self.orchestrator.next_of_weights():
                case SendWeights() as order if self._send(order):
                    return
                case StageFiles():
                    self._stage_files()
                    return
                case WeightsLoaded(version=loaded) as message if loaded >= version:
                    self.publisher.loaded(message.version)
                    return

    def _send(self, order: SendWeights) -> bool:
        """Whether it was. One that failed may be told again, to others."""
        if order.version != self.trainer.version:
            error = f"the trainer has version {self.trainer.version}"
            self.orchestrator.tell(WeightsSent(version=order.version, error=error))
            return False
        began, error = time.monotonic(), ""
        with self.ledger.spend("send"), self.spans.span("send", version=order.version):
            try:
                self.publisher.sender.send(
                    lambda what, info: self.orchestrator.tell(EnginesAsked(what=what, info=info)),
                    num_workers=order.num_workers,
                    is_new_group=order.is_new_group,
                    deadline_s=self.send_s,
                )
            except InfrastructureError as failure:
                error = str(failure)
        error = self.trainer.ranks.from_first(error)  # who sends knows; all go on alike
        self.orchestrator.tell(WeightsSent(version=order.version, send_s=time.monotonic() - began, error=error))
        return not error

    def _stage_files(self) -> None:
        with self.spans.span("stage", version=self.trainer.version):
            staged = self.publisher.stage(self.trainer.version, self.ledger, as_files=True)
        self.orchestrator.tell(WeightsStaged(staged=staged))


class Orchestrator:
    """The orchestrator as the trainer sees it: all ranks hear what it says, the first one answers.

    What was said last is kept, on every rank, for one that takes its place: `staged`, `saved`, and the latest steps, of
    which an orchestrator lets no more than two be trained before it has heard of them.
    """

    def __init__(self, config: RunConfig, attempt: Attempt, ranks: "Ranks", ledger: Ledger):
        self._ranks, self._ledger, self._deadline_s = ranks, ledger, config.train.batch_deadline_s
        self._healthy_s = config.engine.healthy_s
        self._set_aside: deque[Order | Woken] = deque()
        self.staged: Staged | None = None
        self.saved: TrainerSaved | None = None
        self._version: int | None = None  # until it is ready
        self._is_asking = False  # for its turn
        self._steps: deque[StepTrained] = deque(maxlen=2)
        self._caller: BlockingCaller[ToTrainer, FromTrainer] | None = None
        if ranks.is_first:
            self._caller = BlockingCaller(
                attempt.orchestrator, name="trainer", attempt=attempt.number, receives=ToTrainer, life=life()
            )

    def tell(self, message: FromTrainer) -> None:
        match message:
            case TrainerReady():
                self._version = message.version
            case StepTrained():
                self._version = message.step + 1
                self._steps.append(message)
            case WeightsStaged():
                self.staged = message.staged
            case TrainerSaved():
                self.saved = message
        if self._caller is not None:
            self._caller.send(message)

    def wake(self) -> None:
        """From another thread, of the first rank: all ranks hear `Woken` next."""
        if self._caller is not None:
            self._caller.wake()

    def next(self, version: int) -> Order | Woken:
        """Errors: DeadlineError."""
        if self._set_aside:
            return self._set_aside.popleft()
        with self._ledger.spend("wait_for_batch"):
            return self._receive(f"the batch of step {version} from the orchestrator (train.batch_deadline_s)")

    def next_loaded(self) -> WeightsLoaded:
        """Waits for the engines; everything else that is said meanwhile is heard later. Errors: DeadlineError."""
        return self._next_of(WeightsLoaded, "engines to load one of the staged versions (train.batch_deadline_s)")

    def next_of_weights(self) -> WeightsLoaded | SendWeights | StageFiles:
        """As `next_loaded`, of a version that engines are sent."""
        kinds = (WeightsLoaded, SendWeights, StageFiles)
        return self._next_of(kinds, "engines to be ready for a version (train.batch_deadline_s)")

    def _next_of(self, kinds: Any, waiting_for: str) -> Any:
        for known in self._set_aside:
            if isinstance(known, kinds):
                self._set_aside.remove(known)
                return known
        with self._ledger.spend("wait_for_load"):
            while not isinstance(message := self._receive(waiting_for), kinds):
                self._set_aside.append(message)
        return message

    def take_turn(self) -> None:
        """Waits until nobody else uses the device; all else that is said is heard later. Errors: DeadlineError."""
        self._is_asking = True
        self.tell(TurnAsked())
        waiting_for = (
            "its turn on the device: the engine to sleep, or to end (engine.healthy_s, train.batch_deadline_s)"
        )
        with self._ledger.spend("wait_for_turn"):
            while not isinstance(message := self._hear_any(waiting_for), TurnGiven):
                self._set_aside.append(message)
        self._is_asking = False

    def give_turn(self) -> None:
        self.tell(TurnOver())

    def _receive(self, waiting_for: str) -> Order | Woken:
        """A turn that was not asked for is of an orchestrator that is gone, and given back."""
        while isinstance(message := self._hear_any(waiting_for), TurnGiven):
            self.give_turn()
        return message

    def _hear_any(self, waiting_for: str) -> Order | Woken | TurnGiven:
        """All ranks hear everything, so that all of their deadlines begin anew with it."""
        while True:
            message = None if self._caller is None else self._hear(self._caller, waiting_for)
            message = self._ranks.from_first(message)
            assert message is not None
            if not isinstance(message, StillEvaluating | Reconnected):
                return message

    def _hear(
        self, caller: BlockingCaller[ToTrainer, FromTrainer], waiting_for: str
    ) -> ToTrainer | Woken | Reconnected:
        """A successor of the orchestrator is told at once what it may have missed."""
        deadline_s = self._deadline_s + (self._healthy_s if self._is_asking else 0)  # an engine may be starting
        message = caller.receive(deadline_s=deadline_s, waiting_for=waiting_for)
        if isinstance(message, Reconnected):
            if self._version is not None:
                steps = list(self._steps)
                caller.send(TrainerReady(version=self._version, staged=self.staged, saved=self.saved, steps=steps))
            if self._is_asking:
                caller.send(TurnAsked())
        return message
