"""An environment worker: plays many rollouts at once, lists tasks and scores groups for the orchestrator.

Consumes: ListTasks, Play, CallReply, ScoreGroup, Cancel, Stop; that the orchestrator was replaced, which ends plays.
Produces: WorkerReady, Tasks, Call, Ended, Cancelled, GroupScored, LedgerClosed. Waits for: the orchestrator's messages,
with a deadline; each rollout for the replies to its calls.
Woken by: a message. Ends when: it is told to stop, or its parent is gone.
"""

import asyncio
import hashlib
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from palestra.config import RunConfig
from palestra.config.schema import EvalSet, SeatModel, Source
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.ledger import LedgerSelector
from palestra.core.metrics import percentile
from palestra.core.process import life, resident_bytes
from palestra.core.records import ChatReply, Reply, Sampling
from palestra.core.spans import SpanLog
from palestra.env.agent import Agent, Door, Frozen
from palestra.env.chat import ChatTokenizer, Conversation
from palestra.env.endings import ContextFull
from palestra.env.environment import Environment, has_group_rewards, seats
from palestra.env.load import make_environment
from palestra.env.play import play
from palestra.env.scoring import InvalidRollout, describe, score_group
from palestra.env.tasklist import TaskList
from palestra.env.voice import ChatVoice, PolicyVoice, Voice
from palestra.wire.channel import Caller, Reconnected
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
    Stop,
    Tasks,
    ToWorker,
    WorkerReady,
)

if TYPE_CHECKING:  # most environments let no program in: its server is imported with the first one
    from palestra.env.proxy import Proxy

_AT_ONCE = 4  # messages, then what they set going goes on: no burst holds up the loop
LEDGER_EVERY_S = 10.0
SILENCE_S = 86_400.0  # a trainer may take hours over one step; a dead orchestrator is the supervisor's affair


@dataclass
class Stage:
    """One entry of the recipe: the environment that plays its rollouts, the list of its tasks, and the models that
    speak for seats in place of the policy."""

    environment: Environment
    tasks: TaskList
    seats: dict[str, SeatModel] = field(default_factory=dict)

    def voice(self, seat: str, calls: "SeatCalls", sampling: Sampling, make: "MakeVoice") -> Voice:
        """What speaks for a seat: the model that the recipe names for it, or what `make` makes."""
        if (model := self.seats.get(seat)) is None:
            return make(calls, sampling)
        theirs = Sampling(temperature=model.temperature, max_tokens=model.max_tokens or sampling.max_tokens)
        return ChatVoice(partial(calls.ask, seat=seat), theirs)

    listing: asyncio.Lock = field(default_factory=asyncio.Lock)


def set_stages(config: RunConfig, *, python: Path | None = None) -> dict[str, Stage]:
    """Entries of env.mix and eval.sets that belong to a Python (None: ours), by their labels. Errors: UserError."""
    stages: dict[str, Stage] = {}
    for source in (*config.env.mix, *config.eval.sets):
        if source.python != python:
            continue
        if source.label in stages:
            raise UserError(
                f"{source.label!r} is the name of two entries of env.mix and eval.sets; give one another `name`"
            )
        make = partial(_environment_of_epoch, source, config.train.seed)
        environment = make(0)
        _require_seats(source, environment)
        stages[source.label] = Stage(environment, TaskList(make), source.seats)
    return stages


def _require_seats(source: Source, environment: Environment) -> None:
    """Errors: UserError, if a model is given for a seat that is not there, or none is left to train."""
    known = seats(type(environment))
    for name in source.seats:
        if name not in known:
            raise UserError(f"{source.label}: seats.{name} names no seat of {source.id}; it has: {', '.join(known)}")
    if not [name for name, kind in known.items() if kind is not Frozen and name not in source.seats]:
        raise UserError(f"{source.label}: all seats of {source.id} have a model of their own, so none would train")


def _environment_of_epoch(source: Source, train_seed: int, epoch: int) -> Environment:
    seed = source_seed(source, train_seed, epoch)
    return make_environment(source.id, split=source.split, seed=seed, args=source.args)


def source_seed(source: Source, train_seed: int, epoch: int) -> int:
    """Evaluations measure the same tasks whatever the seed of the training and the way of sampling, and wherever the
    file of an environment lies."""
    parts = (
        ("eval", source.id.rpartition("/")[2], source.split, epoch)
        if isinstance(source, EvalSet)
        else (train_seed, source.label, epoch)
    )
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little") >> 1


