"""Evaluations in the loop: when they run, what they withhold, what a kill does to them; and engines taken out."""

import asyncio
import json

import pytest

from palestra.orchestrate import measure
from tests.unit.orchestrate.scripted import Life, ScriptedEngine, make_config, reward_by_seed

pytestmark = pytest.mark.slow

SETS = {"sets": [{"id": "scripted", "name": "held-out", "num_tasks": 5, "temperature": 1.0}]}


class SlowToStart(ScriptedEngine):
    async def wait_healthy(self, deadline_s):
        await asyncio.sleep(0.5)


def summary_of(life: Life) -> dict:
    return json.loads(life.run.summary.read_text())


async def test_before_and_after_are_measured_on_the_first_and_the_last_version(tmp_path):
    life = Life(make_config(tmp_path, eval=SETS), reward=reward_by_seed)
    await life.play()
    summary = summary_of(life)
    assert [(e["when"], e["versions"], e["rollouts"]) for e in summary["evals"]] == [("start", [0], 5), ("end", [6], 5)]
    assert summary["reward_before"] == summary["reward_after"]  # the scripted engine answers by seed, and seeds repeat
    assert (life.run.rollouts / "eval-held-out-v000006.jsonl").exists()


async def test_the_first_evaluation_withholds_publishes_and_training_goes_on(tmp_path):
    """Its tokens are all of version 0, although the trainer made newer versions meanwhile."""
    slow = {"sets": [{**SETS["sets"][0], "num_tasks": 30}]}
    life = Life(
        make_config(tmp_path, eval=slow),
        reward=reward_by_seed,
        engine=lambda url: ScriptedEngine(url, delay_s=lambda seed: 0.05),
    )
    await life.play()
    assert summary_of(life)["evals"][0]["versions"] == [0]


async def test_the_trainer_hears_of_evaluations_that_outlast_its_deadline(tmp_path, monkeypatch):
    """It waits for weights to be loaded, or for its end, and would take the silence for a dead orchestrator."""
    monkeypatch.setattr(measure, "_OF_A_DEADLINE", 0.01)
    slow = {"sets": [{**SETS["sets"][0], "num_tasks": 64}]}
    train = {"steps": 6, "max_pack_tokens": 64, "checkpoint_every": 2, "batch_deadline_s": 20}
    config = make_config(tmp_path, eval=slow, train=train)
    life = Life(
        config, reward=reward_by_seed, engine=lambda url: ScriptedEngine(url, delay_s=lambda seed: 0.1 + seed % 9 / 30)
    )
    await life.play()
    assert life.trainer.heard_evaluating >= 4  # two of them, of a second and more, with a word every 0.2 s


async def test_every_n_versions_although_some_are_skipped(tmp_path):
    life = Life(make_config(tmp_path, eval={**SETS, "every": 2, "pinned": True}), reward=reward_by_seed, step_s=0.05)
    await life.play()
    during = [e["version"] for e in summary_of(life)["evals"] if e["when"] == "during"]
    assert len(during) >= 2
    assert during == sorted(set(during))


@pytest.mark.parametrize("pinned", [False, True])
async def test_with_sync_wait_an_evaluation_lets_publishes_through_unless_it_is_pinned(tmp_path, pinned):
    """A publish waits for the rollouts that run; the others of an evaluation wait for it."""
    sets = {"sets": [{**SETS["sets"][0], "num_tasks": 48, "start": False, "end": False}], "every": 1, "pinned": pinned}
    config = make_config(tmp_path, eval=sets, sync={"wait": True})
    life = Life(
        config, reward=reward_by_seed, engine=lambda url: ScriptedEngine(url, delay_s=lambda seed: 0.02 + seed % 7 / 50)
    )
    await life.play()
    during = [e["versions"] for e in summary_of(life)["evals"] if e["when"] == "during"]
    assert any(len(versions) > 1 for versions in during) is not pinned


async def test_a_set_that_wants_no_start_is_still_measured_at_the_end(tmp_path):
    sets = {"sets": [{**SETS["sets"][0], "start": False}]}
    life = Life(make_config(tmp_path, eval=sets), reward=reward_by_seed)
    await life.play()
    assert [e["when"] for e in summary_of(life)["evals"]] == ["end"]


async def test_killed_during_the_first_evaluation_it_is_measured_again_on_version_zero(tmp_path):
    many = {"sets": [{**SETS["sets"][0], "num_tasks": 256}]}  # 64 rounds of 0.2 s
    train = {"steps": 6, "max_pack_tokens": 64, "checkpoint_every": 50, "batch_deadline_s": 20}
    config = make_config(tmp_path, eval=many, train=train)
    slow = Life(config, reward=reward_by_seed, engine=lambda url: ScriptedEngine(url, delay_s=lambda seed: 0.2))
    await slow.play(kill_when=lambda: slow.journal.state.next_step >= 2)
    assert not slow.journal.state.evals
    second = Life(config, reward=reward_by_seed, engine=SlowToStart)  # the trainer has caught up before it is there
    await second.play()
    assert [(e["when"], e["versions"]) for e in summary_of(second)["evals"]] == [("start", [0]), ("end", [6])]


async def test_one_of_two_engines_fails_its_publish_and_the_run_goes_on_without_it(tmp_path):
    """Its calls are asked again on the other one: no rollout is invalid or retried for it."""

    class FailsLater(ScriptedEngine):
        async def score(self, token_ids, *, deadline_s=None):
            wrong = self.url.endswith("0") and self.loaded >= 2
            return [-9.0 if wrong else -1.0] * (len(token_ids) - 1)

    config = make_config(tmp_path, engine={"max_model_len": 64, "max_in_flight": 8, "replicas": 2})
    life = Life(
        config, reward=reward_by_seed, engine=lambda url: FailsLater(url, delay_s=lambda s: 0.01), num_engines=2
    )
    await life.play()
    assert [step for step, _ in life.trainer.trained] == list(range(6))
    assert life.journal.state.counts.get("rollouts_invalid", 0) == 0
    assert life.journal.state.counts.get("rollouts_retried", 0) == 0
    failed, well = life.engines
    assert max(version for _, version in failed.calls) <= 2 < max(version for _, version in well.calls)
