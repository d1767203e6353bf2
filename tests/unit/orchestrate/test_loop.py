"""The loop against scripted peers: counts, order, ages, kills. Laws, not shapes."""

import asyncio
import json
from collections import Counter

import msgspec
import numpy as np
import pytest

from palestra.core.errors import UserError
from palestra.core.metrics import Last
from palestra.core.records import Ending
from palestra.orchestrate.journal import recover
from palestra.wire.messages import Done, Notice
from palestra.wire.runlog import read_metrics, read_warnings
from tests.unit.orchestrate.scripted import (
    GROUP_SIZE,
    GROUPS,
    Life,
    ScriptedEngine,
    make_config,
    random_kill_s,
    reward_by_seed,
)


async def test_every_step_trains_full_batches_of_rollouts_that_never_repeat(tmp_path):
    life = Life(make_config(tmp_path), reward=reward_by_seed)
    await life.play()
    assert [step for step, _ in life.trainer.trained] == list(range(6))
    rollouts = [rollout for _, ids in life.trainer.trained for rollout in ids]
    assert len(rollouts) == 6 * GROUPS * GROUP_SIZE
    assert max(Counter(rollouts).values()) == 1
    summary = json.loads(life.run.summary.read_text())
    assert summary["steps"] == 6
    assert summary["publishes"] >= 2


