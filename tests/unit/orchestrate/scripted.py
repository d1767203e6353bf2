"""Scripted peers of the loop: an engine, a worker and a trainer that speak the real protocol without a model."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from palestra.config.schema import RunConfig
from palestra.core.ledger import Ledger, LedgerEntry, LedgerSelector
from palestra.core.metrics import Metrics
from palestra.core.records import Ending, Reply, RolloutRecord, Routes, Sample, Sampling, Seat, Span, Task
from palestra.orchestrate.checkpoint import recover_journal
from palestra.orchestrate.loop import Loop
from palestra.wire.channel import Caller, Listener, Reconnected
from palestra.wire.draft import Draft
from palestra.wire.messages import (
    Call,
    CallReply,
    Cancel,
    Cancelled,
    Ended,
    Exported,
    Finish,
    LedgerClosed,
    ListTasks,
    Play,
    StepTrained,
    StillEvaluating,
    Stop,
    Tasks,
    ToSupervisor,
    ToTrainer,
    ToWorker,
    TrainBatch,
    TrainerReady,
    TrainerSaved,
    WeightsStaged,
    WorkerReady,
)
from palestra.wire.policy import EngineLoad
from palestra.wire.rundir import Attempt, RunDir, read_manifests
from palestra.wire.weights.manifest import Probe, Staged

GROUP_SIZE, GROUPS, PROMPT = 4, 2, [5, 6, 7]


def make_config(outputs: Path, **sections: dict) -> RunConfig:
    tree: dict = {
        "log": {"name": "scripted", "outputs": str(outputs)},
        "model": {"path": "unused"},
        "algo": {"groups_per_step": GROUPS, "group_size": GROUP_SIZE, "max_age": 4, "pace_age": 1.0},
        "sampling": {"max_tokens": 8},
        "train": {"steps": 6, "max_pack_tokens": 64, "checkpoint_every": 2, "batch_deadline_s": 20},
        "engine": {"max_model_len": 64, "max_in_flight": 8},
        "env": {"mix": [{"id": "scripted"}], "stall_s": 60},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return RunConfig.model_validate(tree)


def routed(reply: Reply, prompt: list[int], sampling: Sampling) -> Reply:
    """With routes, where they are asked for: two layers, in which a token has the experts of its id."""
    if sampling.routes_from is None:
        return reply
    computed = [*prompt, *reply.token_ids][sampling.routes_from : -1]
    routes = Routes(bytes(expert for token in computed for expert in (token, token + 1)), 2, 1)
    return msgspec.structs.replace(reply, routes=routes)


class ScriptedEngine:
    """Replies depend on the seed alone; every token is labelled with the version loaded."""

    is_asleep = False

    def __init__(self, url: str, *, delay_s: Callable[[int], float] = lambda seed: 0.0):
        self.url, self._delay_s = url, delay_s
        self.loaded = -1
        self.cache_salt = "salt"
        self.num_requests = 0
        self.calls: list[tuple[int, int]] = []  # seed, version

    async def generate(self, token_ids, sampling: Sampling, *, seed, deadline_s, num_replies=1, cache_salt=None):
        self.num_requests += 1
        await self._take(max(self._delay_s(seed + i) for i in range(num_replies)))
        return [routed(self._reply(seed + i), token_ids, sampling) for i in range(num_replies)]

    async def stream(self, token_ids, sampling, *, seed, silence_s, draft: Draft, cache_salt=None, stream_tokens=16):
        """In two pieces, the second of which comes after the delay."""
        self.num_requests += 1
        reply = routed(self._reply(seed), token_ids, sampling)
        half = len(reply.token_ids) // 2
        draft.add(reply.token_ids[:half], reply.logprobs[:half])
        await self._take(self._delay_s(seed))
        draft.add(reply.token_ids[half:], reply.logprobs[half:])
        return reply

    async def _take(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _reply(self, seed: int) -> Reply:
        self.calls.append((seed, self.loaded))
        size = 1 + seed % 5
        return Reply(
            token_ids=[10 + (seed + i) % 7 for i in range(size)],
            logprobs=[-0.5] * size,
            spans=(Span(self.loaded, 0, size),),
            finish_reason="stop",
        )

    async def score(self, token_ids, *, deadline_s=None):
        return [-1.0] * (len(token_ids) - 1)

    async def load(self, *, deadline_s=None) -> EngineLoad:
        return EngineLoad(
            running=0, waiting=0, kv_use=0.0, preemptions=0, prompt_tokens=0, sampled_tokens=0, safe_requests=1000.0
        )

    async def wait_healthy(self, deadline_s):
        pass

    async def is_healthy(self):
        return True

    def forget(self):
        self.loaded = -1

    @property
    def serving(self):
        return self.loaded if self.loaded >= 0 else None

    async def finish(self, version, *, deadline_s=None):
        self.loaded = version

    async def version(self, *, deadline_s=None):
        return self.loaded

    async def _nothing(self, *args, **kwargs):
        pass

    pause = resume = start_update = update = abandon_update = close = require_processed_logprobs = _nothing


class ScriptedWorker:
    """Plays one turn per rollout; `reward(record)` says what it is worth, or raises to make it invalid."""

    def __init__(self, attempt: Attempt, reward: Callable[[RolloutRecord], float], *, index: int = 0, life: int = 0):
        self.index, self.name, self.life = index, f"env-{index}", life
        self._channel: Caller[ToWorker, object] = Caller(
            attempt.orchestrator, name=self.name, attempt=attempt.number, receives=ToWorker, life=life
        )
        self._reward = reward
        self._plays: dict[int, Play] = {}
        self.num_played = 0
        self.num_tasks = 10**9

    async def run(self) -> None:
        await self._say_ready()
        while True:
            message = await self._channel.receive(deadline_s=20, waiting_for="the loop")
            match message:
                case ListTasks():
                    names = [f"task {i}" for i in range(message.offset, message.offset + message.count)]
                    tasks = [Task(prompt=name, key=name) for name in names[: max(self.num_tasks - message.offset, 0)]]
                    ended = len(tasks) < message.count
                    await self._channel.send(Tasks(request_id=message.request_id, tasks=tasks, exhausted=ended))
                case Reconnected():
                    self._plays.clear()
                    await self._say_ready()
                case Play():
                    self.num_played += 1
                    self._plays[message.rollout_id] = message
                    call = Call(rollout_id=message.rollout_id, call=0, token_ids=PROMPT, sampling=message.sampling)
                    await self._channel.send(call)
                case CallReply() if message.rollout_id in self._plays:
                    await self._channel.send(Ended(record=self._record(self._plays.pop(message.rollout_id), message)))
                case Cancel():
                    self._plays.pop(message.rollout_id, None)
                    await self._channel.send(Cancelled(rollout_id=message.rollout_id))
                case Stop():
                    await self._channel.send(LedgerClosed(entry=_entry(self.name), is_last=True))
                    return

    async def _say_ready(self) -> None:
        await self._channel.send(WorkerReady(index=self.index, pid=0, life=self.life))

    def _record(self, play: Play, answer: CallReply) -> RolloutRecord:
        record = RolloutRecord(
            rollout_id=play.rollout_id, environment=play.source, task=play.task, ending=Ending.INVALID
        )
        if answer.reply is None:
            return record
        size, start = len(answer.reply.token_ids), len(PROMPT)
        sample = Sample(
            token_ids=PROMPT + answer.reply.token_ids,
            logprobs=[0.0] * start + answer.reply.logprobs,
            sampled=[0] * start + [1] * size,
            spans=tuple(Span(s.version, s.start + start, s.end + start) for s in answer.reply.spans),
            routes=answer.reply.routes,
        )
        seats = (Seat(samples=(sample,)),)
        done = RolloutRecord(
            rollout_id=play.rollout_id,
            environment=play.source,
            task=play.task,
            ending=Ending.OK,
            seats=seats,
            num_turns=1,
        )
        try:
            return RolloutRecord(
                **{name: getattr(done, name) for name in done.__struct_fields__} | {"reward": self._reward(done)}
            )
        except RuntimeError as error:
            return RolloutRecord(
                rollout_id=play.rollout_id,
                environment=play.source,
                task=play.task,
                ending=Ending.INVALID,
                error=str(error),
            )


class ScriptedTrainer:
    """Counts steps. `trained` lists (step, rollouts) in the order trained, over all its lives."""

    def __init__(self, run: RunDir, attempt: Attempt, *, version: int, step_s: float = 0.0, life: int = 0):
        self._run, self._attempt, self._version, self._step_s = run, attempt, version, step_s
        self._channel: Caller[ToTrainer, object] = Caller(
            attempt.orchestrator, name="trainer", attempt=attempt.number, receives=ToTrainer, life=life
        )
        self._told = TrainerReady(version=version)  # for an orchestrator that takes another's place
        self.trained: list[tuple[int, list[int]]] = []
        self.batches: list = []
        self.heard_evaluating = 0
        self.metrics: Callable[[int], Metrics] = lambda step: {}

    async def run(self) -> None:
        await self._channel.send(TrainerReady(version=self._version))
        await self._stage()
        while True:
            match await self._channel.receive(deadline_s=20, waiting_for="a batch"):
                case TrainBatch(step=step, publish=publish, save=save):
                    await self._train(step, publish, save)
                case Reconnected():
                    await self._channel.send(self._told)
                case StillEvaluating():
                    self.heard_evaluating += 1
                case Finish():
                    await self._channel.send(Exported(directory="", ledgers=[_entry()]))
                    return

    async def _train(self, step: int, publish: bool, save: bool) -> None:
        if step < self._version:
            return  # trained, and asked for by an orchestrator that did not know
        assert step == self._version, f"step {step} at version {self._version}"
        batch = self._run.batches.read(step, attempt=self._attempt.number)
        await asyncio.sleep(self._step_s)
        self.trained.append((step, sorted(set(batch.rollout.tolist()))))
        self.batches.append(batch)
        self._version += 1
        trained = StepTrained(step=step, metrics=self.metrics(step), ledgers=[_entry()])
        self._tell(version=self._version, steps=[*self._told.steps, trained][-2:])
        await self._channel.send(trained)
        if publish:
            await self._stage()
        if save:
            (self._run.checkpoints / f"{self._version:06d}" / "trainer").mkdir(parents=True, exist_ok=True)
            saved = TrainerSaved(version=self._version, directory="")
            self._tell(saved=saved)
            await self._channel.send(saved)

    async def _stage(self) -> None:
        staged = Staged(version=self._version, directory="", probe=Probe(token_ids=PROMPT, logprobs=[-1.0, -1.0]))
        self._tell(staged=staged)
        await self._channel.send(WeightsStaged(staged=staged))

    def _tell(self, **fields) -> None:
        self._told = msgspec.structs.replace(self._told, **fields)


def _entry(process: str = "trainer") -> LedgerEntry:
    return LedgerEntry(process=process, started_at=time.time(), wall_s=1.0, parts_s={"wait_for_batch": 1.0})


@contextlib.contextmanager
def threads_of_its_own() -> Iterator[None]:
    """For one life of a process, which in tests is a task: a thread that it began has ended before the next life, as a
    kill would end it. Two that write the same file under the same temporary name take it from each other."""
    with ThreadPoolExecutor() as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        yield


class Life:
    """One attempt of a scripted run: the real loop with scripted peers."""

    def __init__(
        self,
        config: RunConfig,
        *,
        reward: Callable[[RolloutRecord], float],
        engine=ScriptedEngine,
        step_s: float = 0.0,
        num_engines: int = 1,
    ):
        self.run = RunDir(config.run_dir)
        self.run.path.mkdir(parents=True, exist_ok=True)
        number = self.run.last_attempt_number() + 1
        manifests = read_manifests(self.run)
        resumed_from = manifests[-1].version if manifests else None
        self.attempt = Attempt(
            number=number,
            resumed_from=resumed_from,
            supervisor=f"ipc://{self.run.path}/s{number}",
            orchestrator=f"ipc://{self.run.path}/o{number}",
            engines=tuple(f"http://engine-{i}" for i in range(num_engines)),
            staging="",
            started_at=time.time(),
        )
        self.run.write_attempt(self.attempt)
        self.journal = recover_journal(self.run, resumed_from)
        self.supervisor: Listener = Listener(self.attempt.supervisor, attempt=number, receives=ToSupervisor)
        self.engines: list[ScriptedEngine] = []

        def make_engine(url: str) -> ScriptedEngine:
            self.engines.append(engine(url))
            return self.engines[-1]

        self.loop = Loop(
            config,
            self.run,
            self.attempt,
            self.journal,
            _selector(),
            make_client=make_engine,  # type: ignore[arg-type]
        )
        self.trainer = ScriptedTrainer(self.run, self.attempt, version=resumed_from or 0, step_s=step_s)
        self.worker = ScriptedWorker(self.attempt, reward)
        self.beside: list[Callable[[], Coroutine[Any, Any, None]]] = []  # what else runs, and ends with the run

    async def play(self, *, kill_after_s: float | None = None, kill_when: Callable[[], bool] | None = None) -> None:
        """Run to the end, or cancel everything after a while or as soon as something is so, as a kill would."""
        with threads_of_its_own():
            runs = (self.worker.run, self.trainer.run, self.loop.run, *self.beside)
            parts = [asyncio.create_task(run()) for run in runs]
            if kill_when is not None:
                parts.append(asyncio.create_task(_time_out(kill_when, parts[2])))
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.gather(*parts), kill_after_s)
            finally:
                for part in parts:  # the others too, if one failed
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)
                for channel in (self.worker._channel, self.trainer._channel, self.supervisor):
                    channel.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def _time_out(when: Callable[[], bool], playing: asyncio.Task[None]) -> None:
    while not when():
        assert not playing.done(), "the run ended before it was to be killed"
        await asyncio.sleep(0.002)
    raise TimeoutError


def _selector() -> LedgerSelector:
    """The running loop's, where it was made with one: only that one sees its turns."""
    running = getattr(asyncio.get_running_loop(), "_selector", None)
    return running if isinstance(running, LedgerSelector) else LedgerSelector(Ledger("orchestrator"))


def reward_by_seed(record: RolloutRecord) -> float:
    """Differs within a group, repeats exactly."""
    return float(sum(record.seats[0].samples[0].token_ids) % 3)


def random_kill_s(seed: int) -> float:
    return random.Random(seed).uniform(0.02, 0.4)
