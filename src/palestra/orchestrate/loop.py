"""The loop: puts its parts together and listens.

    TaskSources --task--> Dispatcher --Play--> workers --Call--> gateway --> engines
                              ^                   |                            ^
                    free slot |             Ended v                            | publish
                              +------- state (journal) ---take---> ship --> trainer

Consumes: messages of workers and trainer. Produces: a finished run. Waits for: as its parts say.
Ends when: `train.steps` steps are trained and published, the final evaluation is done and the weights are exported.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from palestra.config.schema import RunConfig
from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError
from palestra.core.ledger import Ledger, LedgerSelector
from palestra.core.metrics import Last, Metrics, Sum
from palestra.orchestrate.checkpoint import write_checkpoint
from palestra.orchestrate.desk import Changes, Desk, Teller
from palestra.orchestrate.dispatch import Dispatcher
from palestra.orchestrate.endpoints import SeatEndpoints
from palestra.orchestrate.fleet import EngineLink, EngineState, Fleet
from palestra.orchestrate.frozen import FrozenModels, make_frozen, require_same_tokens
from palestra.orchestrate.gateway import Gateway
from palestra.orchestrate.journal import Journal
from palestra.orchestrate.measure import Evaluations
from palestra.orchestrate.mend import mend_batches
from palestra.orchestrate.pressure import Pressure
from palestra.orchestrate.publisher import Publisher
from palestra.orchestrate.quarantine import Quarantine
from palestra.orchestrate.report import summary
from palestra.orchestrate.ship import ship_all
from palestra.orchestrate.state import TaskQuarantined
from palestra.orchestrate.trainer import Schedule, TrainerLink
from palestra.orchestrate.turns import TRAINER, Turns
from palestra.orchestrate.workers import Deadlines, WorkerPool
from palestra.wire.channel import Listener
from palestra.wire.messages import (
    Done,
    EnginesAsked,
    Exported,
    FromTrainer,
    FromWorker,
    LedgerClosed,
    ProcessEnded,
    ProcessStarted,
    Restart,
    StepTrained,
    Stop,
    ToTrainer,
    ToWorker,
    TrainerReady,
    TrainerSaved,
    TurnAsked,
    TurnOver,
    WarmedUp,
    WeightsSent,
    WeightsStaged,
)
from palestra.wire.policy import EngineClient
from palestra.wire.rundir import Attempt, RunDir, newest_checkpoint
from palestra.wire.runlog import as_rows, read_ledger, read_restarts, read_warnings

_FromAll = FromWorker | FromTrainer


class Loop:
    """One attempt of a run."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        attempt: Attempt,
        journal: Journal,
        selector: LedgerSelector,
        *,
        life: int = 0,
        make_client: Callable[[str], EngineClient] = EngineClient,
    ):
        """`life` counts the orchestrators of this attempt before this one: it goes on with what they left."""
        self._life = life
        self._listener: Listener[_FromAll, ToWorker | ToTrainer] = Listener(
            attempt.orchestrator, attempt=attempt.number, receives=_FromAll, life=life
        )
        tasks, changed = asyncio.TaskGroup(), Changes(config.train.batch_deadline_s)
        ledgers = _engine_ledgers(run, attempt, is_inherited=life > 0)
        fleet = Fleet(
            _make_links(attempt, config, make_client, ledgers, is_inherited=life > 0),
            healthy_s=config.engine_start_s,
            restart=self._ask_restart,
            changed=changed.tell,
        )
        schedule = Schedule(config.train.steps, config.sync.every, config.train.checkpoint_every)
        self.desk = Desk(
            config=config,
            run=run,
            attempt=attempt,
            journal=journal,
            fleet=fleet,
            gateway=Gateway.by(config.engine, fleet),
            pool=self._make_pool(config, journal, tasks),
            trainer=TrainerLink(
                lambda message: self._send(TRAINER, message),
                schedule,
                next_step=journal.state.next_step,
                published=journal.state.published,
                restages=config.sync.kind == "ipc",
            ),
            turns=self._make_turns(config, fleet),
            teller=Teller(run, attempt, selector),
            frozen=FrozenModels(
                make_frozen(config, attempt, make_client, ledgers),
                tasks.create_task,
                deadline_s=config.train.batch_deadline_s,
            ),
            seats=SeatEndpoints(config),
            changed=changed,
            tasks=tasks,
        )
        self._evaluations = Evaluations(self.desk)
        self._publisher = Publisher(self.desk, self._evaluations)
        self._dispatcher = Dispatcher(self.desk)
        self._pressure = Pressure(self.desk)
        self._exported = asyncio.Event()
        self._starting: set[asyncio.Task[None]] = set()  # engines that are waited for while the run goes on
        self._gone: set[str] = set()  # workers that said their last word, or died before it
        self._lives: dict[str, int] = {}  # of the processes that had more than one

    def _make_turns(self, config: RunConfig, fleet: Fleet) -> Turns:
        sharing = [TRAINER, *(link.name for link in fleet.links)] if config.takes_turns else []
        return Turns(sharing, self._send, is_inherited=self._life > 0)

    def _make_pool(self, config: RunConfig, journal: Journal, tasks: asyncio.TaskGroup) -> WorkerPool:
        env = config.env
        return WorkerPool(
            self._send,
            tasks.create_task,
            num_workers=config.num_workers,
            deadlines=Deadlines(ready_s=config.engine.healthy_s, stall_s=env.stall_s, answer_s=env.answer_s),
            quarantine=Quarantine(journal.state.quarantined, self._note_quarantine),
            restart=self._ask_restart,
            life=self._life,
            max_bytes=env.max_worker_bytes,
        )

    async def run(self) -> None:
        """Errors: an ExceptionGroup of whatever ended the attempt."""
        async with AsyncExitStack() as owned:  # one that fails to close keeps no other open
            for part in (self.desk.teller, self.desk.journal, self._listener):
                owned.callback(part.close)
            for client in (self.desk.seats, self.desk.frozen, self.desk.gateway):
                owned.push_async_callback(client.close)
            async with self.desk.tasks as tasks:
                loops = (self._receive, self._hear_supervisor, self._publisher.run, self._pressure.run)
                serving = [tasks.create_task(serve()) for serve in loops]
                await self._train(tasks)
                await self._evaluations.run_last()
                await self._finish()
                for task in (*serving, *self._starting):
                    task.cancel()

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        self.desk.teller.ledger.switch("work")
        await self._start()
        dispatching = tasks.create_task(self._dispatcher.run())
        await ship_all(self.desk)
        while self.desk.trainer.loaded < self.desk.config.train.steps:
            await self.desk.changed.wait("the last version in the engines")
        dispatching.cancel()
        self._dispatcher.cancel()
        self.desk.frozen.cancel()

    async def _start(self) -> None:
        """Workers and engines; the trainer says by itself when it is ready."""
        desk = self.desk
        if self._life:
            await desk.progress(f"going on from step {desk.state.next_step}, with the processes that are there")
            self._wait_beside(desk.frozen.start())
            for link in desk.fleet.links:
                self._wait_beside(self._rejoin(link))
            return
        await desk.progress("starting engines and environment workers")
        require_same_tokens(desk.config.model_dir, desk.config.algo.frozen)
        await desk.pool.wait_ready()
        await self._dispatcher.begin()
        async with asyncio.TaskGroup() as joining:
            joining.create_task(desk.frozen.start())
            for link in desk.fleet.links:
                joining.create_task(self._join(link))

    async def _join(self, link: EngineLink) -> None:
        """Errors: DeadlineError, if the engine does not become healthy."""
        await link.client.wait_healthy(self.desk.config.engine_start_s)
        if link.is_inherited and not await self._free(link):
            return
        await self._pressure.meet(link)
        if link.state is EngineState.STARTING:
            self.desk.fleet.healthy(link)
        if link.client.is_asleep:
            self.desk.fleet.sleeps(link)
            self.desk.turns.over(link.name)

    async def _free(self, link: EngineLink) -> bool:
        """Whether an engine that a dead orchestrator left, perhaps in the middle of a publish, can take another."""
        try:
            await link.client.pause(clear_cache=False)
            await link.client.abandon_update()
            if self.desk.config.takes_turns:  # it may be asleep, or between; the trainer may be at work
                await link.client.sleep(keeps_weights=self.desk.config.model.lora is not None)
        except InfrastructureError as failure:
            self._ask_restart(link.name, str(failure))
            return False
        return True

    def _wait_beside(self, start: Coroutine[Any, Any, None]) -> None:
        """The run goes on meanwhile, and may end before an engine has started."""
        self._starting.add(task := self.desk.tasks.create_task(start))
        task.add_done_callback(self._starting.discard)

    async def _rejoin(self, link: EngineLink) -> None:
        """An engine that was started again, and is the supervisor's affair until it is healthy."""
        try:
            await self._join(link)
        except DeadlineError as late:
            print(f"{link.name} has not come back yet: {late}", file=sys.stderr)

    async def _finish(self) -> None:
        """Everything is trained: export, collect the ledgers, write the summary."""
        desk, teller = self.desk, self.desk.teller
        await desk.trainer.finish()
        deadline_s = desk.config.train.batch_deadline_s
        await within(deadline_s, self._exported.wait(), waiting_for="the trainer's export")
        stopped = set(desk.pool.names)
        for worker in stopped:
            await self._send(worker, Stop())
        while not self._gone >= stopped:
            await desk.changed.wait("the last ledger entry of every environment worker")
        teller.note_ledger(*desk.close_ledgers())
        first = desk.config.eval.sets[0].label if desk.config.eval.sets else None
        told = summary(teller.totals, desk.state, name=desk.run.name, first_eval=first, attempt=desk.attempt.number)
        also = {"restarts": as_rows(read_restarts(desk.run)), "warnings": read_warnings(desk.run)}
        teller.log.summary(told | also)
        await teller.send(Done(process="orchestrator"))

    async def _hear_supervisor(self) -> None:
        """Processes that died, and their successors."""
        while True:
            match await self.desk.teller.hear():
                case ProcessEnded(process=process) as ended:
                    print(f"{process} died: {ended.why}", file=sys.stderr)
                    self._process_ended(ended)
                case ProcessStarted(process=process) as started if started.life > self._lives.get(process, 0):
                    self._lives[process] = started.life
                    self._gone.discard(process)
                    if self.desk.fleet.is_out(process):
                        self._wait_beside(self._rejoin(self.desk.fleet.engine_started(process)))

    def _process_ended(self, ended: ProcessEnded) -> None:
        self.desk.turns.over(ended.process)
        if ended.process in self._engine_names:
            self.desk.fleet.engine_ended(ended.process)
        elif ended.process == TRAINER:
            self.desk.trainer.gone()
            self._publisher.trainer_ended()
        else:
            self.desk.pool.worker_ended(ended.process, ended.why, ended.life)
            self._gone.add(ended.process)
        self.desk.changed.tell()

    @property
    def _engine_names(self) -> set[str]:
        return {link.name for link in self.desk.fleet.links}

    def _ask_restart(self, process: str, why: str, *, is_planned: bool = False) -> None:
        print(f"{process} is given up: {why}", file=sys.stderr)
        life = self._lives.get(process, 0)
        message = Restart(process=process, why=why, life=life, is_planned=is_planned)
        self.desk.tasks.create_task(self.desk.teller.send(message))

    def _note_quarantine(self, event: TaskQuarantined) -> None:
        self.desk.journal.record(event)
        print(f"task {event.task} is quarantined: {event.reason}", file=sys.stderr)

    async def _receive(self) -> None:
        while True:
            peer, message = await self._listener.receive()
            match message:
                case LedgerClosed():
                    self.desk.teller.note_ledger(message.entry)
                    self.desk.pool.watch_memory(peer, message)
                    self._gone |= {peer} if message.is_last else set()
                    self.desk.changed.tell()
                case TrainerReady() | WarmedUp() | StepTrained() | WeightsStaged() | TrainerSaved() | Exported():
                    await self._from_trainer(message)
                case EnginesAsked():
                    self._publisher.engines_asked(message)
                case WeightsSent():
                    self._publisher.sent(message)
                case TurnAsked():
                    self.desk.turns.asked(peer)
                    self.desk.changed.tell()
                case TurnOver():
                    self.desk.turns.over(peer)
                    self.desk.changed.tell()
                case _:
                    self.desk.pool.handle(peer, message)

    async def _from_trainer(self, message: FromTrainer) -> None:
        desk, teller = self.desk, self.desk.teller
        match message:
            case TrainerReady():
                await self._trainer_ready(message)
            case WarmedUp():
                teller.log.metrics(message.step, message.metrics, phase="warmup")
                await teller.progress("supervised warm-up", message.step + 1, desk.config.data.warmup.steps)
            case StepTrained():
                await self._step_trained(message)
            case WeightsStaged():
                self._publisher.stage(message.staged)
            case TrainerSaved():
                self._save(message)
            case Exported() if desk.trainer.is_finishing:
                teller.note_ledger(*message.ledgers)
                self._exported.set()
            case Exported():
                self._ask_restart(TRAINER, "it has ended as an orchestrator told it that is gone, and is needed again")
        desk.changed.tell()

    async def _trainer_ready(self, message: TrainerReady) -> None:
        """One that was there before this orchestrator tells again what nobody may have written down."""
        desk, staged = self.desk, message.staged
        desk.turns.over(TRAINER)  # one that has a turn is not ready
        booked = {entry.started_at for entry in read_ledger(desk.run)} if message.steps else set()
        for step in message.steps:
            if step.ledgers[0].started_at not in booked:
                await self._step_trained(step)
        newest = newest_checkpoint(desk.run)
        if message.saved is not None and (newest is None or newest.version < message.saved.version):
            self._save(message.saved)
        if staged is not None:
            self._publisher.stage(staged)
        await mend_batches(desk, range(message.version, desk.trainer.catch_up))
        await desk.trainer.ready(message.version, staged=None if staged is None else staged.version)

    def _save(self, message: TrainerSaved) -> None:
        desk, teller = self.desk, self.desk.teller
        with teller.ledger.spend("checkpoint"), teller.spans.span("checkpoint", version=message.version):
            write_checkpoint(desk.run, desk.journal, message, desk.attempt.number, desk.config)

    async def _step_trained(self, message: StepTrained) -> None:
        desk, teller = self.desk, self.desk.teller
        desk.trainer.note_trained(message.step)
        teller.totals.note_step(message.ledgers[0])
        teller.note_ledger(*message.ledgers, *desk.close_ledgers())
        in_flight: Metrics = {
            "engine/in_flight": Last(sum(link.in_flight for link in desk.fleet.links)),
            "engine/serving": Last(len(desk.fleet.serving)),
            "engine/limit": Last(desk.capacity),
            "engine/preemptions": Sum(0),
            "rollout/in_flight": Last(sum(link.sessions for link in desk.fleet.links)),
        }
        batch = desk.state.batch_metrics.get(message.step, {})
        row = teller.step_row(message, batch, teller.totals.metrics(desk.state), in_flight)
        await teller.watch(message.step, row)
        shown = {name: row[key].value for name, key in _SHOWN.items() if key in row}
        totals = {"tokens_per_s": teller.totals.tokens_per_s, "trainer_idle": teller.totals.trainer_idle}
        await teller.progress("training", message.step + 1, desk.config.train.steps, **shown, **totals)

    async def _send(self, peer: str, message: ToWorker | ToTrainer) -> None:
        """What is said to a process that just died is said to its successor, as soon as that is ready."""
        try:
            await self._listener.send(peer, message)
        except InfrastructureError as error:
            print(f"{type(message).__name__} was not sent: {error}", file=sys.stderr)


_SHOWN = {"reward": "reward/trained", "age": "age/mean", "in_flight": "rollout/in_flight", "limit": "engine/limit"}


def _engine_ledgers(run: RunDir, attempt: Attempt, *, is_inherited: bool) -> Callable[[str], Ledger]:
    """By an engine's name. Those of inherited engines go on where the dead orchestrator's end."""
    entries = read_ledger(run) if is_inherited else []

    def ledger(name: str) -> Ledger:
        since = max([attempt.started_at, *(e.started_at + e.wall_s for e in entries if e.process == name)])
        return Ledger(name, "lost" if is_inherited else "start", since=since)

    return ledger


def _make_links(
    attempt: Attempt,
    config: RunConfig,
    make_client: Callable[[str], EngineClient],
    ledger: Callable[[str], Ledger],
    *,
    is_inherited: bool,
) -> list[EngineLink]:
    limit = config.engine.max_in_flight
    policy = attempt.engines[: len(attempt.engines) - len(config.algo.frozen)]  # those of frozen models come behind
    return [
        EngineLink(name, make_client(url), ledger(name), limit=limit, is_inherited=is_inherited)
        for name, url in ((f"engine-{index}", url) for index, url in enumerate(policy))
    ]