async def test_advantages_of_a_group_sum_to_zero_and_weights_cover_sampled_tokens_only(tmp_path):
    life = Life(make_config(tmp_path), reward=reward_by_seed)
    await life.play()
    for batch in life.trainer.batches:
        first = batch.offsets[:-1]
        by_group: dict[int, float] = {}
        for rollout, advantage in zip(batch.rollout, batch.advantage[first], strict=True):
            by_group[int(rollout) // GROUP_SIZE] = by_group.get(int(rollout) // GROUP_SIZE, 0.0) + float(advantage)
        assert all(abs(total) < 1e-5 for total in by_group.values())
        assert set(batch.engine_logprobs[batch.rl_weight == 0]) == {0.0}
        assert set(batch.engine_logprobs[batch.rl_weight == 1]) == {-0.5}


async def test_routes_are_in_batches_of_runs_that_replay_them_and_not_in_what_people_read(tmp_path):
    """Joined and streamed replies, over a kill: the journal has their routes, too."""
    for replays in (True, False):
        config = make_config(tmp_path / str(replays), train={"router_replay": replays, "steps": 3})
        killed = Life(config, reward=reward_by_seed, step_s=0.02)
        await killed.play(kill_when=lambda trainer=killed.trainer: trainer.trained != [])
        life = Life(config, reward=reward_by_seed)
        await life.play()
        for batch in life.trainer.batches:
            assert batch.num_routed.tolist() == ((batch.lengths - 1).tolist() if replays else [])
            for sample in range(batch.num_samples * replays):
                begin, end = batch.offsets[sample], batch.offsets[sample + 1] - 1
                expected = np.stack([batch.token_ids[begin:end], batch.token_ids[begin:end] + 1], 1)[..., None]
                assert np.array_equal(batch.routes_of(sample), expected)
        lines = [line for path in life.run.rollouts.glob("*.jsonl") for line in path.read_text().splitlines()]
        routes = [json.loads(line)["seats"][0]["samples"][0]["routes"] for line in lines]
        assert routes
        assert all(data == "" for data, *_ in routes)


@pytest.mark.parametrize("max_age", [0, 1, 4])
async def test_no_rollout_trains_beyond_its_age_bound(tmp_path, max_age):
    config = make_config(tmp_path, algo={"groups_per_step": GROUPS, "group_size": GROUP_SIZE, "max_age": max_age})
    life = Life(config, reward=reward_by_seed, step_s=0.01)
    await life.play()
    for path in sorted(life.run.rollouts.glob("step-*.jsonl")):
        step = int(path.stem.removeprefix("step-"))
        for line in path.read_text().splitlines():
            spans = json.loads(line)["seats"][0]["samples"][0]["spans"]
            assert step - min(span[0] for span in spans) <= max_age


@pytest.mark.parametrize(("every", "pace_age", "oldest"), [(3, 0.0, 2), (3, 3.0, 3), (2, 4.0, 4)])
async def test_pacing_counts_what_is_trained_and_not_published(tmp_path, every, pace_age, oldest):
    """So many steps' worth are out, whether their weights wait to be computed or to be loaded: none gets too old."""
    algo = {"groups_per_step": 2, "group_size": GROUP_SIZE, "max_age": oldest, "pace_age": pace_age}
    config = make_config(tmp_path, algo=algo, sync={"every": every}, train={"steps": 18}, engine={"max_in_flight": 64})
    life = Life(config, reward=reward_by_seed, step_s=0.02)
    await life.play()
    ages = [row["age/max"] for row in read_metrics(life.run) if "age/max" in row]
    assert max(ages) == oldest
    assert len(ages) == 18
    counts = life.journal.state.counts
    assert (counts.get("rollouts_cut", 0), counts.get("groups_too_old", 0)) == (0, 0)


@pytest.mark.parametrize("waits", [True, False])
async def test_with_sync_wait_no_rollout_runs_while_weights_are_loaded(tmp_path, waits):
    class Engine(ScriptedEngine):
        running, at_pause = 0, []

        async def stream(self, *args, **kwargs):
            self.running += 1
            try:
                return await super().stream(*args, **kwargs)
            finally:
                self.running -= 1

        async def pause(self, **_):
            self.at_pause = [*self.at_pause, self.running]

    config = make_config(tmp_path, sync={"wait": waits}, engine={"join_max_tokens": 0})
    life = Life(config, reward=reward_by_seed, engine=lambda url: Engine(url, delay_s=lambda seed: seed % 5 * 0.01))
    await life.play()
    (engine,) = life.engines
    assert [step for step, _ in life.trainer.trained] == list(range(6))
    assert len(engine.at_pause) > 3
    assert (max(engine.at_pause) == 0) == waits


async def test_with_max_age_zero_two_runs_train_the_same_rollouts_in_the_same_order(tmp_path):
    trained = []
    for name in ("one", "two"):
        config = make_config(
            tmp_path,
            log={"name": name, "outputs": str(tmp_path)},
            algo={
                "groups_per_step": GROUPS,
                "group_size": GROUP_SIZE,
                "max_age": 0,
            },
        )
        delay = {"one": lambda seed: seed % 3 * 0.003, "two": lambda seed: seed % 5 * 0.002}[name]
        life = Life(config, reward=reward_by_seed, engine=lambda url, delay=delay: ScriptedEngine(url, delay_s=delay))
        await life.play()
        trained.append([(b.rollout.tolist(), b.token_ids.tolist(), b.advantage.tolist()) for b in life.trainer.batches])
    assert trained[0] == trained[1]


async def test_groups_without_signal_are_replaced_so_that_batches_stay_full(tmp_path):
    def reward(record):
        return 0.0 if "task 1" in str(record.task.prompt) else reward_by_seed(record)

    life = Life(make_config(tmp_path), reward=reward)
    await life.play()
    assert all(len(ids) == GROUPS * GROUP_SIZE for _, ids in life.trainer.trained)
    assert life.journal.state.counts["groups_zero_signal"] > 0


async def test_a_reward_that_raises_is_retried_then_masked_and_never_scored_zero(tmp_path):
    def reward(record):
        if sum(record.seats[0].samples[0].token_ids) % 5 == 0:
            raise RuntimeError("the reward raised")
        return reward_by_seed(record)

    life = Life(make_config(tmp_path), reward=reward)
    await life.play()
    counts = life.journal.state.counts
    assert counts["rollouts_retried"] >= 2 * counts["rollouts_invalid"] > 0  # env.retries is 2
    for path in life.run.rollouts.glob("step-*.jsonl"):
        assert all(json.loads(line)["ending"] == Ending.OK for line in path.read_text().splitlines())


@pytest.mark.parametrize("has_curriculum", [False, True])
async def test_an_environment_without_tasks_ends_the_run_before_an_engine_is_waited_for(tmp_path, has_curriculum):
    class NeverHealthy(ScriptedEngine):
        async def wait_healthy(self, deadline_s):
            await asyncio.sleep(deadline_s)

    env = {"curriculum": {"on": has_curriculum}}
    life = Life(make_config(tmp_path, env=env), reward=reward_by_seed, engine=NeverHealthy)
    life.worker.num_tasks = 0
    async with asyncio.timeout(10):
        with pytest.raises(ExceptionGroup) as ended:
            await life.play()
    assert ended.group_contains(UserError, match="'scripted' has no tasks")


async def test_a_stuck_rollout_is_cancelled_and_retried_after_no_progress(tmp_path):
    config = make_config(tmp_path, env={"mix": [{"id": "scripted"}], "stall_s": 60})
    life = Life(config, reward=reward_by_seed)
    pool, swallowed = life.loop.desk.pool, []
    handle = pool.handle

    def lose_one(peer, message):
        """A worker whose environment hangs: its first rollout never ends, and its time is up."""
        if type(message).__name__ == "Ended" and not swallowed:
            swallowed.append(message)
            asyncio.get_running_loop().call_soon(pool._stalled, message.record.rollout_id)
        else:
            handle(peer, message)

    pool.handle = lose_one
    await life.play()
    assert len(life.trainer.trained) == 6
    assert life.journal.state.counts["rollouts_retried"] == 1


@pytest.mark.parametrize("seed", range(8))
async def test_killed_at_random_moments_and_resumed_nothing_trains_twice(tmp_path, seed):
    """Several lives; the trainer's last word per step is what its weights hold."""
    config = make_config(
        tmp_path, train={"steps": 8, "max_pack_tokens": 64, "checkpoint_every": 3, "batch_deadline_s": 20}
    )
    final: dict[int, list[int]] = {}
    for life_number in range(6):
        kill = random_kill_s(100 * seed + life_number) if life_number < 5 else None
        life = Life(
            config, reward=reward_by_seed, engine=lambda url: ScriptedEngine(url, delay_s=lambda s: 0.004), step_s=0.01
        )
        await life.play(kill_after_s=kill)
        for step, ids in life.trainer.trained:
            assert final.setdefault(step, ids) == ids, "a step that is trained again trains the same rollouts"
        if life.run.summary.exists():
            break
    assert sorted(final) == list(range(8))
    rollouts = [rollout for ids in final.values() for rollout in ids]
    assert max(Counter(rollouts).values()) == 1
    assert len(rollouts) == 8 * GROUPS * GROUP_SIZE


async def test_rollouts_in_flight_at_a_kill_are_answered_from_the_journal(tmp_path):
    config = make_config(tmp_path)
    first = Life(config, reward=reward_by_seed, step_s=0.02)
    ended = first.loop.desk.pool.handle
    first.loop.desk.pool.handle = lambda peer, message: (
        None if type(message).__name__ == "Ended" else ended(peer, message)
    )

    def num_answered() -> int:
        return sum(len(replies) for replies in first.journal.state.replies.values())

    await first.play(kill_when=lambda: num_answered() == config.engine.max_in_flight)  # and no rollout could end
    answered = num_answered()
    assert answered == config.engine.max_in_flight
    second = Life(config, reward=reward_by_seed)
    asked = []
    call = second.loop.desk.gateway.call

    async def count(*args, **kwargs):
        asked.append(args)
        return await call(*args, **kwargs)

    second.loop.desk.gateway.call = count
    await second.play()
    assert second.worker.num_played == len(asked) + answered


async def test_a_warning_is_said_once_in_the_view_the_metrics_and_the_summary(tmp_path):
    life = Life(make_config(tmp_path), reward=reward_by_seed)
    life.trainer.metrics = lambda step: {"train/rl/effective_share": Last(0.2)}
    heard: list[Notice] = []

    async def view():
        message = None
        while not isinstance(message, Done):
            _, message = await life.supervisor.receive()
            heard.extend([message] if isinstance(message, Notice) else [])

    life.beside = [view]
    await life.play()
    (warning,) = read_warnings(life.run)
    assert (warning["rule"], warning["step"]) == ("effective_share", 4)  # five steps are enough
    assert json.loads(life.run.summary.read_text())["warnings"] == [warning]
    assert [notice.text for notice in heard] == [f"warning at step 4: {warning['text']}"]


async def test_groups_without_signal_are_a_share_of_each_step(tmp_path):
    def reward(record):
        return 0.0 if "task 1" in str(record.task.prompt) else reward_by_seed(record)

    for drops in (True, False):
        config = make_config(tmp_path, log={"name": str(drops)}, algo={"drop_zero_signal": drops})
        life = Life(config, reward=reward)
        await life.play()
        rows = read_metrics(life.run)
        shares = [row["groups/zero_signal_share"] for row in rows if "groups/zero_signal_share" in row]
        assert 0 <= min(shares) < max(shares) <= 1


async def test_equal_prompts_of_a_group_are_one_request(tmp_path):
    life = Life(make_config(tmp_path), reward=reward_by_seed)
    await life.play()
    assert len(life.engines[0].calls) >= 2 * life.engines[0].num_requests


async def test_state_is_its_journal(tmp_path):
    """Replaying the journal gives the state, to the byte."""
    life = Life(make_config(tmp_path), reward=reward_by_seed)
    await life.play()
    replayed = recover(life.run.journal, None)
    replayed.close()
    assert msgspec.msgpack.encode(replayed.state) == msgspec.msgpack.encode(life.journal.state)


async def test_an_engine_that_fails_its_publish_is_taken_out_and_the_last_one_stops_the_run(tmp_path):
    class Stale(ScriptedEngine):
        async def score(self, token_ids, *, deadline_s=None):
            return [-9.0] * (len(token_ids) - 1)

    life = Life(make_config(tmp_path), reward=reward_by_seed, engine=Stale)
    with pytest.raises(BaseExceptionGroup) as caught:
        await life.play()
    assert "version 0 reached none of 1 engines" in str(caught.value.exceptions[0])
    await asyncio.sleep(0)
