"""The environment workers as the orchestrator sees them: play a rollout, list tasks, score a group.

Consumes: messages of the workers. Produces: finished rollouts, answered engine calls.
Waits for: workers, with a deadline on lack of progress. Woken by: `handle`. Ends when: the loop does.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from palestra.core.deadline import within
from palestra.core.errors import InfrastructureError, PalestraError
from palestra.core.records import Ending, Reply, RolloutRecord, Sampling, Task
from palestra.wire.messages import (
    Call,
    CallReply,
    Cancel,
    Ended,
    FromWorker,
    GroupScored,
    ListTasks,
    Play,
    ScoreGroup,
    Tasks,
    ToWorker,
    WorkerReady,
)

Send = Callable[[str, ToWorker], Coroutine[Any, Any, None]]
Answer = Callable[[Call], Awaitable[Reply]]
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


@dataclass(frozen=True, kw_only=True)
class PlayOrder:
    """One rollout to be played: `answer` gives the replies to its engine calls."""

    rollout_id: int
    source: str
    task: Task
    sampling: Sampling
    seed: int
    answer: Answer


@dataclass
class _Playing:
    worker: str
    order: PlayOrder
    ended: asyncio.Future[RolloutRecord]
    stall: asyncio.TimerHandle
    answers: set[asyncio.Task[None]] = field(default_factory=set)  # engine calls on their way: no stall meanwhile


class WorkerPool:
    """Deals work to the workers. A rollout is known to its worker by a number of its own, so that nothing late from a
    cancelled try is taken for its successor's."""

    def __init__(self, send: Send, spawn: Spawn, *, num_workers: int, stall_s: float):
        """`spawn` starts a task whose error ends the loop."""
        self._send, self._spawn, self._stall_s = send, spawn, stall_s
        self._running: dict[str, int] = {}
        self._num_workers = num_workers
        self._all_ready = asyncio.Event()
        self._playing: dict[int, _Playing] = {}
        self._asked: dict[int, asyncio.Future[Tasks | GroupScored]] = {}
        self._numbers = itertools.count()

    @property
    def names(self) -> list[str]:
        return sorted(self._running)

    @property
    def num_playing(self) -> int:
        return len(self._playing)

    async def wait_ready(self, deadline_s: float) -> None:
        await within(
            deadline_s,
            self._all_ready.wait(),
            waiting_for=f"{self._num_workers} environment workers",
            hint="see logs/env-*.log",
        )

    def handle(self, peer: str, message: FromWorker) -> None:
        match message:
            case WorkerReady():
                self._running.setdefault(peer, 0)
                if len(self._running) == self._num_workers:
                    self._all_ready.set()
            case Call() if message.rollout_id in self._playing:
                self._start_answer(self._playing[message.rollout_id], message)
            case Ended() if message.record.rollout_id in self._playing:
                self._finish(message.record.rollout_id, message.record)
            case Tasks() | GroupScored() if (asked := self._asked.pop(message.request_id, None)) and not asked.done():
                asked.set_result(message)

    async def play(self, order: PlayOrder) -> RolloutRecord:
        """One try. A try without progress for `stall_s` ends `invalid`."""
        number = next(self._numbers)
        worker = min(self._running, key=lambda name: (self._running[name], name))
        loop = asyncio.get_running_loop()
        playing = _Playing(worker, order, loop.create_future(), loop.call_later(self._stall_s, self._stalled, number))
        self._playing[number] = playing
        self._running[worker] += 1
        play = Play(rollout_id=number, source=order.source, task=order.task, sampling=order.sampling, seed=order.seed)
        await self._send(worker, play)
        try:
            return await playing.ended
        except asyncio.CancelledError:
            self._end(number)
            await self._send(worker, Cancel(rollout_id=number))
            raise

    async def list_tasks(self, source: str, epoch: int, offset: int, count: int) -> Tasks:
        number = next(self._numbers)
        message = ListTasks(request_id=number, source=source, epoch=epoch, offset=offset, count=count)
        answer = await self._ask(self.names[0], number, message, waiting_for=f"tasks of {source}")
        assert isinstance(answer, Tasks)
        return answer

    async def score_group(self, source: str, records: list[RolloutRecord]) -> list[RolloutRecord]:
        """The records with group rewards in them. Errors: InfrastructureError, if a group reward raised."""
        number = next(self._numbers)
        message = ScoreGroup(request_id=number, source=source, records=records)
        worker = min(self._running, key=lambda name: (self._running[name], name))
        answer = await self._ask(worker, number, message, waiting_for=f"group rewards of {source}")
        assert isinstance(answer, GroupScored)
        if answer.error:
            raise InfrastructureError(answer.error)
        return answer.records

    async def _ask(self, worker: str, number: int, message: ToWorker, *, waiting_for: str) -> Tasks | GroupScored:
        self._asked[number] = asyncio.get_running_loop().create_future()
        await self._send(worker, message)
        try:
            return await within(self._stall_s, self._asked[number], waiting_for=f"{waiting_for} from {worker}")
        finally:
            self._asked.pop(number, None)

    def _start_answer(self, playing: _Playing, call: Call) -> None:
        playing.stall.cancel()
        task = self._spawn(self._answer(playing, call))
        playing.answers.add(task)
        task.add_done_callback(lambda _: self._answered(playing, task, call.rollout_id))

    async def _answer(self, playing: _Playing, call: Call) -> None:
        """Answer one engine call; a call that cannot be answered makes the rollout invalid on the worker's side."""
        try:
            reply, error = await playing.order.answer(call), ""
        except PalestraError as failure:
            reply, error = None, str(failure)
        if call.rollout_id in self._playing:
            message = CallReply(rollout_id=call.rollout_id, call=call.call, reply=reply, error=error)
            await self._send(playing.worker, message)

    def _answered(self, playing: _Playing, task: asyncio.Task[None], number: int) -> None:
        """The environment has the word again, unless other calls of the rollout are still on their way."""
        playing.answers.discard(task)
        if number in self._playing and not playing.answers:
            playing.stall.cancel()
            playing.stall = asyncio.get_running_loop().call_later(self._stall_s, self._stalled, number)

    def _stalled(self, number: int) -> None:
        playing = self._playing[number]
        order = playing.order
        self._spawn(self._send(playing.worker, Cancel(rollout_id=number)))
        error = f"no progress for {self._stall_s:.0f} s outside of engine calls (env.stall_s)"
        self._finish(
            number,
            RolloutRecord(
                rollout_id=number, environment=order.source, task=order.task, ending=Ending.INVALID, error=error
            ),
        )

    def _finish(self, number: int, record: RolloutRecord) -> None:
        playing = self._end(number)
        if not playing.ended.done():
            playing.ended.set_result(msgspec.structs.replace(record, rollout_id=playing.order.rollout_id))

    def _end(self, number: int) -> _Playing:
        """Nothing that still arrives for this try counts."""
        playing = self._playing.pop(number)
        playing.stall.cancel()
        for answer in playing.answers:
            answer.cancel()
        self._running[playing.worker] -= 1
        return playing
