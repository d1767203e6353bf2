"""Peers of the real loop that only wait: engines as fast as a curve says, a trainer that takes a given time."""

import asyncio
import time
from pathlib import Path

import msgspec
import numpy as np

from palestra.core.ledger import LedgerEntry
from palestra.core.metrics import Sum
from palestra.core.records import Reply, RolloutRecord, Span
from palestra.launch.start import write_config
from palestra.orchestrate.simulate.curves import EngineCurve
from palestra.orchestrate.simulate.engine import Engine, Request
from palestra.orchestrate.simulate.measure import Measured, measured
from palestra.orchestrate.simulate.work import GroupWant, Want
from palestra.orchestrate.sources import seed_for
from palestra.wire.messages import StepTrained
from tests.unit.orchestrate.scripted import (
    PROMPT,
    Life,
    ScriptedEngine,
    ScriptedTrainer,
    ScriptedWorker,
    make_config,
    reward_by_seed,
)

CURVE = EngineCurve(concurrency=(1, 4, 16), tokens_per_s=(200, 600, 1000))
STOP_S, STEP_S = 0.06, 0.5


class PacedEngine(ScriptedEngine):
    """Requests share it as they share a simulated engine, on the wall clock."""

    def __init__(self, url: str):
        super().__init__(url)
        self._physics = Engine(CURVE)
        self._timer: asyncio.TimerHandle | None = None

    async def stream(self, token_ids, sampling, *, seed, silence_s, draft, cache_salt=None, stream_tokens=16):
        first, done = self.loaded, asyncio.get_running_loop().create_future()
        reply = self._of_length(seed, num_tokens(seed))
        self._physics.admit(
            time.monotonic(), Request(0, len(reply.token_ids), lambda _: None, lambda: done.set_result(0))
        )
        self._plan()
        await done
        rest = (Span(self.loaded, 1, len(reply.token_ids)),) if len(reply.token_ids) > 1 else ()
        return msgspec.structs.replace(reply, spans=(Span(first, 0, 1), *rest))

    def _of_length(self, seed: int, size: int) -> Reply:
        ids = [10 + (seed + i) % 7 for i in range(size)]
        return Reply(token_ids=ids, logprobs=[-0.5] * size, spans=(), finish_reason="stop")

    async def pause(self, **_):
        self._physics.hold(time.monotonic(), STOP_S)
        self._plan()

    async def update(self, *_, **__):
        await asyncio.sleep(STOP_S)

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if (end := self._physics.next_end()) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(end - time.monotonic(), 0), self._end)

    def _end(self) -> None:
        self._physics.end_next(time.monotonic()).ends()
        self._plan()


def num_tokens(seed: int) -> int:
    """Log-normal, with a tail."""
    return int(np.clip(np.rint(30 * np.exp(0.8 * np.random.default_rng(seed).standard_normal())), 1, 200))


class SameWork:
    """What the engine is going to sample for each group, as the simulator asks for it."""

    def __init__(self, config):
        self._seed, self._size = config.train.seed, config.algo.group_size

    def group(self, group_id: int, position: float) -> GroupWant:
        seeds = [seed_for(self._seed, group_id, 0) + member for member in range(self._size)]
        return GroupWant([Want(len(PROMPT), num_tokens(seed), 1, 0.0) for seed in seeds], trains=True)


class PacedWorker(ScriptedWorker):
    """Says when its rollouts ended."""

    def __init__(self, *args):
        super().__init__(*args)
        self._plays = _Timed()

    def _record(self, play, answer) -> RolloutRecord:
        wall_s = time.monotonic() - self._plays.began[play.rollout_id]
        record = super()._record(play, answer)
        return msgspec.structs.replace(record, wall_s=wall_s, engine_s=wall_s, ended_at=time.time())


class PacedTrainer(ScriptedTrainer):
    """Says what its time went into, and how much it trained."""

    async def _train(self, step: int, publish: bool, save: bool) -> None:
        batch, began = self._run.batches.read(step, attempt=self._attempt.number), time.time()
        await asyncio.sleep(STEP_S)
        self._version += 1
        wall_s = time.time() - began
        entry = LedgerEntry(
            process="trainer",
            started_at=began,
            wall_s=wall_s,
            parts_s={"forward_backward": wall_s},
        )
        metrics = {"train/tokens": Sum(batch.num_tokens)}
        await self._channel.send(StepTrained(step=step, metrics=metrics, ledgers=[entry]))
        if publish:
            await self._stage()


class _Timed(dict):
    def __init__(self):
        super().__init__()
        self.began: dict[int, float] = {}

    def __setitem__(self, key, value):
        self.began[key] = time.monotonic()
        super().__setitem__(key, value)


def config_of(outputs: Path, *, steps: int, engines: int = 1, **algo):
    return make_config(
        outputs,
        algo={"groups_per_step": 4, "group_size": 4, "drop_zero_signal": False, **algo},
        sampling={"max_tokens": 200},
        train={"steps": steps, "max_pack_tokens": 256, "checkpoint_every": 1000},
        engine={"max_model_len": 256, "max_in_flight": 64, "join_max_tokens": 0, "replicas": engines},
    )


async def really(config) -> Measured:
    """What the loop's own code does with them."""
    life = Life(config, reward=reward_by_seed, engine=PacedEngine, num_engines=config.engine.replicas)
    write_config(life.run, config)
    life.worker._channel.close()
    life.worker = PacedWorker(life.attempt, reward_by_seed)
    life.trainer._channel.close()
    life.trainer = PacedTrainer(life.run, life.attempt, version=0)
    await life.play()
    return measured(life.run)
