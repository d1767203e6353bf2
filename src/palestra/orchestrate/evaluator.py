"""`palestra eval`: environments played and scored, and nothing trained.

Consumes: messages of the workers; what the supervisor says of processes. Produces: results.jsonl, summary.json.
Waits for: workers and engines to be there, and for every rollout, each with a deadline on lack of progress.
Woken by: messages. Ends when: every set is measured. Started again, it goes on behind what results.jsonl has.
"""

import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from palestra.algo.scores import scores
from palestra.config.schema import EvalSet, RunConfig
from palestra.core.clock import unix_now
from palestra.core.deadline import within
from palestra.core.errors import InfrastructureError
from palestra.core.ledger import LedgerSelector
from palestra.core.records import ChatReply, Ending, Reply, RolloutRecord, Sampling, Task
from palestra.orchestrate.answers import Answers, EndpointAnswers, EngineAnswers
from palestra.orchestrate.endpoints import SeatEndpoints
from palestra.orchestrate.evaluate import EvalResult, Means, evaluate
from palestra.orchestrate.quarantine import Quarantine
from palestra.orchestrate.state import TaskQuarantined
from palestra.orchestrate.workers import Deadlines, PlayOrder, WorkerPool
from palestra.wire.channel import Caller, Listener
from palestra.wire.messages import (
    Call,
    Done,
    FromWorker,
    LedgerClosed,
    ProcessEnded,
    ProcessStarted,
    Progress,
    Restart,
    Stop,
    ToOrchestrator,
    ToSupervisor,
    ToWorker,
)
from palestra.wire.results import ResultsFile, read_results
from palestra.wire.rundir import Attempt, RunDir
from palestra.wire.runlog import RunLog, as_rows, read_restarts

NAME = "orchestrator"
_SILENCE_S = 30 * 86_400.0  # longer than any evaluation
_LAST_ENTRIES_S = 30.0


@dataclass
class _Tally:
    """Rollouts that ended, those that have a reward, and the sum of these."""

    num_rollouts: int = 0
    num_valid: int = 0
    reward: float = 0.0

    def note(self, records: Iterable[RolloutRecord]) -> None:
        for record in records:
            self.num_rollouts += 1
            self.num_valid += record.ending != Ending.INVALID
            self.reward += record.reward