class SeatCalls(Protocol):
    """How the calls of one rollout are made: `await calls(token_ids, sampling)`, `await calls.ask(...)`."""

    async def __call__(self, token_ids: list[int], sampling: Sampling, /) -> Reply: ...

    async def ask(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], sampling: Sampling, *, seat: str = ""
    ) -> ChatReply: ...


MakeVoice = Callable[[SeatCalls, Sampling], Voice]
"""What speaks for the seats of one rollout, given how its calls are made."""


def policy_voice(tokenizer: ChatTokenizer, max_model_len: int) -> MakeVoice:
    """Engines that take tokens."""

    def make(calls: SeatCalls, sampling: Sampling) -> Voice:
        sampling = msgspec.structs.replace(sampling, stop_token_ids=tokenizer.stop_ids)
        return PolicyVoice(Conversation(tokenizer), calls, sampling, max_model_len=max_model_len)

    return make


def chat_voice(calls: SeatCalls, sampling: Sampling) -> Voice:
    """An endpoint that takes messages."""
    return ChatVoice(calls.ask, sampling)


class Worker:
    """One worker process. Its event loop never waits for anything but messages; `selector` measures what blocks it."""

    def __init__(
        self,
        index: int,
        stages: dict[str, Stage],
        make_voice: MakeVoice,
        *,
        orchestrator: Caller[ToWorker, FromWorker],
        selector: LedgerSelector,
        spans: SpanLog,
    ):
        self._index, self._stages, self._make_voice = index, stages, make_voice
        self._orchestrator, self._selector, self._spans = orchestrator, selector, spans
        self._plays: dict[int, asyncio.Task[None]] = {}  # and groups that are scored: numbers of one counter
        self._replies: dict[tuple[int, int], asyncio.Future[Reply | ChatReply]] = {}
        self._closed_at = time.monotonic()
        self._num_ended, self._cpu_before_s = 0, 0.0
        self._proxy: Proxy | None = None

    async def run(self) -> None:
        """Errors: an ExceptionGroup of what our own code raised, or of the UserError that an environment sends what the
        policy cannot be given; nothing else that environment code does can end a worker."""
        self._selector.ledger.switch("work")
        await asyncio.sleep(0)  # starting up is one long turn, in which nobody waits: it is booked when it ends
        self._selector.take_lag()
        self._cpu_before_s = time.process_time()
        await self._say_ready()
        async with asyncio.TaskGroup() as jobs:
            for number in itertools.count(1):
                if isinstance(message := await self._receive(), Stop):
                    break
                await self._handle(message, jobs)
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)
                if time.monotonic() - self._closed_at >= LEDGER_EVERY_S:
                    await self._close_ledger()
            self._cancel_plays()
        if self._proxy is not None:
            await self._proxy.close()
        await self._close_ledger(is_last=True)

    async def _say_ready(self) -> None:
        sources = list(self._stages)
        await self._orchestrator.send(WorkerReady(index=self._index, pid=os.getpid(), life=life(), sources=sources))

    def _keep(self, number: int, task: asyncio.Task[None]) -> None:
        """Until it has ended: what hangs in code of an environment can be cancelled."""
        self._plays[number] = task
        task.add_done_callback(lambda _: self._plays.pop(number))

    def _cancel_plays(self) -> None:
        for task in self._plays.values():
            task.cancel()

    async def _receive(self) -> ToWorker | Reconnected:
        return await self._orchestrator.receive(deadline_s=SILENCE_S, waiting_for="the orchestrator's next message")

    async def _handle(self, message: ToWorker | Reconnected, jobs: asyncio.TaskGroup) -> None:
        match message:
            case CallReply():
                self._answer(message)
            case Play():
                self._keep(message.rollout_id, jobs.create_task(self._play(message)))
            case Cancel():
                if (play := self._plays.get(message.rollout_id)) is not None:
                    play.cancel()
                await self._orchestrator.send(Cancelled(rollout_id=message.rollout_id))
            case ListTasks():
                jobs.create_task(self._list_tasks(message))  # never cancelled: its thread would go on in the list
            case ScoreGroup():
                self._keep(message.request_id, jobs.create_task(self._score_group(message)))
            case Reconnected():
                self._cancel_plays()
                await self._say_ready()

    # --- rollouts

    async def _play(self, order: Play) -> None:
        stage, calls = self._stages[order.source], Calls(self, order.rollout_id)
        record = await play(
            stage.environment,
            order.task,
            lambda seat: stage.voice(seat, calls, order.sampling, self._make_voice),
            rollout_id=order.rollout_id,
            source=order.source,
            seed=order.seed,
            frozen=stage.seats,
            admit=self._admit,
        )
        self._num_ended += 1
        await self._orchestrator.send(Ended(record=msgspec.structs.replace(record, engine_s=calls.waited_s)))

    def _admit(self, agent: Agent) -> Door:
        """Its server starts with the first program that is let in."""
        if self._proxy is None:
            from palestra.env.proxy import Proxy

            self._proxy = Proxy()
        return self._proxy.admit(agent)

    async def call(self, message: Call) -> Reply | ChatReply:
        """One call. Errors: InfrastructureError, if there is no answer; Limit, if the context is full."""
        key = (message.rollout_id, message.call)
        self._replies[key] = asyncio.get_running_loop().create_future()
        try:
            await self._orchestrator.send(message)
            return await self._replies[key]  # the orchestrator's deadlines end this wait: with an error, or by Cancel
        finally:
            del self._replies[key]

    def _answer(self, message: CallReply) -> None:
        waiting = self._replies.get((message.rollout_id, message.call))
        if waiting is None or waiting.done():
            return  # its rollout was cancelled
        answer = message.reply or message.chat
        if answer is not None:
            waiting.set_result(answer)
        else:
            error = ContextFull(message.error) if message.is_too_long else InfrastructureError(message.error)
            waiting.set_exception(error)

    # --- tasks and groups

    async def _list_tasks(self, asked: ListTasks) -> None:
        """In a thread: a data set may take its time to load, and rollouts go on meanwhile."""
        stage = self._stages[asked.source]
        tasks, exhausted, error = [], True, ""
        try:
            async with stage.listing:
                tasks, exhausted = await asyncio.to_thread(stage.tasks.take, asked.epoch, asked.offset, asked.count)
        except Exception as raised:
            error = describe(f"tasks of {asked.source}", raised)
        await self._orchestrator.send(
            Tasks(
                request_id=asked.request_id,
                tasks=tasks,
                exhausted=exhausted,
                has_group_rewards=has_group_rewards(type(stage.environment)),
                error=error,
            )
        )

    async def _score_group(self, asked: ScoreGroup) -> None:
        records, error = asked.records, ""
        try:
            records = await score_group(self._stages[asked.source].environment, asked.records)
        except InvalidRollout as invalid:
            error = str(invalid)
        await self._orchestrator.send(GroupScored(request_id=asked.request_id, records=records, error=error))

    # --- accounts

    async def _close_ledger(self, *, is_last: bool = False) -> None:
        """Send the ledger's entry; the lag of the event loop over the same time becomes a span."""
        self._closed_at = time.monotonic()
        turns_s = sorted(self._selector.take_lag())
        entry = self._selector.ledger.close()
        lag = {"turns": len(turns_s), "p99_s": percentile(turns_s, 0.99), "longest_s": turns_s[-1]} if turns_s else {}
        cpu_s = time.process_time() - self._cpu_before_s  # since it was ready
        self._spans.write("loop", entry.started_at, entry.wall_s, {"rollouts": self._num_ended, "cpu_s": cpu_s, **lag})
        self._num_ended = 0
        closed = LedgerClosed(entry=entry, is_last=is_last, resident_bytes=resident_bytes())
        await self._orchestrator.send(closed)


class Calls:
    """The calls of one rollout, counted from 0 in the order they are made."""

    def __init__(self, worker: Worker, rollout_id: int):
        self._worker, self._rollout_id, self._next = worker, rollout_id, 0
        self.waited_s = 0.0

    async def __call__(self, token_ids: list[int], sampling: Sampling) -> Reply:
        """Of an engine: exact tokens in and out."""
        answer = await self._call(token_ids=token_ids, sampling=sampling)
        assert isinstance(answer, Reply)
        return answer

    async def ask(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], sampling: Sampling, *, seat: str = ""
    ) -> ChatReply:
        """Of an endpoint: the one that is measured, or that of a seat."""
        answer = await self._call(token_ids=[], sampling=sampling, messages=messages, tools=tools, seat=seat)
        assert isinstance(answer, ChatReply)
        return answer

    async def _call(self, **asked: Any) -> Reply | ChatReply:
        number, self._next = self._next, self._next + 1
        began = time.perf_counter()
        try:
            return await self._worker.call(Call(rollout_id=self._rollout_id, call=number, **asked))
        finally:
            self.waited_s += time.perf_counter() - began
