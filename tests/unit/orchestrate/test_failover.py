"""Processes that die while the loop runs: nothing finished is lost, nothing trained twice, versions never go back."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from palestra.core.records import Ending
from palestra.orchestrate.fleet import EngineState
from palestra.orchestrate.state import BatchShipped, Event, GroupClosed, Published, RolloutEnded, RolloutRetried
from palestra.wire.framelog import read_frames
from palestra.wire.messages import Done, Exported, Play, ProcessStarted
from palestra.wire.policy import EngineError, UnpublishedError, UnreachableError
from tests.unit.orchestrate.mortal import MortalRun
from tests.unit.orchestrate.scripted import GROUP_SIZE, GROUPS, make_config, reward_by_seed

pytestmark = pytest.mark.slow

STEPS = 8
TRAIN = {"steps": STEPS, "max_pack_tokens": 64, "checkpoint_every": 3, "batch_deadline_s": 20}


def config_of(tmp_path, **sections):
    return make_config(tmp_path, train=TRAIN, **sections)


def events_of(run: MortalRun) -> list[Event]:
    frames = [frame for path in sorted(run.run.journal.glob("*.frames")) for frame in read_frames(path)]
    return [msgspec.msgpack.decode(frame, type=Event) for frame in frames]


def require_whole(run: MortalRun, steps: int = STEPS) -> None:
    """Every step is in the final weights once, with full batches of rollouts that never repeat; versions go up."""
    assert [step for step, _ in run.trainer.trained] == list(range(steps))
    rollouts = [rollout for _, ids in run.trainer.trained for rollout in ids]
    assert len(rollouts) == steps * GROUPS * GROUP_SIZE
    assert max(Counter(rollouts).values()) == 1
    events = events_of(run)
    shipped = [event for event in events if isinstance(event, BatchShipped)]
    assert [event.step for event in shipped] == list(range(steps))
    assert [sorted(event.rollout_ids) for event in shipped] == [ids for _, ids in run.trainer.trained]
    ended = Counter(event.record.rollout_id for event in events if isinstance(event, RolloutEnded))
    assert max(ended.values()) == 1
    assert set(rollouts) <= set(ended)
    published = [event.version for event in events if isinstance(event, Published)]
    assert published == sorted(published)
    for server in run.servers.values():
        assert server.history == sorted(server.history)
    assert json.loads(run.run.summary.read_text())["steps"] == steps


class NthTask:
    """Whether a rollout is of the n-th task that is played."""

    def __init__(self, n: int):
        self._n = n
        self.seen: list[str] = []

    def __call__(self, play: Play) -> bool:
        if str(play.task.prompt) not in self.seen:
            self.seen.append(str(play.task.prompt))
        return self.seen.index(str(play.task.prompt)) == self._n - 1


async def test_nobody_dies(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        pass
    require_whole(run)
    assert run.history == sorted(set(run.history)), "nothing is published twice"
    first, second = run.trainer.trained[:2]  # controls: planted faults are seen
    for planted in ([first, first, *run.trainer.trained[2:]], run.trainer.trained[1:], [(0, second[1]), second]):
        run.trainer.trained, kept = planted, run.trainer.trained
        with pytest.raises(AssertionError):
            require_whole(run)
        run.trainer.trained = kept
    run.history.append(0)
    with pytest.raises(AssertionError):
        require_whole(run)


async def test_a_worker_that_dies_takes_nothing_with_it(tmp_path):
    config = config_of(tmp_path, env={"mix": [{"id": "scripted"}], "stall_s": 60, "workers": 2})
    async with MortalRun(config, reward=reward_by_seed) as run:
        for step in (1, 3):
            await run.until(lambda step=step: run.state.next_step > step, f"step {step}")
            await run.replace("env-1")
        await run.until(lambda: run.state.next_step > 5, "step 5")
        await run.kill("env-0")  # for good: the other one does its work
    require_whole(run)
    events = events_of(run)
    assert not [event for event in events if isinstance(event, RolloutRetried)], "a death is no rollout's fault"
    assert all(event.record.ending == Ending.OK for event in events if isinstance(event, RolloutEnded))


async def test_rollouts_of_the_only_worker_wait_for_its_successor(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.state.next_step > 1, "step 1")
        await run.kill("env-0")
        await run.until(lambda: run.loop.desk.pool.names == [], "word of its death")
        for _ in range(10):  # what ended before it is in the journal
            await asyncio.sleep(0)
        before = len(events_of(run))
        await asyncio.sleep(0.2)
        assert not [event for event in events_of(run)[before:] if isinstance(event, RolloutEnded)]
        await run.restart("env-0")
    require_whole(run)


async def test_a_dead_workers_rollouts_are_answered_from_the_journal(tmp_path):
    """Its successor asks for the same replies, and no engine is asked again for those that were there."""

    config = config_of(tmp_path, engine={"max_model_len": 64, "max_in_flight": 8, "join_max_tokens": 0})
    async with MortalRun(config, reward=reward_by_seed) as run:
        await run.until(lambda: run.state.next_step > 1, "step 1")
        await run.kill("env-0")
        await run.until(
            lambda: not any(link.in_flight for link in run.loop.desk.fleet.links), "the engine's last reply"
        )
        journalled = sum(len(replies) for replies in run.state.replies.values())
        seeds = Counter(seed for seed, _ in run.servers["http://engine-0"].calls)
        await run.restart("env-0")
    require_whole(run)
    assert max(seeds.values()) == 1
    again = Counter(seed for seed, _ in run.servers["http://engine-0"].calls)
    assert journalled == 0 or max(again[seed] for seed in seeds) <= 2


async def test_the_trainer_dies_and_trains_again_what_its_checkpoint_lacks(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= 5, "version 5")
        await run.replace("trainer")
        await run.until(lambda: run.trainer.trained[:1] != [] and run.loop.desk.trainer.trained >= 0, "its successor")
        assert len(run.trainer.trained) >= 3, "it began at the checkpoint of version 3"
    require_whole(run)
    assert run.history == sorted(set(run.history)), "what engines serve is not published again"


@pytest.mark.parametrize("at", [0, 1, 4])
async def test_the_orchestrator_dies_and_its_successor_goes_on(tmp_path, at: int):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= at, f"version {at}")
        loaded, before = run.history[-1], run.loop
        await run.replace("orchestrator")
        await run.until(
            lambda: run.loop is not before and run.loop.desk.trainer.loaded >= 0, "the engines to be adopted"
        )
        assert run.history.count(loaded) >= 2 or run.history[-1] > loaded, "engines proved what they hold"
    require_whole(run)
    rows = [json.loads(line) for line in run.run.metrics.read_text().splitlines()]
    assert {row["step"] for row in rows} == set(range(STEPS))


async def test_an_engine_that_dies_comes_back_with_the_version_of_the_others(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed, num_engines=2) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= 2, "version 2")
        await run.kill("engine-0")
        await run.until(lambda: run.loop.desk.trainer.loaded >= 4, "version 4 in the other engine")
        loaded = run.history[-1]
        await run.restart("engine-0")
        await run.until(lambda: run.history[-1] > loaded, "it to be back")
        assert run.history[-1] >= 4
    require_whole(run)
    assert run.restarts == [], "the supervisor knew"


async def replaced_while_it_is_published_to(run: MortalRun, name: str, failure: Exception) -> None:
    """The publish of version 2 to this engine goes on for a while after another took its place, and fails."""
    server, hung = run.engines[name], asyncio.Event()
    score = server.score

    async def fails_late(token_ids, *, deadline_s=None):
        if server.loaded == 2 and not hung.is_set():
            hung.set()
            await asyncio.sleep(0.3)
            raise failure
        return await score(token_ids, deadline_s=deadline_s)

    server.score = fails_late
    await asyncio.wait_for(hung.wait(), 20)
    await run.replace(name)


async def test_what_a_publish_says_of_a_dead_engine_does_not_end_its_successor(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed, num_engines=2) as run:
        await replaced_while_it_is_published_to(run, "engine-1", UnreachableError("nobody answered any more"))
    require_whole(run)
    assert [restart for restart in run.restarts if restart.life > 0] == []  # its own death may be noticed twice


async def test_a_publish_that_goes_on_at_the_successor_of_the_only_engine_ends_no_run(tmp_path):
    """The successor refuses the half that it gets: as the last engine's failure that would be the end."""
    refusal = EngineError("an update is one start, one whole version, one finish")
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await replaced_while_it_is_published_to(run, "engine-0", refusal)
    require_whole(run)


