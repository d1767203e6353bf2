"""Frozen models: what is asked, how often, what becomes of the answers, and what an engine's failures cost."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest

from palestra.config.schema import Teacher
from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.core.ledger import Ledger
from palestra.core.records import Ending, RolloutRecord, Sample, Seat, Span, Task
from palestra.orchestrate.batcher import make_batch
from palestra.orchestrate.frozen import FrozenEngine, FrozenModels, frozen_metrics, require_same_tokens
from palestra.wire.policy import EngineError, UnreachableError
from palestra.wire.runlog import read_metrics
from tests.unit.core.clocks import LedgerClock
from tests.unit.orchestrate.scripted import GROUP_SIZE, GROUPS, Life, ScriptedEngine, make_config
from tests.unit.orchestrate.test_parts import RULES, group, record

NAN = float("nan")


def said(token_ids: list[int], salt: int) -> list[float]:
    """What the scripted frozen model thinks: depends on every token and its place, and on who is asked."""
    return [-0.1 * ((token_id + place + salt) % 9 + 1) for place, token_id in enumerate(token_ids)][1:]


class Asked(ScriptedEngine):
    """A frozen model. Keeps what it was asked."""

    def __init__(self, url: str, salt: int):
        super().__init__(url)
        self.salt, self.questions = salt, []

    async def score(self, token_ids, *, deadline_s=None):
        self.questions.append(list(token_ids))
        await asyncio.sleep(0)
        return said(token_ids, self.salt)


# --- the streams of a batch, by hand


def answers(*values: float) -> list[np.ndarray]:
    return [np.array([NAN, *values], np.float32)]


def test_the_reference_fills_its_two_streams_where_it_was_asked():
    members = [record(0, 1.0), record(1, 0.0)]  # a prompt of one token, two sampled ones with logprob -0.25
    logprobs = {"reference": {0: answers(-1.0, -2.0), 1: answers(-0.5, NAN)}}
    rules = dataclasses.replace(RULES, reference_weight=0.1)
    batch, _, _ = make_batch([group(0, members)], logprobs, step=0, attempt=1, rules=rules)
    np.testing.assert_allclose(batch.ref_weight, [0, 0.1, 0.1, 0, 0.1, 0])
    np.testing.assert_allclose(batch.reference_logprobs, [0, -1, -2, 0, -0.5, 0])
    np.testing.assert_allclose(batch.advantage, [0.5] * 3 + [-0.5] * 3)


@pytest.mark.parametrize(("reward_weight", "rewarded"), [(1.0, 0.5), (0.0, 0.0)])
def test_a_teacher_gives_every_token_an_advantage_of_its_own(reward_weight: float, rewarded: float):
    members = [record(0, 1.0), record(1, 0.0)]
    logprobs = {"teacher": {0: answers(-0.05, -1.25), 1: answers(-0.25, NAN)}}
    rules = dataclasses.replace(RULES, teacher_weight=2.0, reward_weight=reward_weight)
    batch, _, _ = make_batch([group(0, members)], logprobs, step=0, attempt=1, rules=rules)
    # the gaps -0.05 + 0.25 = 0.2, -1.25 + 0.25 = -1 and 0 have the mean -0.8 / 3; twice what is left is 2.8, -4.4, 1.6
    expected = np.array([0, 2.8, -4.4, 0, 1.6, 0]) / 3 + np.repeat([rewarded, -rewarded], 3)
    np.testing.assert_allclose(batch.advantage, expected, atol=1e-6)
    assert not batch.ref_weight.any()
    metrics = frozen_metrics(members, logprobs)
    assert metrics["frozen/teacher/kl"].value == pytest.approx((-0.2 + 1.0 + 0.0) / 3)


# --- one engine


class Failing:
    """Answers after `failures`, and only when it was found healthy in between."""

    def __init__(self, failures: list[Exception]):
        self.failures, self.healthy_waits, self.most, self.now = failures, 0, 0, 0
        self.lengths: list[int] = []

    async def score(self, token_ids, *, deadline_s):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        if self.failures:
            raise self.failures.pop(0)
        self.lengths.append(len(token_ids))
        return [-1.0] * (len(token_ids) - 1)

    async def wait_healthy(self, deadline_s):
        self.healthy_waits += 1


def engine(client, *, max_in_flight: int = 4, max_model_len: int = 8, turn_s: float = 20.0) -> FrozenEngine:
    return FrozenEngine(
        "reference-0",
        client,
        Ledger("reference-0"),
        max_in_flight=max_in_flight,
        max_model_len=max_model_len,
        call_s=20.0,
        healthy_s=20.0,
        turn_s=turn_s,
    )


def sample(size: int) -> Sample:
    return Sample(
        token_ids=list(range(size)),
        logprobs=[0.0] + [-0.5] * (size - 1),
        sampled=[0] + [1] * (size - 1),
        spans=(Span(0, 1, size),),
    )


async def test_an_engine_that_dies_is_asked_again_when_it_is_back():
    client = Failing([UnreachableError("cut off"), DeadlineError("an answer", 1.0), EngineError("failed")])
    assert (await engine(client).logprobs(sample(3))).tolist()[1:] == [-1.0, -1.0]
    assert client.healthy_waits == 3


async def test_an_engine_that_never_answers_ends_the_run_with_its_name():
    client = Failing([EngineError("out of memory")] * 9)
    with pytest.raises(InfrastructureError, match=r"reference-0 could not say .* 4 tries: out of memory; see logs/ref"):
        await engine(client).logprobs(sample(3))


async def test_a_sample_that_fills_the_context_lacks_the_last_answer_only():
    client = Failing([])
    answer = await engine(client, max_model_len=8).logprobs(sample(8))
    assert np.isnan(answer).tolist() == [True] + [False] * 6 + [True]
    assert client.lengths == [7]


async def test_no_more_than_max_in_flight_are_asked_at_once_and_the_ledger_says_so(monkeypatch):
    clock = LedgerClock(monkeypatch)

    class Working(Failing):
        async def score(self, token_ids, *, deadline_s):
            clock.burn(0.5)
            return await super().score(token_ids, deadline_s=deadline_s)

    client = Working([])
    one = engine(client, max_in_flight=3)
    await one.start()
    await asyncio.gather(*(one.logprobs(sample(4)) for _ in range(20)))
    assert client.most == 3
    entry = one.ledger.close()
    assert {"score", "idle"} <= entry.parts_s.keys()
    assert entry.wall_s == pytest.approx(20 * 0.5)
    assert entry.closure < 1e-9


class Silent(Failing):
    async def score(self, token_ids, *, deadline_s):
        await asyncio.Event().wait()


async def test_every_wait_ends_and_says_what_it_was_for():
    one = engine(Silent([]), max_in_flight=1, turn_s=0.02)
    first = asyncio.create_task(one.logprobs(sample(3)))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineError, match="a turn at reference-0"):
        await one.logprobs(sample(3))
    first.cancel()
    tasks = []
    models = FrozenModels(
        {"reference": engine(Silent([]))},
        lambda asking: tasks.append(asyncio.create_task(asking)) or tasks[-1],
        deadline_s=0.05,
    )
    with pytest.raises(DeadlineError, match="the answers of reference about 1 rollouts"):
        await models.wait([record(0, 1.0)])
    await asyncio.wait(tasks)
    assert "the answers of reference about rollout 0" in str(tasks[0].exception())


async def test_a_rollout_is_asked_about_once_and_can_be_forgotten():
    client = Failing([])
    models = FrozenModels({"reference": engine(client)}, asyncio.create_task, deadline_s=20.0)
    one, other = (
        RolloutRecord(
            rollout_id=i,
            environment="e",
            task=Task(),
            ending=Ending.OK,
            seats=(Seat(name="a", samples=(sample(3), sample(4))), Seat(name="b", samples=(sample(5),))),
        )
        for i in range(2)
    )
    models.begin([one, other])
    models.begin([one])
    assert not models.has_answers([one])
    models.forget([other.rollout_id])
    await models.wait([one])
    found = models.take([one])
    assert [len(answer) for answer in found["reference"][0]] == [3, 4, 5]  # seat after seat
    assert sorted(client.lengths) == [3, 4, 5]


async def test_without_frozen_models_nothing_happens():
    models = FrozenModels({}, asyncio.create_task, deadline_s=20.0)
    models.begin([record(0, 1.0)])
    assert models.has_answers([record(0, 1.0)])
    assert models.take([record(0, 1.0)]) == {}


# --- in the loop


def reward(rollout: RolloutRecord) -> float:
    return 0.0 if "task 1" in str(rollout.task.prompt) else float(sum(rollout.seats[0].samples[0].token_ids) % 3)


FROZEN = {"reference": {"path": "a", "weight": 0.1}, "teacher": {"path": "b", "weight": 2.0}}


def frozen_life(tmp_path, algo, **sections) -> Life:
    salts = {"http://engine-1": 3, "http://engine-2": 5}
    config = make_config(tmp_path, algo=algo, **sections)
    return Life(
        config,
        reward=reward,
        engine=lambda url: Asked(url, salts[url]) if url in salts else ScriptedEngine(url),
        num_engines=1 + len(config.algo.frozen),
    )


def samples_of(batch):
    for index, start in enumerate(batch.offsets[:-1]):
        yield slice(start, batch.offsets[index + 1]), batch.token_ids[start : batch.offsets[index + 1]].tolist()


async def test_every_sampled_token_of_every_batch_has_both_answers(tmp_path):
    life = frozen_life(tmp_path, FROZEN)
    await life.play()
    policy, reference, teacher = life.engines
    assert policy.calls
    assert not reference.calls
    assert not teacher.calls
    for batch in life.trainer.batches:
        opinions = np.concatenate([[0.0, *said(token_ids, 5)] for _, token_ids in samples_of(batch)])
        mean_gap = opinions[batch.rl_weight > 0].mean() + 0.5  # the policy's logprob is -0.5
        for where, token_ids in samples_of(batch):
            trained = batch.rl_weight[where] > 0
            expected = np.array([0.0, *said(token_ids, 3)], np.float32)
            np.testing.assert_allclose(batch.reference_logprobs[where], np.where(trained, expected, 0), atol=1e-6)
            np.testing.assert_allclose(batch.ref_weight[where], np.where(trained, 0.1, 0), atol=1e-6)
            gap = np.array([0.0, *said(token_ids, 5)]) + 0.5 - mean_gap
            from_reward = batch.advantage[where][0]
            np.testing.assert_allclose(batch.advantage[where], from_reward + np.where(trained, 2.0 * gap, 0), atol=1e-5)
    rows = [row for row in read_metrics(life.run) if "phase" not in row]
    assert all("frozen/reference/kl" in row and "frozen/teacher/kl" in row for row in rows)
    assert any("frozen/wait_s" in row for row in rows)
    assert {"engine-0", "reference-0", "teacher-0"} <= {
        json.loads(line)["process"] for line in life.run.ledger.read_text().splitlines()
    }


async def test_groups_without_signal_are_not_asked_about_and_the_others_once(tmp_path):
    life = frozen_life(tmp_path, {"reference": FROZEN["reference"]})
    await life.play()
    assert life.journal.state.counts["groups_zero_signal"] > 0
    closed_ready = life.journal.state.counts["groups_ready"]
    assert 6 * GROUPS * GROUP_SIZE <= len(life.engines[1].questions) <= closed_ready * GROUP_SIZE


async def test_with_a_teacher_a_group_of_equal_rewards_has_signal(tmp_path):
    life = frozen_life(tmp_path, {"teacher": FROZEN["teacher"] | {"replaces_reward": True}})
    await life.play()
    assert "groups_zero_signal" not in life.journal.state.counts
    for batch in life.trainer.batches:
        assert not batch.advantage[batch.rl_weight == 0].any()
        assert batch.advantage[batch.rl_weight > 0].any()


async def test_answers_that_a_kill_took_are_asked_for_again(tmp_path):
    sections = {"train": {"steps": 8, "checkpoint_every": 3}}
    for kill_after_s in (0.15, 0.3, None):
        life = frozen_life(tmp_path, {"reference": FROZEN["reference"]}, **sections)
        life.trainer._step_s = 0.02
        await life.play(kill_after_s=kill_after_s)
        for batch in life.trainer.batches:
            for where, token_ids in samples_of(batch):
                expected = np.where(batch.rl_weight[where] > 0, [0.0, *said(token_ids, 3)], 0)
                np.testing.assert_allclose(batch.reference_logprobs[where], expected, atol=1e-6)
    assert life.run.summary.exists()


# --- what is refused


def test_another_tokenizer_is_refused(tmp_path):
    for name, vocab in {"policy": {"a": 0}, "same": {"a": 0}, "other": {"b": 0}, "none": None}.items():
        (tmp_path / name).mkdir()
        if vocab is not None:
            (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    models = {name: Teacher(path=str(tmp_path / name), weight=1.0) for name in ("same", "other", "none")}
    require_same_tokens(str(tmp_path / "policy"), {"reference": models["same"], "teacher": models["none"]})
    with pytest.raises(UserError, match=r"algo\.teacher\.path=.*other tokens"):
        require_same_tokens(str(tmp_path / "policy"), {"teacher": models["other"]})


def test_answers_are_for_temperature_one(tmp_path):
    with pytest.raises(ValueError, match=r"sampling\.temperature=0\.7; set it to 1"):
        make_config(tmp_path, algo=FROZEN, sampling={"temperature": 0.7})
    make_config(tmp_path, sampling={"temperature": 0.7})


def test_a_teacher_needs_no_group(tmp_path):
    with pytest.raises(ValueError, match="no group to compare with"):
        make_config(tmp_path, algo={"group_size": 1})
    assert not make_config(tmp_path, algo={"group_size": 1, "teacher": FROZEN["teacher"]}).algo.filters_groups
