"""Engines join, leave and take new versions while the run goes on."""

import asyncio
from collections.abc import Callable

import pytest

from palestra.wire.messages import ProcessEnded, ProcessStarted
from tests.unit.orchestrate.scripted import Life, ScriptedEngine, make_config, reward_by_seed, until

ENGINE = {"max_model_len": 64, "max_in_flight": 8, "join_max_tokens": 0}
TRAIN = {"steps": 14, "max_pack_tokens": 64, "checkpoint_every": 50, "batch_deadline_s": 20}


class Watched(ScriptedEngine):
    """Takes a moment to load; knows which versions it was given, and what others did meanwhile."""

    def __init__(self, url: str, fleet: list["Watched"]):
        super().__init__(url, delay_s=lambda seed: 0.004)
        self.fleet = fleet
        self.given: list[int] = []
        self.is_paused = False
        self.most_paused = self.answered_meanwhile = 0

    async def pause(self, *, clear_cache, deadline_s=None):
        self.is_paused = True

    async def update(self, directory, version, *, local="", deadline_s=None):
        self.most_paused = max(self.most_paused, sum(other.is_paused for other in self.fleet))
        before = self._answered_by_others()
        await asyncio.sleep(0.01)
        self.answered_meanwhile += self._answered_by_others() - before

    def _answered_by_others(self) -> int:
        return sum(len(other.calls) for other in self.fleet if other is not self)

    async def finish(self, version, *, deadline_s=None):
        await super().finish(version, deadline_s=deadline_s)
        self.given.append(version)

    async def resume(self, *, deadline_s=None):
        self.is_paused = False


def make_life(tmp_path, *, num_engines: int, at_once: int = 1) -> tuple[Life, list[Watched]]:
    config = make_config(tmp_path, engine={**ENGINE, "replicas": num_engines}, train=TRAIN, sync={"at_once": at_once})
    engines: list[Watched] = []

    def make(url: str) -> Watched:
        engines.append(Watched(url, engines))
        return engines[-1]

    return Life(config, reward=reward_by_seed, engine=make, num_engines=num_engines, step_s=0.02), engines


class Gate:
    """Before every step of a trainer; open at first. `at_step` while it trains one."""

    def __init__(self, life: Life):
        self._open, self.at_step, self._train = asyncio.Event(), False, life.trainer._train
        self._open.set()
        life.trainer._train = self._train_behind_it  # type: ignore[method-assign]

    async def _train_behind_it(self, step: int, publish: bool, save: bool) -> None:
        await self._open.wait()
        self.at_step = True
        await self._train(step, publish, save)
        self.at_step = False

    async def close(self, has_settled: Callable[[], bool]) -> None:
        self._open.clear()
        await until(lambda: not self.at_step and has_settled())

    def open(self) -> None:
        self._open.set()


async def until_step(life: Life, step: int) -> None:
    while life.loop.desk.trainer.trained < step:
        await life.loop.desk.changed.wait(f"step {step}")


async def test_an_engine_leaves_and_joins_from_the_current_version_while_the_run_goes_on(tmp_path):
    life, (stays, leaves) = make_life(tmp_path, num_engines=2)
    given_before, version_at_return, gate = 0, -1, Gate(life)

    async def supervise() -> None:
        nonlocal given_before, version_at_return
        await until_step(life, 3)
        await life.supervisor.send("orchestrator", ProcessEnded(process="engine-1", why="killed"))
        await until_step(life, 7)
        await gate.close(lambda: stays.loaded == life.trainer._version)
        given_before, version_at_return = len(leaves.given), stays.loaded
        await life.supervisor.send("orchestrator", ProcessStarted(process="engine-1", life=1))
        await until(lambda: len(leaves.given) > given_before)
        gate.open()

    supervising = asyncio.create_task(supervise())
    await life.play()
    await supervising
    assert [step for step, _ in life.trainer.trained] == list(range(14))
    assert {life.journal.state.counts.get(f"rollouts_{what}", 0) for what in ("invalid", "retried")} == {0}
    after = leaves.given[given_before:]
    assert after[0] == version_at_return, "the version of the others"
    assert not set(range(5, version_at_return)) & set(leaves.given), "versions it was away for are not made up for"
    assert after == sorted(set(after))
    away = [version for _, version in leaves.calls if 4 < version < version_at_return]
    assert not away
    assert max(version for _, version in leaves.calls) > version_at_return, "it works again"


@pytest.mark.parametrize("at_once", [1, 3])
async def test_versions_go_to_so_many_engines_at_a_time_while_the_others_generate(tmp_path, at_once: int):
    life, engines = make_life(tmp_path, num_engines=3, at_once=at_once)
    await life.play()
    assert max(engine.most_paused for engine in engines) == at_once
    assert all(engine.given == sorted(engine.given) and len(engine.given) > 3 for engine in engines)
    if at_once == 1:
        assert sum(engine.answered_meanwhile for engine in engines) > 10
