"""The loop: puts its parts together and listens.

    TaskSources --task--> Dispatcher --Play--> workers --Call--> gateway --> engines
                              ^                   |                            ^
                    free slot |             Ended v                            | publish
                              +------- state (journal) ---take---> ship --> trainer

Consumes: messages of workers and trainer. Produces: a finished run. Waits for: as its parts say.
Ends when: `train.steps` steps are trained and published, the final evaluation is done and the weights are exported.
"""

import asyncio
from collections.abc import Callable

from palestra.config.schema import RunConfig
from palestra.core.deadline import within
from palestra.core.ledger import Ledger, LedgerSelector
from palestra.core.metrics import Last, Metrics, Sum
from palestra.orchestrate.checkpoint import write_checkpoint
from palestra.orchestrate.desk import Changes, Desk, Teller
from palestra.orchestrate.dispatch import Dispatcher
from palestra.orchestrate.fleet import EngineLink, EngineState, Fleet
from palestra.orchestrate.gateway import Gateway
from palestra.orchestrate.journal import Journal
from palestra.orchestrate.measure import Evaluations
from palestra.orchestrate.pressure import Pressure
from palestra.orchestrate.publisher import Publisher
from palestra.orchestrate.report import summary
from palestra.orchestrate.ship import ship_all
from palestra.orchestrate.trainer import Schedule, TrainerLink
from palestra.orchestrate.workers import WorkerPool
from palestra.wire.channel import Listener
from palestra.wire.messages import (
    Done,
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
    WarmedUp,
    WeightsStaged,
)
from palestra.wire.policy import EngineClient
from palestra.wire.rundir import Attempt, RunDir

