"""What the parts of the loop share: the journalled state, the peers, and what is told to people.

`changed` is told whenever the state may allow something new; whoever waits looks at the state again.
"""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from palestra.config.schema import RunConfig
from palestra.core.deadline import within
from palestra.core.ledger import Ledger, LedgerEntry, LedgerSelector
from palestra.core.metrics import Last, Max, Mean, Metric, Metrics, add_to, merge, percentile, values
from palestra.core.process import life
from palestra.core.records import RolloutRecord, Sampling
from palestra.core.spans import SpanLog
from palestra.orchestrate.endpoints import SeatEndpoints
from palestra.orchestrate.fleet import Fleet
from palestra.orchestrate.frozen import FrozenModels
from palestra.orchestrate.gateway import Gateway
from palestra.orchestrate.health import Health
from palestra.orchestrate.journal import Journal
from palestra.orchestrate.report import Totals
from palestra.orchestrate.state import LoopState
from palestra.orchestrate.trainer import TrainerLink
from palestra.orchestrate.turns import Turns
from palestra.orchestrate.workers import WorkerPool
from palestra.wire.channel import Caller, Reconnected
from palestra.wire.messages import Notice, Progress, StepTrained, ToOrchestrator, ToSupervisor
from palestra.wire.rundir import Attempt, RunDir
from palestra.wire.runlog import WARNING, RunLog

_SILENCE_S = 30 * 86_400.0  # longer than any run: a supervisor that dies takes the run with it


class Changes:
    """Wakes whoever waits for the state to allow something."""

    def __init__(self, deadline_s: float):
        self._deadline_s, self._event = deadline_s, asyncio.Event()

    def tell(self) -> None:
        self._event.set()

    async def wait(self, waiting_for: str) -> None:
        """Errors: DeadlineError."""
        await within(self._deadline_s, self._event.wait(), waiting_for=waiting_for)
        self._event.clear()


class Teller:
    """metrics.jsonl, ledger.jsonl, spans, and the lines of the live view."""

    def __init__(self, run: RunDir, attempt: Attempt, selector: LedgerSelector):
        self._run, self._selector = run, selector
        self._supervisor: Caller[ToOrchestrator, ToSupervisor] = Caller(
            attempt.supervisor, name="orchestrator", attempt=attempt.number, receives=ToOrchestrator, life=life()
        )
        self.log, self.spans = RunLog(run), SpanLog(run.spans("orchestrator"), "orchestrator")
        self.totals = Totals(started_at=attempt.started_at)
        self._since_step: Metrics = {}
        self._health = Health()

    def close(self) -> None:
        for owned in (self._supervisor, self.log, self.spans):
            owned.close()

    @property
    def ledger(self) -> Ledger:
        return self._selector.ledger

    def note(self, metrics: dict[str, Metric]) -> None:
        """Metrics of whatever happens between two steps."""
        add_to(self._since_step, metrics)

    def note_predicted_age(self, age: float) -> None:
        """Of one rollout at its dispatch."""
        self.note({"age/predicted": Mean(age)})
        self.totals.predicted_age += Mean(age)

    def note_ledger(self, *entries: LedgerEntry) -> None:
        for entry in entries:
            self.totals.note_ledger(entry)
            self.log.ledger(entry)

    def step_row(self, message: StepTrained, *others: Metrics) -> Metrics:
        """Write the row of one step: the trainer's metrics, the others', and everything since the step before."""
        lag_s = self._selector.take_lag()
        loop: Metrics = {
            "orchestrator/loop_lag_p99_ms": Last(1000 * percentile(lag_s, 0.99)),
            "orchestrator/loop_lag_max_ms": Max(1000 * max(lag_s, default=0.0)),
        }
        row = merge([message.metrics, self._since_step, loop, *others])
        self._since_step = {}
        self.log.metrics(message.step, row)
        return row

    async def watch(self, step: int, row: Metrics) -> None:
        """Say what the row of a step gives reason to warn of, and keep it in the log."""
        for warning in self._health.note(step, values(row)):
            self.log.metrics(step, {}, phase=WARNING, rule=warning.rule, text=warning.text)
            await self.send(Notice(process="orchestrator", text=f"warning at step {step}: {warning.text}"))

    def write_rollouts(self, name: str, records: list[RolloutRecord]) -> Path:
        """Finished rollouts, a JSON line each; their routes are in the batches alone."""
        self._run.rollouts.mkdir(parents=True, exist_ok=True)
        path = self._run.rollouts / f"{re.sub('[^A-Za-z0-9._-]+', '_', name)}.jsonl"
        path.write_bytes(b"".join(msgspec.json.encode(record.unrouted()) + b"\n" for record in records))
        return path

    async def send(self, message: ToSupervisor) -> None:
        await self._supervisor.send(message)

    async def hear(self) -> ToOrchestrator:
        """What the supervisor says next: most runs never hear anything."""
        while True:
            message = await self._supervisor.receive(deadline_s=_SILENCE_S, waiting_for="the supervisor's next word")
            if not isinstance(message, Reconnected):
                return message

    async def progress(self, stage: str, step: int, steps: int, **numbers: float) -> None:
        await self.send(Progress(process="orchestrator", stage=stage, step=step, steps=steps, numbers=numbers))


@dataclass(frozen=True)
class Desk:
    """One attempt's parts, made once and handed to whoever does the work."""

    config: RunConfig
    run: RunDir
    attempt: Attempt
    journal: Journal
    fleet: Fleet
    gateway: Gateway
    pool: WorkerPool
    trainer: TrainerLink
    turns: Turns
    teller: Teller
    frozen: FrozenModels
    seats: SeatEndpoints
    changed: Changes
    tasks: asyncio.TaskGroup

    @property
    def state(self) -> LoopState:
        return self.journal.state

    def close_ledgers(self) -> list[LedgerEntry]:
        """Of the engines and of the orchestrator, up to now."""
        engines = [link.ledger.close() for link in self.fleet.links]
        return [*engines, *self.frozen.close_ledgers(), self.teller.ledger.close()]

    def sampling_of(self, source: str) -> Sampling:
        """Of an entry of env.mix; of evaluations, where they do not say otherwise."""
        sampling = self.config.sampling_of(source)
        return Sampling(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            routes_from=0 if self.config.replays_routers else None,
        )

    @property
    def capacity(self) -> int:
        """Rollouts that may be in flight at once."""
        return sum(link.limit for link in self.fleet.serving)

    async def progress(self, stage: str, **numbers: float) -> None:
        await self.teller.progress(stage, self.state.next_step, self.config.train.steps, **numbers)
