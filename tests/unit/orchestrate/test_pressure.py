"""Engines that report pressure, in the real loop: who is held back, what is told, and ages as foretold."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from palestra.core.errors import DeadlineError
from palestra.core.ledger import Ledger
from palestra.orchestrate.fleet import EngineLink
from palestra.orchestrate.pacing import kept_share, predicted_age
from palestra.orchestrate.pressure import _Gauge
from palestra.orchestrate.state import Group, GroupStatus, LoopState
from palestra.wire.policy import EngineLoad, RefusedError
from tests.unit.orchestrate.scripted import GROUP_SIZE, GROUPS, Life, ScriptedEngine, make_config, reward_by_seed

CALM = EngineLoad(
    running=0, waiting=0, kv_use=0.0, preemptions=0, prompt_tokens=0, sampled_tokens=0, safe_requests=1000.0
)
QUICK = {"max_model_len": 64, "max_in_flight": 8, "load_every_s": 0.005, "join_max_tokens": 0}


def reports(**gauges: Any) -> EngineLoad:
    return msgspec.structs.replace(CALM, **gauges)


class Pressed(ScriptedEngine):
    """Reports `gauges`, and knows how many requests it ever had at once."""

    gauges = CALM

    def __init__(self, url: str):
        super().__init__(url, delay_s=lambda seed: 0.004)
        self.now = self.most = 0

    async def stream(self, *args, **kwargs):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await super().stream(*args, **kwargs)
        finally:
            self.now -= 1

    async def load(self, *, deadline_s=None):
        return self.gauges


def pressed(gauges: EngineLoad) -> type[Pressed]:
    return type("Reporting", (Pressed,), {"gauges": gauges})


async def play(tmp_path, engine: type[ScriptedEngine], **sections: dict) -> Life:
    life = Life(make_config(tmp_path, engine=QUICK, **sections), reward=reward_by_seed, engine=engine)
    await life.play()
    return life


def rows(life: Life) -> list[dict]:
    return [json.loads(line) for line in life.run.metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    ("gauges", "most"),
    [
        (CALM, 8),
        (reports(safe_requests=3.5), 3),
        (reports(kv_use=0.95, safe_requests=None), 1),
        (reports(kv_use=0.95), 8),
        (reports(kv_use=0.95, safe_requests=3.5), 3),
    ],
)
async def test_the_dispatcher_holds_back_as_far_as_the_engine_reports_pressure(tmp_path, gauges, most):
    life = await play(tmp_path, pressed(gauges))
    assert life.engines[0].most == most  # type: ignore[attr-defined]
    assert all(len(ids) == GROUPS * GROUP_SIZE for _, ids in life.trainer.trained)


async def test_the_brake_is_let_go_when_the_pressure_ends_and_the_run_is_told(tmp_path):
    class Relieved(Pressed):
        readings = 0

        async def load(self, *, deadline_s=None):
            self.readings += 1
            kv_use = 0.95 if self.readings < 10 else 0.2
            return reports(kv_use=kv_use, preemptions=self.readings, waiting=2, safe_requests=None)

    life = await play(tmp_path, Relieved)
    assert life.engines[0].most == 8  # type: ignore[attr-defined]
    told = rows(life)
    assert all(row["engine/limit"] == 8 for row in told)
    preempted = sum(row["engine/preemptions"] for row in told)
    assert 0 < preempted <= life.engines[0].readings - 1  # type: ignore[attr-defined]
    read = [row for row in told if "engine/kv_use" in row]
    assert read[0]["engine/kv_use_max"] == 0.95
    assert {row["engine/waiting"] for row in read} == {2.0}
    assert all(0 <= row["rollout/in_flight"] <= 8 for row in told)


class Mute(Pressed):
    """Braked by its first reading, and then not to be read."""

    failure: Exception = RefusedError("no such route")

    def __init__(self, url: str):
        super().__init__(url)
        self.readings = 0

    async def load(self, *, deadline_s=None):
        self.readings += 1
        if self.readings > 1:
            raise self.failure
        return reports(kv_use=0.95, safe_requests=None)


async def test_an_engine_that_cannot_be_read_gets_the_most_and_no_run_ends_by_it(tmp_path):
    life = await play(tmp_path, Mute)
    assert life.engines[0].most == 8  # type: ignore[attr-defined]
    assert len(life.trainer.trained) == 6


async def test_an_engine_that_is_too_busy_to_answer_stays_braked(tmp_path):
    life = await play(tmp_path, type("Busy", (Mute,), {"failure": DeadlineError("/metrics", 5.0)}))
    assert life.engines[0].most == 1  # type: ignore[attr-defined]
    assert len(life.trainer.trained) == 6


async def test_at_age_zero_pressure_changes_nothing_that_trains(tmp_path):
    trained = []
    for name, gauges in (
        ("calm", CALM),
        ("pressed", reports(safe_requests=2.0)),
        ("braked", reports(kv_use=0.95, safe_requests=None)),
    ):
        log = {"name": name, "outputs": str(tmp_path)}
        algo = {"groups_per_step": GROUPS, "group_size": GROUP_SIZE, "max_age": 0}
        life = await play(tmp_path, pressed(gauges), log=log, algo=algo)
        trained.append([(b.rollout.tolist(), b.token_ids.tolist(), b.advantage.tolist()) for b in life.trainer.batches])
        summary = json.loads(life.run.summary.read_text())
        assert summary["mean_age"] == summary["predicted_mean_age"] == 0
    assert trained[0] == trained[1] == trained[2]


# --- gauges


def make_gauge() -> tuple[EngineLink, _Gauge]:
    link = EngineLink("engine-0", ScriptedEngine("http://e"), Ledger("engine-0"))  # type: ignore[arg-type]
    return link, _Gauge(link, most=256)


def test_preemptions_are_counted_from_reading_to_reading_through_a_restart():
    _, gauge = make_gauge()
    counted = [gauge.take(reports(preemptions=count)) for count in (7, 10, 10)]
    assert counted == [0, 3, 0]
    gauge.forget()
    assert [gauge.take(reports(preemptions=count)) for count in (2, 6)] == [0, 4]
    assert gauge.take(reports(preemptions=1)) == 0, "restarted unnoticed"


@pytest.mark.parametrize("read_at", ["before the stop", "stopped", "preempted", "going on"])
def test_what_a_publish_preempts_to_prefill_it_again_cuts_nothing(read_at: str):
    """Whenever readings fall; the last one sees what is left to see."""
    link, gauge = make_gauge()
    gauge.take(reports(safe_requests=100.0))
    link.sessions, preemptions = 100, 0
    for moment in ("before the stop", "stopped", "preempted", "going on"):
        if moment in ("stopped", "going on"):
            link.stop(moment == "stopped", refills=True)
        preemptions = 100 if moment in ("preempted", "going on") else 0
        if read_at == moment:
            gauge.take(reports(preemptions=preemptions))
    gauge.take(reports(preemptions=100))
    assert gauge.admission is not None
    assert gauge.admission.limit == 100


def test_as_many_without_a_publish_cut_the_limit():
    """Control for the test above."""
    link, gauge = make_gauge()
    gauge.take(reports(safe_requests=100.0))
    link.sessions = 100
    assert gauge.take(reports(preemptions=100)) == 100
    assert gauge.admission is not None
    assert gauge.admission.limit == 80


# --- ages


def make_state(*statuses: GroupStatus, next_step: int, **counts: int) -> LoopState:
    state = LoopState(next_step=next_step, counts=counts)
    for number, status in enumerate(statuses):
        state.groups[number] = Group(group_id=number, source="", task=None, size=1, status=status)  # type: ignore[arg-type]
    return state


def test_the_age_foretold_is_the_step_of_its_batch_less_the_version_that_samples():
    ready, opened = GroupStatus.READY, GroupStatus.OPEN
    state = make_state(ready, ready, opened, opened, opened, next_step=7)
    ages = [predicted_age(state, group, groups_per_step=2, loaded=6) for group in range(5)]
    assert ages == [1, 1, 2, 2, 3]  # steps 7, 7, 8, 8, 9 by version 6
    half = make_state(*[opened] * 5, next_step=7, groups_ready=3, groups_zero_signal=2, groups_all_invalid=1)
    assert kept_share(half) == 0.5
    assert [predicted_age(half, group, groups_per_step=2, loaded=6) for group in range(5)] == [1, 1, 1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("pace_age", [0.5, 1.0, 2.0])
async def test_the_age_measured_is_the_age_foretold(tmp_path, pace_age: float):
    algo = {"groups_per_step": 4, "group_size": GROUP_SIZE, "max_age": 8, "pace_age": pace_age}
    train = {"steps": 30, "max_pack_tokens": 64, "checkpoint_every": 50, "batch_deadline_s": 20}
    engine = {**QUICK, "max_in_flight": 64}
    config = make_config(tmp_path, algo=algo, train=train, engine=engine)
    life = Life(config, reward=reward_by_seed, engine=pressed(CALM), step_s=0.03)
    await life.play()
    summary = json.loads(life.run.summary.read_text())
    print(pace_age, summary["mean_age"], summary["predicted_mean_age"])
    assert summary["predicted_mean_age"] == pytest.approx(summary["mean_age"], rel=0.15, abs=0.1)
    assert all(row["age/max"] <= 8 for row in rows(life))
    await asyncio.sleep(0)