TRAINER = "trainer"
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
        make_client: Callable[[str], EngineClient] = EngineClient,
    ):
        self._listener: Listener[_FromAll, ToWorker | ToTrainer] = Listener(
            attempt.orchestrator, attempt=attempt.number, receives=_FromAll
        )
        tasks, changed = asyncio.TaskGroup(), Changes(config.train.batch_deadline_s)
        fleet = Fleet(
            _make_links(attempt, make_client, config.engine.max_in_flight),
            healthy_s=config.engine.healthy_s,
            restart=lambda name, why: self._ask_restart(name, why),
            changed=changed.tell,
        )
        schedule = Schedule(config.train.steps, config.sync.every, config.train.checkpoint_every)
        self.desk = Desk(
            config=config,
            run=run,
            attempt=attempt,
            journal=journal,
            fleet=fleet,
            gateway=Gateway(
                fleet,
                join_max_tokens=config.engine.join_max_tokens,
                call_s=config.engine.call_s,
                stream_tokens=config.engine.stream_tokens,
            ),
            pool=WorkerPool(
                self._listener.send, tasks.create_task, num_workers=config.env.workers, stall_s=config.env.stall_s
            ),
            trainer=TrainerLink(self._send_trainer, schedule, next_step=journal.state.next_step),
            teller=Teller(run, attempt, selector),
            changed=changed,
            tasks=tasks,
        )
        self._evaluations = Evaluations(self.desk)
        self._publisher = Publisher(self.desk, self._evaluations)
        self._dispatcher = Dispatcher(self.desk)
        self._pressure = Pressure(self.desk)
        self._exported = asyncio.Event()
        self._gone: set[str] = set()  # workers that said their last word

    async def run(self) -> None:
        """Errors: an ExceptionGroup of whatever ended the attempt."""
        try:
            async with self.desk.tasks as tasks:
                loops = (self._receive, self._hear_supervisor, self._publisher.run, self._pressure.run)
                serving = [tasks.create_task(serve()) for serve in loops]
                await self._train(tasks)
                await self._evaluations.run_last()
                await self._finish()
                for task in serving:
                    task.cancel()
        finally:
            await self.desk.gateway.close()
            for owned in (self._listener, self.desk.journal, self.desk.teller):
                owned.close()

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        self.desk.teller.ledger.switch("work")
        await self._start()
        dispatching = tasks.create_task(self._dispatcher.run())
        await ship_all(self.desk)
        while self.desk.trainer.loaded < self.desk.config.train.steps:
            await self.desk.changed.wait("the last version in the engines")
        dispatching.cancel()
        self._dispatcher.cancel()

    async def _start(self) -> None:
        """Workers and engines; the trainer says by itself when it is ready."""
        desk, healthy_s = self.desk, self.desk.config.engine.healthy_s
        await desk.progress("starting engines and environment workers")
        await desk.pool.wait_ready(healthy_s)
        async with asyncio.TaskGroup() as joining:
            for link in desk.fleet.links:
                joining.create_task(self._join(link))

    async def _join(self, link: EngineLink) -> None:
        """Errors: DeadlineError, if the engine does not become healthy."""
        await link.client.wait_healthy(self.desk.config.engine.healthy_s)
        await self._pressure.meet(link)
        if link.state is EngineState.STARTING:
            self.desk.fleet.healthy(link)

    async def _finish(self) -> None:
        """Everything is trained: export, collect the ledgers, write the summary."""
        desk, teller = self.desk, self.desk.teller
        await desk.trainer.finish()
        deadline_s = desk.config.train.batch_deadline_s
        await within(deadline_s, self._exported.wait(), waiting_for="the trainer's export")
        for worker in desk.pool.names:
            await self._listener.send(worker, Stop())
        while self._gone != set(desk.pool.names):
            await desk.changed.wait("the last ledger entry of every environment worker")
        teller.note_ledger(*(link.ledger.close() for link in desk.fleet.links), teller.ledger.close())
        first = desk.config.eval.sets[0].label if desk.config.eval.sets else None
        teller.log.summary(
            summary(teller.totals, desk.state, name=desk.run.name, first_eval=first, attempt=desk.attempt.number)
        )
        await teller.send(Done(process="orchestrator"))

    async def _hear_supervisor(self) -> None:
        """Engines that died, and their successors."""
        names = {link.name for link in self.desk.fleet.links}
        while True:
            message = await self.desk.teller.hear()
            match message:
                case ProcessEnded(process=process) if process in names:
                    self.desk.fleet.engine_ended(process)
                case ProcessStarted(process=process) if process in names:
                    self.desk.tasks.create_task(self._join(self.desk.fleet.engine_started(process)))

    def _ask_restart(self, process: str, why: str) -> None:
        self.desk.tasks.create_task(self.desk.teller.send(Restart(process=process, why=why)))

    async def _receive(self) -> None:
        while True:
            peer, message = await self._listener.receive()
            match message:
                case LedgerClosed():
                    self.desk.teller.note_ledger(message.entry)
                    self._gone |= {peer} if message.is_last else set()
                    self.desk.changed.tell()
                case TrainerReady() | WarmedUp() | StepTrained() | WeightsStaged() | TrainerSaved() | Exported():
                    await self._from_trainer(message)
                case _:
                    self.desk.pool.handle(peer, message)

    async def _from_trainer(self, message: FromTrainer) -> None:
        desk, teller = self.desk, self.desk.teller
        match message:
            case TrainerReady():
                await desk.trainer.ready(message.version)
            case WarmedUp():
                teller.log.metrics(message.step, message.metrics, phase="warmup")
                await teller.progress("supervised warm-up", message.step + 1, desk.config.data.warmup.steps)
            case StepTrained():
                await self._step_trained(message)
            case WeightsStaged():
                self._publisher.stage(message.staged)
            case TrainerSaved():
                with teller.ledger.spend("checkpoint"), teller.spans.span("checkpoint", version=message.version):
                    write_checkpoint(desk.run, desk.journal, message, desk.attempt.number, desk.config)
            case Exported():
                teller.note_ledger(*message.ledgers)
                self._exported.set()
        desk.changed.tell()

    async def _step_trained(self, message: StepTrained) -> None:
        desk, teller = self.desk, self.desk.teller
        desk.trainer.trained = message.step + 1
        teller.totals.note_step(message.ledgers[0])
        teller.note_ledger(*message.ledgers, *(link.ledger.close() for link in desk.fleet.links), teller.ledger.close())
        in_flight: Metrics = {
            "engine/in_flight": Last(sum(link.in_flight for link in desk.fleet.links)),
            "engine/serving": Last(len(desk.fleet.serving)),
            "engine/limit": Last(desk.capacity),
            "engine/preemptions": Sum(0),
            "rollout/in_flight": Last(sum(link.sessions for link in desk.fleet.links)),
        }
        batch = desk.state.batch_metrics.get(message.step, {})
        row = teller.step_row(message, batch, teller.totals.metrics(desk.state), in_flight)
        shown = {name: row[key].value for name, key in _SHOWN.items() if key in row}
        totals = {"tokens_per_s": teller.totals.tokens_per_s, "trainer_idle": teller.totals.trainer_idle}
        await teller.progress("training", message.step + 1, desk.config.train.steps, **shown, **totals)

    async def _send_trainer(self, message: ToTrainer) -> None:
        await self._listener.send(TRAINER, message)


_SHOWN = {"reward": "reward/trained", "age": "age/mean", "in_flight": "rollout/in_flight", "limit": "engine/limit"}


def _make_links(attempt: Attempt, make_client: Callable[[str], EngineClient], limit: int) -> list[EngineLink]:
    names = [f"engine-{index}" for index in range(len(attempt.engines))]
    return [
        EngineLink(name, make_client(url), Ledger(name, since=attempt.started_at), limit=limit)
        for name, url in zip(names, attempt.engines, strict=True)
    ]