class Evaluator:
    """One attempt of an evaluation."""

    def __init__(self, config: RunConfig, run: RunDir, attempt: Attempt, selector: LedgerSelector, *, life: int = 0):
        self._config, self._run, self._attempt, self._ledger = config, run, attempt, selector.ledger
        self._listener: Listener[FromWorker, ToWorker] = Listener(
            attempt.orchestrator, attempt=attempt.number, receives=FromWorker, life=life
        )
        self._supervisor: Caller[ToOrchestrator, ToSupervisor] = Caller(
            attempt.supervisor, name=NAME, attempt=attempt.number, receives=ToOrchestrator, life=life
        )
        self._tasks = asyncio.TaskGroup()
        env = config.env
        self._pool = WorkerPool(
            self._send,
            self._tasks.create_task,
            num_workers=config.num_workers,
            deadlines=Deadlines(ready_s=config.engine.healthy_s, stall_s=env.stall_s, answer_s=env.answer_s),
            quarantine=Quarantine({}, self._note_quarantine),
            restart=self._ask_restart,
            life=life,
            max_bytes=env.max_worker_bytes,
        )
        self._answers, self._seats = self._make_answers(), SeatEndpoints(config)
        self._known = read_results(run)
        self._results, self._log = ResultsFile(run), RunLog(run)
        self._gone: set[str] = set()  # workers that said their last word
        self._lives: dict[str, int] = {}  # of the processes that had more than one
        self._one_gone = asyncio.Event()
        self._tally = _Tally()  # of the set that is measured
        self._cpu_before_s = 0.0

    def _make_answers(self) -> Answers:
        endpoint = self._config.eval.endpoint
        if endpoint is not None:
            return EndpointAnswers(endpoint, self._config.model_dir)
        return EngineAnswers(self._config, self._attempt, self._ask_restart, self._tasks.create_task)

    async def run(self) -> None:
        """Errors: an ExceptionGroup of whatever ended the attempt."""
        try:
            async with self._tasks as tasks:
                serving = [tasks.create_task(self._receive()), tasks.create_task(self._hear_supervisor())]
                self._ledger.switch("work")
                await self._tell("starting environment workers", 0, 0)
                await self._pool.wait_ready()
                await self._answers.start()
                self._cpu_before_s = time.process_time()
                results = [await self._measure(entry) for entry in self._config.eval.sets]
                await self._finish(results)
                for task in (*serving, *self._answers.joining):
                    task.cancel()
        finally:
            await self._answers.close()
            await self._seats.close()
            for owned in (self._listener, self._supervisor, self._results, self._log):
                owned.close()

    async def _measure(self, entry: EvalSet) -> EvalResult:
        total = entry.num_tasks * entry.rollouts_per_task
        known = {number: r for number, r in self._known.get(entry.label, {}).items() if r.ending != Ending.INVALID}
        self._tally = _Tally()
        self._tally.note(known.values())
        await self._tell_set(entry, total)

        def ended(records: Sequence[RolloutRecord]) -> None:
            self._results.append(records)
            self._tally.note(records)
            self._tasks.create_task(self._tell_set(entry, total))

        means = Means(
            list_tasks=self._pool.list_tasks,
            play=self._play,
            score_group=self._pool.score_group,
            max_in_flight=self._answers.max_in_flight,
            retries=self._config.env.retries,
            ended=ended,
        )
        return await evaluate(entry, means, default=self._sampling, seed=self._config.train.seed, known=known)

    @property
    def _sampling(self) -> Sampling:
        return Sampling(temperature=self._config.sampling.temperature, max_tokens=self._config.sampling.max_tokens)

    async def _play(self, source: str, task: Task, sampling: Sampling, seed: int) -> RolloutRecord:
        session = -1 - seed

        async def answer(call: Call) -> Reply | ChatReply:
            if call.seat:
                return await self._seats.ask(source, call, seed=seed + call.call)
            return await self._answers.answer(session, call, seed=seed + call.call)

        order = PlayOrder(rollout_id=0, source=source, task=task, sampling=sampling, seed=seed, answer=answer)
        try:
            return await self._pool.play(order)
        finally:
            self._answers.release(session)

    async def _finish(self, results: Sequence[EvalResult]) -> None:
        stopped = set(self._pool.names)
        for worker in stopped:
            await self._send(worker, Stop())
        while not self._gone >= stopped:
            await within(_LAST_ENTRIES_S, self._one_gone.wait(), waiting_for="the last ledger entry of every worker")
            self._one_gone.clear()
        for entry in (*self._answers.close_ledgers(), self._ledger.close()):
            self._log.ledger(entry)
        self._log.summary(self._summary(results))
        await self._supervisor.send(Done(process=NAME))

    def _summary(self, results: Sequence[EvalResult]) -> dict[str, Any]:
        endpoint = self._config.eval.endpoint
        return {
            "name": self._run.name,
            "model": self._config.model_dir,
            "endpoint": endpoint and endpoint.url,
            "sets": {result.name: scores(result.records) for result in results},
            "wall_s": unix_now() - self._attempt.started_at,
            "cpu_s": time.process_time() - self._cpu_before_s,  # since everything was ready
            "attempts": self._attempt.number,
            "restarts": as_rows(read_restarts(self._run)),
        }

    # --- others

    async def _receive(self) -> None:
        while True:
            peer, message = await self._listener.receive()
            if isinstance(message, LedgerClosed):
                self._log.ledger(message.entry)
                self._pool.watch_memory(peer, message)
                self._gone |= {peer} if message.is_last else set()
                self._one_gone.set()
            else:
                self._pool.handle(peer, message)

    async def _hear_supervisor(self) -> None:
        while True:
            message = await self._supervisor.receive(deadline_s=_SILENCE_S, waiting_for="the supervisor's next word")
            match message:
                case ProcessEnded(process=process):
                    print(f"{process} died: {message.why}", file=sys.stderr)
                    if not self._answers.ended(process):
                        self._pool.worker_ended(process, message.why, message.life)
                        self._gone.add(process)
                        self._one_gone.set()
                case ProcessStarted(process=process) if message.life > self._lives.get(process, 0):
                    self._lives[process] = message.life
                    self._gone.discard(process)
                    self._answers.started(process)

    async def _tell_set(self, entry: EvalSet, total: int) -> None:
        tally = self._tally
        reward = {"reward": tally.reward / tally.num_valid} if tally.num_valid else {}
        await self._tell(f"evaluating {entry.label}", tally.num_rollouts, total, **reward)

    async def _tell(self, stage: str, done: int, total: int, **numbers: float) -> None:
        await self._supervisor.send(Progress(process=NAME, stage=stage, step=done, steps=total, numbers=numbers))

    def _ask_restart(self, process: str, why: str, *, is_planned: bool = False) -> None:
        print(f"{process} is given up: {why}", file=sys.stderr)
        life = self._lives.get(process, 0)
        message = Restart(process=process, why=why, life=life, is_planned=is_planned)
        self._tasks.create_task(self._supervisor.send(message))

    def _note_quarantine(self, event: TaskQuarantined) -> None:
        print(f"task {event.task} is quarantined: {event.reason}", file=sys.stderr)

    async def _send(self, peer: str, message: ToWorker) -> None:
        """What is said to a process that just died is said to its successor."""
        try:
            await self._listener.send(peer, message)
        except InfrastructureError as error:
            print(f"{type(message).__name__} was not sent: {error}", file=sys.stderr)
