"""Engines of an evaluation that end and come back while it goes on."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from palestra.config import RunConfig
from palestra.core.errors import DeadlineError
from palestra.core.ledger import Ledger, LedgerSelector
from palestra.core.records import Ending, Sampling
from palestra.orchestrate.answers import Answers, EngineAnswers
from palestra.orchestrate.evaluator import Evaluator
from palestra.wire.channel import Listener
from palestra.wire.messages import Call, ProcessEnded, ProcessStarted, ToSupervisor
from palestra.wire.results import read_results
from palestra.wire.rundir import Attempt, RunDir
from tests.unit.orchestrate.mortal import Server
from tests.unit.orchestrate.scripted import PROMPT, ScriptedWorker, reward_by_seed, until

SEED = 4  # a reply of five tokens


class Engine(Server):
    """Serves once it is labelled. `labels` are those of all its lives; `may_label` holds them back."""

    def __init__(self, url: str, **options):
        super().__init__(url, **options)
        self.labels: list[int] = []
        self.may_label, self.has_worked = asyncio.Event(), asyncio.Event()
        self.may_label.set()

    async def label(self, version: int, *, deadline_s: float | None = None) -> None:
        self._require_alive()
        self.loaded = version
        self.labels.append(version)
        await self.may_label.wait()

    async def generate(self, *args, **options):
        if len(self.calls) >= 12:
            self.has_worked.set()
        return await super().generate(*args, **options)


def make_config(outputs: Path, *, engines: int, **engine: Any) -> RunConfig:
    tree = {
        "log": {"name": "measured", "outputs": str(outputs)},
        "model": {"path": "unused"},
        "sampling": {"max_tokens": 8},
        "engine": {"max_model_len": 64, "max_in_flight": 4, "replicas": engines, "healthy_s": 20, **engine},
        "eval": {"sets": [{"id": "scripted", "num_tasks": 20, "rollouts_per_task": 2}]},
    }
    return RunConfig.model_validate(tree)


def attempt_of(directory: Path, engines: int) -> Attempt:
    return Attempt(
        number=1,
        resumed_from=None,
        supervisor=f"ipc://{directory}/s",
        orchestrator=f"ipc://{directory}/o",
        engines=tuple(f"http://engine-{index}" for index in range(engines)),
        staging="",
        started_at=time.time(),
    )


class Bench:
    """Answers of engines, and what was asked of the supervisor."""

    def __init__(self, directory: Path, *, engines: int, delay_s: float, **engine: Any):
        self.engines: list[Engine] = []
        self.restarts: list[str] = []
        self._tasks: set[asyncio.Task] = set()
        self._delay_s = delay_s
        config = make_config(directory, engines=engines, join_max_tokens=0, **engine)
        attempt = attempt_of(directory, engines)
        self.answers = EngineAnswers(config, attempt, self._restart, self._spawn, make_client=self._make)  # type: ignore[arg-type]

    def _make(self, url: str) -> Engine:
        self.engines.append(Engine(url, delay_s=lambda seed: self._delay_s))
        return self.engines[-1]

    def _restart(self, name: str, why: str) -> None:
        self.restarts.append(name)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        return task

    def ask(self, session: int = -1) -> asyncio.Task:
        call = Call(rollout_id=0, call=0, token_ids=PROMPT, sampling=Sampling(max_tokens=8))
        return asyncio.ensure_future(self.answers.answer(session, call, seed=SEED))


async def test_a_reply_that_broke_off_is_gone_on_with_by_another_engine(tmp_path):
    bench = Bench(tmp_path, engines=2, delay_s=0.05)
    await bench.answers.start()
    await asyncio.sleep(0)
    asking = bench.ask()
    await until(lambda: any(engine.calls for engine in bench.engines))
    [dies, stays] = sorted(bench.engines, key=lambda engine: not engine.calls)
    dies.die()
    assert bench.answers.ended(dies.url.removeprefix("http://"))
    assert not bench.answers.ended("env-0")
    reply = await asking
    half = dies._reply(SEED).token_ids[:2]
    assert (reply.token_ids[:2], reply.finish_reason) == (half, "stop")
    assert len(reply.token_ids) > 2
    assert {span.version for span in reply.spans} == {0}
    assert len(stays.calls) == 1
    assert bench.restarts == []  # the supervisor starts what ended by itself
    await bench.answers.close()


async def test_the_only_engine_answers_again_once_its_successor_is_healthy_and_labelled(tmp_path):
    bench = Bench(tmp_path, engines=1, delay_s=0.02)
    await bench.answers.start()
    [engine] = bench.engines
    engine.die()
    bench.answers.ended("engine-0")
    asking = bench.ask()
    bench.answers.started("engine-0")
    await asyncio.sleep(0.05)
    assert not asking.done()
    assert engine.labels == [0]
    engine.may_label.clear()
    engine.is_alive.set()
    await until(lambda: engine.labels == [0, 0])
    engine.die()  # in its start, as it was about to serve
    bench.answers.ended("engine-0")
    bench.answers.started("engine-0")
    engine.may_label.set()
    await asyncio.sleep(0.05)
    assert (asking.done(), bench.restarts) == (False, [])  # what was labelled is gone
    engine.is_alive.set()
    reply = await asking
    assert engine.labels == [0, 0, 0]
    assert reply == engine._reply(SEED)
    bench.answers.started("engine-0")  # of one that is there it is no news
    assert not bench.answers.joining
    await bench.answers.close()


async def test_an_engine_that_fails_is_taken_out_and_asked_for_and_a_wait_for_none_ends_in_words(tmp_path):
    bench = Bench(tmp_path, engines=1, delay_s=0.0, healthy_s=0.1)
    await bench.answers.start()
    bench.engines[0].die()  # nobody has heard of it yet
    with pytest.raises(DeadlineError, match="an engine that serves"):
        await bench.ask()
    assert bench.restarts == ["engine-0"]
    await bench.answers.close()


class Measured(Evaluator):
    """With engines that are scripted."""

    def __init__(self, *given, make: Callable[[str], Engine]):
        self._make = make
        super().__init__(*given)

    def _make_answers(self) -> Answers:
        return EngineAnswers(
            self._config,
            self._attempt,
            self._ask_restart,
            self._tasks.create_task,
            make_client=self._make,  # type: ignore[arg-type]
        )


async def measure(directory: Path, *, kill: bool) -> list[tuple]:
    """What is in the results of an evaluation whose only engine is killed in the middle, or not."""
    directory.mkdir()
    config, attempt, engines = make_config(directory, engines=1), attempt_of(directory, 1), list[Engine]()
    run = RunDir(config.run_dir)
    run.path.mkdir()

    def make(url: str) -> Engine:
        engines.append(Engine(url, delay_s=lambda seed: 0.01))
        return engines[-1]

    supervisor: Listener = Listener(attempt.supervisor, attempt=1, receives=ToSupervisor)
    evaluator = Measured(config, run, attempt, LedgerSelector(Ledger("orchestrator")), make=make)
    worker = ScriptedWorker(attempt, reward_by_seed)
    running = [asyncio.create_task(part.run()) for part in (worker, evaluator)]
    if kill:
        [engine] = engines
        await asyncio.wait_for(supervisor.receive(), 20)  # it is connected
        await asyncio.wait_for(engine.has_worked.wait(), 20)
        engine.die()
        await supervisor.send("orchestrator", ProcessEnded(process="engine-0", why="killed"))
        await asyncio.sleep(0.05)
        await supervisor.send("orchestrator", ProcessStarted(process="engine-0", life=1))
        await asyncio.sleep(0.05)
        assert not running[1].done()
        engine.is_alive.set()
    await asyncio.wait_for(asyncio.gather(*running), 20)
    assert engines[0].labels == [0, 0][: 1 + kill]
    worker._channel.close()
    supervisor.close()
    [records] = read_results(run).values()
    assert {record.ending for record in records.values()} == {Ending.OK}
    return sorted((number, record.task.key, record.reward, record.seats) for number, record in records.items())


async def test_an_evaluation_whose_engine_is_killed_is_the_one_whose_engine_is_not(tmp_path):
    whole, killed = [await measure(tmp_path / name, kill=name == "killed") for name in ("whole", "killed")]
    assert len(whole) == 40
    assert killed == whole