@pytest.mark.parametrize("was_replaced", [False, True])
async def test_an_engine_that_a_dead_orchestrator_left_in_the_middle_of_a_publish_is_of_use(tmp_path, was_replaced):
    """Also one that is not in its first life, of which the successor hears when it hears how things stand."""
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= 2, "version 2")
        if was_replaced:
            await run.replace("engine-0")
            await run.until(lambda: run.loop.desk.trainer.loaded >= 4, "version 4 in its successor")
        await run.kill("orchestrator")
        server = run.engines["engine-0"]
        server.is_updating = True  # it refuses to start another
        server.wait_healthy = lambda deadline_s: asyncio.sleep(0.2)  # longer than it takes to hear of it
        await run.restart("orchestrator")
    require_whole(run)
    assert run.restarts == [], "it need not be started again"


async def test_an_engine_that_a_dead_orchestrator_left_and_that_fails_its_proof_is_started_again(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= 2, "version 2")
        await run.kill("orchestrator")
        [server] = run.servers.values()
        server.fails_at = 2  # whatever is published first
        server.finish, finish = lambda version, **_: finish(2), server.finish  # type: ignore[method-assign]
        await run.restart("orchestrator")
        await run.until(lambda: len(run.restarts) == 1, "the orchestrator to ask for another engine")
        server.fails_at = None
        server.finish = finish  # type: ignore[method-assign]
    require_whole(run)


