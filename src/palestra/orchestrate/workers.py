"""The environment workers as the orchestrator sees them: play a rollout, list tasks, score a group.

Consumes: messages of the workers, what the supervisor says of their processes. Produces: finished rollouts, answered
engine calls; word of workers that must be started again. Waits for: workers, with a deadline on lack of progress.
Woken by: `handle`, `worker_ended`. Ends when: the loop does.

A worker that dies takes nothing with it: its rollouts are played again elsewhere, from their journalled replies, and
what else it was asked is asked again.
"""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError, PalestraError, UserError
from palestra.core.records import ChatReply, Ending, Reply, RolloutRecord, Sampling, Task
from palestra.orchestrate.quarantine import Quarantine, name_of
from palestra.wire.chat import TooLongError
from palestra.wire.messages import (
    Call,
    CallReply,
    Cancel,
    Cancelled,
    Ended,
    FromWorker,
    GroupScored,
    LedgerClosed,
    ListTasks,
    Play,
    ScoreGroup,
    Tasks,
    ToWorker,
    WorkerReady,
)

Send = Callable[[str, ToWorker], Coroutine[Any, Any, None]]
Answer = Callable[[Call], Awaitable[Reply | ChatReply]]
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class AskRestart(Protocol):
    """Of the supervisor. `is_planned`: what is started again did its work."""

    def __call__(self, process: str, why: str, /, *, is_planned: bool = False) -> None: ...


_LIFE_NUMBERS = 1 << 40  # of rollouts and questions in one life of the orchestrator


@dataclass(frozen=True, kw_only=True)
class PlayOrder:
    """One rollout to be played: `answer` gives the replies to its engine calls."""

    rollout_id: int
    source: str
    task: Task
    sampling: Sampling
    seed: int
    answer: Answer

    @property
    def name(self) -> str:
        return name_of(self.source, self.task)


@dataclass
class _Playing:
    worker: str
    order: PlayOrder
    ended: asyncio.Future[RolloutRecord | None]  # None: the worker died
    stall: asyncio.TimerHandle
    answers: set[asyncio.Task[None]] = field(default_factory=set)  # engine calls on their way: no stall meanwhile
    has_stalled: bool = False  # it is cancelled; whether that is its own fault shows when the worker answers


@dataclass
class _Asked:
    """A question. `task` is what its answer runs the code of, "" where it is no single one's."""

    worker: str
    task: str
    answer: asyncio.Future[FromWorker | None]  # None: the worker died


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """`ready_s`: until workers are there. `stall_s`: of a rollout without progress. `answer_s`: of a cancelled one."""

    ready_s: float
    stall_s: float
    answer_s: float