async def test_an_engine_that_a_dead_orchestrator_left_and_that_fails_is_started_again(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= 2, "version 2")
        await run.kill("orchestrator")
        [server] = run.servers.values()

        async def fails(**_):
            del server.pause
            raise EngineError("the engine core is dead")

        server.pause = fails
        await run.restart("orchestrator")
    require_whole(run)
    assert [(restart.process, restart.why) for restart in run.restarts] == [("engine-0", "the engine core is dead")]


@pytest.mark.parametrize("failure", [None, UnpublishedError("labels its tokens 'default'")])
async def test_one_that_is_replaced_while_it_joins_does_not_serve_before_it_has_weights(tmp_path, failure):
    """The last word of a publish, asked of the dead one, is answered by the one that took its place."""
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed, num_engines=2) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= 1, "version 1")
        server, asked, answered = run.engines["engine-0"], asyncio.Event(), asyncio.Event()

        async def hangs(token_ids, *, deadline_s=None):
            if not asked.is_set():
                asked.set()
                await answered.wait()
                if failure is not None:
                    raise failure

        server.require_processed_logprobs = hangs
        await run.replace("engine-0")
        await asyncio.wait_for(asked.wait(), 20)
        await run.replace("engine-0")
        [link] = [link for link in run.loop.desk.fleet.links if link.name == "engine-0"]
        await run.until(lambda: link.starts == 2 and link.state is EngineState.JOINING, "the second one to be healthy")
        answered.set()
    require_whole(run)
    assert -1 not in {version for _, version in server.calls}, "it sampled from weights that nobody published"
    assert run.restarts == []


QUICK_TO_GIVE_UP = {"healthy_s": 15, "join_max_tokens": 0, "max_in_flight": 8, "max_model_len": 64}


async def test_an_engine_that_dies_while_an_evaluation_withholds_publishes_joins_with_the_version_it_had(tmp_path):
    held_out = {"id": "scripted", "name": "held-out", "num_tasks": 60, "temperature": 1.0}
    config = config_of(tmp_path, engine=QUICK_TO_GIVE_UP, eval={"sets": [held_out]})
    async with MortalRun(config, reward=reward_by_seed, delay_s=0.05) as run:
        publisher, evaluations = run.loop._publisher, run.loop._evaluations
        await run.until(lambda: evaluations.is_pinned and publisher._newest is not None, "a publish withheld")
        await run.replace("engine-0")
        await run.until(lambda: run.loop.desk.fleet.serving != [], "it serves again")
        assert evaluations.is_pinned
        assert run.history[-2:] == [0, 0]
    require_whole(run)
    assert "rollouts_invalid" not in run.state.counts


@pytest.mark.parametrize("is_publishing", [False, True])
async def test_with_sync_wait_rollouts_that_wait_for_the_only_engine_are_not_waited_for(tmp_path, is_publishing):
    """Killed between publishes, or while one waits for the rollouts that run."""
    config = config_of(tmp_path, engine=QUICK_TO_GIVE_UP, sync={"wait": True})
    async with MortalRun(config, reward=reward_by_seed, delay_s=0.1) as run:
        desk = run.loop.desk
        await run.until(
            lambda: run.state.next_step >= 2 and desk.pool.num_playing >= 4 and desk.fleet.holds is is_publishing,
            "rollouts run",
        )
        await run.replace("engine-0")
    require_whole(run)
    assert "rollouts_invalid" not in run.state.counts


async def test_a_run_ends_although_an_engine_is_still_starting(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed, num_engines=2) as run:
        await run.until(lambda: run.state.next_step >= STEPS - 2, "the last steps")
        await run.kill("engine-1")
        await run._tell(ProcessStarted(process="engine-1", life=1))  # it takes its time, as vLLM does
        await run.until(run.is_done.is_set, "the run was done")
        async with asyncio.timeout(20):
            await asyncio.wait([run._tasks["orchestrator"]])
    require_whole(run)


async def test_the_trainer_dies_while_it_exports(tmp_path):
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= STEPS - 1, "the version before the last")
        run.trainer._channel.send = _but_no(Exported, run.trainer._channel.send)  # type: ignore[method-assign]
        await run.until(lambda: run.loop.desk.trainer.is_finishing, "the end")
        await run.replace("trainer")
    require_whole(run)


def _but_no(kind: type, send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def filtered(message: Any) -> None:
        if not isinstance(message, kind):
            await send(message)

    return filtered


async def test_the_orchestrator_dies_after_the_trainer_has_exported(tmp_path):
    """Its successor needs a trainer: one that has ended, or ends now, is asked for."""
    async with MortalRun(config_of(tmp_path), reward=reward_by_seed) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= STEPS - 1, "the version before the last")
        run.loop.desk.teller.send = _but_no(Done, run.loop.desk.teller.send)  # type: ignore[method-assign]
        await run.until(lambda: run.loop.desk.trainer.is_finishing and run.run.summary.exists(), "its end")
        run.run.summary.unlink()
        for name in ("orchestrator", "env-0", "trainer"):
            await run.replace(name)
    require_whole(run)


async def test_all_die_at_once_but_the_engines(tmp_path):
    config = config_of(tmp_path, env={"mix": [{"id": "scripted"}], "stall_s": 60, "workers": 2})
    async with MortalRun(config, reward=reward_by_seed, num_engines=2) as run:
        await run.until(lambda: run.loop.desk.trainer.loaded >= 5, "version 5")
        names = ["orchestrator", "trainer", "env-0", "env-1"]
        for name in names:
            await run.kill(name)
        await asyncio.sleep(0.05)
        for name in names:
            await run.restart(name)
    require_whole(run)


@pytest.mark.parametrize("seed", range(8))
async def test_killed_at_random(tmp_path, seed: int):
    chance = random.Random(seed)
    config = config_of(tmp_path, env={"mix": [{"id": "scripted"}], "stall_s": 60, "workers": 2})
    async with MortalRun(config, reward=reward_by_seed, num_engines=2) as run:
        for _ in range(8):
            await asyncio.sleep(chance.uniform(0, 0.15))
            if run.is_done.is_set():
                break
            name = chance.choice(["orchestrator", "trainer", "env-0", "env-1", "engine-0", "engine-1"])
            await run.replace(name, gone_s=chance.uniform(0, 0.1))
    require_whole(run)


async def test_a_blocked_worker_is_given_up_and_its_other_rollouts_are_no_failures(tmp_path):
    """A rollout blocks the event loop of its worker: it is not known which, so that all are played again."""
    is_fourth, blocked = NthTask(4), []

    def stuck(play: Play) -> bool:
        if is_fourth(play) and not blocked:
            blocked.append(play)
            return True
        return False

    config = config_of(tmp_path, env={"mix": [{"id": "scripted"}], "stall_s": 60, "answer_s": 1.0})
    async with MortalRun(config, reward=reward_by_seed, stuck=stuck) as run:
        pool = run.loop.desk.pool

        def all_wait_for_it() -> bool:
            return blocked != [] and not any(playing.answers for playing in pool._playing.values())

        await run.until(all_wait_for_it, "no rollout with an answer on its way")
        for number in pool._playing:
            pool._stalled(number)  # as after `stall_s`
    require_whole(run)
    assert [restart.process for restart in run.restarts] == ["env-0"]
    assert "did not answer for 1 s (env.answer_s)" in run.restarts[0].why
    assert not [event for event in events_of(run) if isinstance(event, RolloutRetried)]


async def test_a_task_that_kills_its_workers_is_quarantined_and_the_run_ends(tmp_path):
    config = config_of(tmp_path, env={"mix": [{"id": "scripted"}], "stall_s": 60, "workers": 2})
    deadly = NthTask(5)
    async with MortalRun(config, reward=reward_by_seed, deadly=deadly) as run:
        pass
    require_whole(run)
    [(task, reason)] = run.state.quarantined.items()
    assert task == f"scripted/{deadly.seen[4]}"
    assert "3 environment workers died" in reason
    assert run.state.counts["groups_quarantined"] == 1
    events = events_of(run)
    [closed] = [event for event in events if isinstance(event, GroupClosed) and event.outcome == "quarantined"]
    dropped = range(closed.group_id * GROUP_SIZE, (closed.group_id + 1) * GROUP_SIZE)
    trained = {rollout for _, ids in run.trainer.trained for rollout in ids}
    assert not trained & set(dropped)
    assert run.lives["env-0"] + run.lives["env-1"] < 8, "it does not take many deaths to find it"


async def test_workers_that_die_of_nothing_in_common_put_nothing_into_quarantine(tmp_path):
    """Control of the test above: as many deaths, at random moments."""
    config = config_of(tmp_path, env={"mix": [{"id": "scripted"}], "stall_s": 60, "workers": 2})
    async with MortalRun(config, reward=reward_by_seed) as run:
        for step in range(1, 6):
            await run.until(lambda step=step: run.state.next_step >= step, f"step {step}")
            await run.replace(f"env-{step % 2}")
    require_whole(run)
    assert run.state.quarantined == {}