class WorkerPool:
    """Deals work to the workers. A rollout is known to its worker by a number of its own, so that nothing late from a
    cancelled try is taken for its successor's, nor from a time before this orchestrator's."""

    def __init__(
        self,
        send: Send,
        spawn: Spawn,
        *,
        num_workers: int,
        deadlines: Deadlines,
        quarantine: Quarantine,
        restart: AskRestart,
        life: int,
        max_bytes: float = math.inf,
    ):
        """`spawn` starts a task whose error ends the loop.

        A worker that holds more than `max_bytes` is started again.
        """
        self._max_bytes = max_bytes
        self._send, self._spawn, self._deadlines, self._restart = send, spawn, deadlines, restart
        self.quarantine = quarantine
        self._running: dict[str, int] = {}  # rollouts of each worker that is there
        self._lives: dict[str, int] = {}  # the newest of each worker
        self._sources: dict[str, frozenset[str]] = {}  # that each worker plays
        self._fruitful: set[str] = set()  # workers that ended a rollout in this life
        self._num_workers = num_workers
        self._all_ready, self._one_ready = asyncio.Event(), asyncio.Event()
        self._playing: dict[int, _Playing] = {}
        self._asked: dict[int, _Asked] = {}
        self._cancelled: dict[int, tuple[str, asyncio.TimerHandle]] = {}  # whose worker has not answered yet
        self._numbers = itertools.count(life * _LIFE_NUMBERS)
        self._alone = asyncio.Lock()  # for suspects

    @property
    def names(self) -> list[str]:
        return sorted(self._running)

    @property
    def num_playing(self) -> int:
        return len(self._playing)

    async def wait_ready(self) -> None:
        await within(
            self._deadlines.ready_s,
            self._all_ready.wait(),
            waiting_for=f"{self._num_workers} environment workers",
            hint="see logs/env-*.log",
        )

    # --- workers come and go

    def handle(self, peer: str, message: FromWorker) -> None:
        match message:
            case WorkerReady():
                self._worker_ready(peer, message.life, message.sources)
            case Call() if message.rollout_id in self._playing:
                self._start_answer(self._playing[message.rollout_id], message)
            case Ended() if message.record.rollout_id in self._playing:
                self._finish(message.record.rollout_id, message.record)
            case Cancelled():
                self._stopped(message.rollout_id)
            case Tasks() | GroupScored() if asked := self._asked.pop(message.request_id, None):
                _settle(asked.answer, message)

    def _worker_ready(self, worker: str, life: int, sources: Sequence[str]) -> None:
        """It has nothing to do: what it was asked before is gone."""
        self._lose(worker)
        self._fruitful.discard(worker)
        self._running[worker], self._lives[worker], self._sources[worker] = 0, life, frozenset(sources)
        self._one_ready.set()
        if len(self._running) == self._num_workers:
            self._all_ready.set()

    def worker_ended(self, worker: str, why: str, life: int) -> None:
        """Its process is gone. If a task did it, that task is not played again."""
        if worker not in self._running or life < self._lives[worker]:
            return  # known, and a successor may be at work already
        guilty = self.quarantine.worker_died(self._at_work(worker), why)
        self._lose(worker)
        for number, playing in list(self._playing.items()):
            if playing.order.name == guilty:
                self._spawn(self._cancel(playing.worker, number))
                self._lost(number)

    def watch_memory(self, worker: str, said: LedgerClosed) -> None:
        """Environments leak: one that holds too much takes nothing with it but its process. One that holds too much
        before it has ended a rollout would never end any."""
        if said.resident_bytes > self._max_bytes and worker in self._running and not said.is_last:
            held, most = said.resident_bytes / 2**30, self._max_bytes / 2**30
            why = f"it holds {held:.1f} GiB of memory, more than env.max_worker_gib={most:g}"
            self._restart(worker, why, is_planned=worker in self._fruitful)
            self._lose(worker)

    def _at_work(self, worker: str) -> set[str]:
        """Tasks whose code it ran: not those that waited for an engine."""
        rollouts = {p.order.name for p in self._playing.values() if p.worker == worker and not p.answers}
        return rollouts | {asked.task for asked in self._asked.values() if asked.worker == worker and asked.task}

    def _lose(self, worker: str) -> None:
        self._running.pop(worker, None)
        if not self._running:
            self._one_ready.clear()
        for number in [number for number, playing in self._playing.items() if playing.worker == worker]:
            self._lost(number)
        for number in [number for number, asked in self._asked.items() if asked.worker == worker]:
            _settle(self._asked.pop(number).answer, None)
        for number in [number for number, (name, _) in self._cancelled.items() if name == worker]:
            self._cancelled.pop(number)[1].cancel()

    def _lost(self, number: int) -> None:
        _settle(self._end(number).ended, None)

    def _deaf(self, number: int) -> None:
        worker, _ = self._cancelled.pop(number)
        why = (
            f"it did not answer for {self._deadlines.answer_s:g} s (env.answer_s): environment code keeps its event "
            "loop from running; make it async, or run it in a thread"
        )
        self._restart(worker, why)
        self.worker_ended(worker, why, self._lives[worker])

    async def _workers_of(self, source: str) -> list[str]:
        """Those that play it. Errors: DeadlineError, if none is there in time."""
        while not (found := [name for name in self.names if source in (self._sources[name] or (source,))]):
            self._one_ready.clear()
            waiting_for, hint = f"an environment worker of {source} to be there", "see logs/env-*.log"
            await within(self._deadlines.ready_s, self._one_ready.wait(), waiting_for=waiting_for, hint=hint)
        return found

    async def _free_worker(self, source: str) -> str:
        """The one with the fewest rollouts. Errors: DeadlineError, if none is there in time."""
        return min(await self._workers_of(source), key=lambda name: (self._running[name], name))

    # --- rollouts

    async def play(self, order: PlayOrder) -> RolloutRecord:
        """To its end. A rollout without progress for `stall_s`, and one of a quarantined task, ends `invalid`."""
        while True:
            async with self._room_for(order.source, order.task):
                if reason := self.quarantine.reason(order.source, order.task):
                    return _invalid(order, f"its task is quarantined: {reason}")
                if (record := await self._try(order)) is not None:
                    return record

    def _room_for(self, source: str, task: Task | None) -> AbstractAsyncContextManager[Any]:
        """What is asked inside is true when its turn has come: while it waited, a task may have been quarantined."""
        return self._alone if task is not None and self.quarantine.is_suspect(source, task) else nullcontext()

    async def _try(self, order: PlayOrder) -> RolloutRecord | None:
        """None, if the worker died."""
        number, worker = next(self._numbers), await self._free_worker(order.source)
        loop = asyncio.get_running_loop()
        stall = loop.call_later(self._deadlines.stall_s, self._stalled, number)
        playing = self._playing[number] = _Playing(worker, order, loop.create_future(), stall)
        self._running[worker] += 1
        play = Play(rollout_id=number, source=order.source, task=order.task, sampling=order.sampling, seed=order.seed)
        await self._send(worker, play)
        try:
            return await playing.ended
        except asyncio.CancelledError:
            if number in self._playing:  # else it has just ended
                self._end(number)
                await self._cancel(worker, number)
            raise

    async def _cancel(self, worker: str, number: int) -> None:
        if worker in self._running and number not in self._cancelled:
            timer = asyncio.get_running_loop().call_later(self._deadlines.answer_s, self._deaf, number)
            self._cancelled[number] = worker, timer
            await self._send(worker, Cancel(rollout_id=number))

    def _stopped(self, number: int) -> None:
        """The worker is alive: what it stopped had no progress by its own fault."""
        if number in self._cancelled:
            self._cancelled.pop(number)[1].cancel()
        if number in self._asked:
            _settle(self._asked.pop(number).answer, Cancelled(rollout_id=number))
        if number in self._playing:
            error = f"no progress for {self._deadlines.stall_s:.0f} s outside of engine calls (env.stall_s)"
            self._finish(number, _invalid(self._playing[number].order, error))

    def _start_answer(self, playing: _Playing, call: Call) -> None:
        playing.stall.cancel()
        playing.answers.add(self._spawn(self._answer(playing, call)))

    async def _answer(self, playing: _Playing, call: Call) -> None:
        """Answer one call; one that cannot be answered makes the rollout invalid on the worker's side, or truncated.

        Errors: UserError, of an endpoint that refuses all calls.
        """
        answer, error, is_too_long = None, "", False
        try:
            answer = await playing.order.answer(call)
        except UserError:
            raise
        except PalestraError as failure:
            error, is_too_long = str(failure), isinstance(failure, TooLongError)
        if call.rollout_id in self._playing:
            message = CallReply(
                rollout_id=call.rollout_id,
                call=call.call,
                reply=answer if isinstance(answer, Reply) else None,
                chat=answer if isinstance(answer, ChatReply) else None,
                error=error,
                is_too_long=is_too_long,
            )
            self._answered(playing, call.rollout_id)
            await self._send(playing.worker, message)

    def _answered(self, playing: _Playing, number: int) -> None:
        """The environment has the word again, unless other calls of the rollout are still on their way. Said before the
        answer leaves: a worker that dies of it was at work."""
        task = asyncio.current_task()
        assert task is not None
        playing.answers.discard(task)
        if not playing.answers and not playing.has_stalled:
            playing.stall.cancel()
            playing.stall = asyncio.get_running_loop().call_later(self._deadlines.stall_s, self._stalled, number)

    def _stalled(self, number: int) -> None:
        playing = self._playing[number]
        playing.has_stalled = True
        self._spawn(self._cancel(playing.worker, number))

    def _finish(self, number: int, record: RolloutRecord) -> None:
        playing = self._end(number)
        self._fruitful.add(playing.worker)
        _settle(playing.ended, msgspec.structs.replace(record, rollout_id=playing.order.rollout_id))

    def _end(self, number: int) -> _Playing:
        """Nothing that still arrives for this try counts."""
        playing = self._playing.pop(number)
        playing.stall.cancel()
        for answer in playing.answers:
            answer.cancel()
        if playing.worker in self._running:
            self._running[playing.worker] -= 1
        return playing

    # --- questions

    async def list_tasks(self, source: str, epoch: int, offset: int, count: int) -> Tasks:
        def message(number: int) -> ListTasks:
            return ListTasks(request_id=number, source=source, epoch=epoch, offset=offset, count=count)

        answer = await self._ask(message, waiting_for=f"tasks of {source}", source=source)
        assert isinstance(answer, Tasks)
        return answer

    async def score_group(self, source: str, records: list[RolloutRecord]) -> list[RolloutRecord]:
        """The records with group rewards in them. Errors: InfrastructureError, if a group reward raised."""
        sent = [record.unrouted() for record in records]

        def message(number: int) -> ScoreGroup:
            return ScoreGroup(request_id=number, source=source, records=sent)

        task = records[0].task
        answer = await self._ask(message, waiting_for=f"group rewards of {source}", source=source, task=task)
        assert isinstance(answer, GroupScored)
        if answer.error:
            raise InfrastructureError(answer.error)
        return [scored.with_samples_of(record) for scored, record in zip(answer.records, records, strict=True)]

    async def _ask(
        self, message: Callable[[int], ToWorker], *, waiting_for: str, source: str, task: Task | None = None
    ) -> Tasks | GroupScored:
        """Until a worker lives long enough to answer. Errors: DeadlineError; InfrastructureError, if the task is
        quarantined."""
        while True:
            async with self._room_for(source, task):
                if task is not None and (reason := self.quarantine.reason(source, task)):
                    raise InfrastructureError(f"its task is quarantined: {reason}")
                answer = await self._ask_one(message, waiting_for=waiting_for, source=source, task=task)
            if isinstance(answer, Tasks | GroupScored):
                return answer

    async def _ask_one(
        self, message: Callable[[int], ToWorker], *, waiting_for: str, source: str, task: Task | None
    ) -> FromWorker | None:
        """None, if the worker died."""
        number, worker = next(self._numbers), await self._free_worker(source)
        if task is None:  # tasks are loaded where they are listed: in one worker, as long as it lives
            worker = (await self._workers_of(source))[0]
        name = "" if task is None else name_of(source, task)
        asked = self._asked[number] = _Asked(worker, name, asyncio.get_running_loop().create_future())
        await self._send(worker, message(number))
        try:
            return await within(self._deadlines.stall_s, asked.answer, waiting_for=f"{waiting_for} from {worker}")
        except DeadlineError:
            answer = await self._late_answer(number, asked)
            if isinstance(answer, Cancelled):
                raise  # the worker is alive: this takes too long by itself
            return answer
        finally:
            self._asked.pop(number, None)

    async def _late_answer(self, number: int, asked: _Asked) -> FromWorker | None:
        """Whatever the worker says; None, if it says nothing in time and is started again."""
        if asked.worker not in self._running:
            return None
        asked.answer = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        await self._cancel(asked.worker, number)
        return await asked.answer  # `_deaf` ends this wait


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _invalid(order: PlayOrder, error: str) -> RolloutRecord:
    return RolloutRecord(
        rollout_id=order.rollout_id, environment=order.source, task=order.task, ending=Ending.INVALID, error=error
    )
