"""Stragglers: a stuck member holds nobody up, a late one trains against what its group was trained with, and the loop
selects nothing by length."""

import asyncio
import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from palestra.config.schema import Endpoint
from palestra.core.records import ChatReply, Ending, Reply, Sampling, Span
from palestra.orchestrate import dispatch, gateway
from palestra.orchestrate.batcher import baselines, make_batch
from palestra.orchestrate.buffer import last_chances, may_part, take, too_old_in_flight
from palestra.orchestrate.endpoints import ChatEndpoint
from palestra.orchestrate.journal import recover
from palestra.orchestrate.pulse import Pulse
from palestra.orchestrate.sources import seed_for
from palestra.orchestrate.state import (
    BatchShipped,
    Group,
    GroupClosed,
    GroupOpened,
    GroupParted,
    GroupStatus,
    JournalledReply,
    LoopState,
    PartlyReplied,
    RolloutCut,
    RolloutEnded,
)
from palestra.wire.messages import Call
from tests.unit.core.clocks import LoopClock
from tests.unit.orchestrate.scripted import Life, ScriptedEngine, make_config, reward_by_seed, until
from tests.unit.orchestrate.test_parts import RULES as PLAIN
from tests.unit.orchestrate.test_parts import record

pytestmark = pytest.mark.slow

OWN = dataclasses.replace(PLAIN.default, advantage_scale="std")
RULES = dataclasses.replace(PLAIN, default=OWN, max_pack_tokens=64)


def opened(*group_ids: int, size: int = 4) -> LoopState:
    state = LoopState(next_group=min(group_ids))
    for group_id in group_ids:
        task = record(0, 0.0).task
        state.apply(
            GroupOpened(group_id=group_id, source="e", task=task, size=size, cursor_epoch=0, cursor_taken=group_id)
        )
    return state


def ship(state: LoopState, groups: list[Group]) -> np.ndarray:
    """What `orchestrate.ship` does, without files; the advantages in the batch, by rollout."""
    step = state.next_step
    kept = {g.group_id: baselines(g, RULES, {}) for g in groups if not g.all_ended and not g.settled}
    batch, _, trained = make_batch(groups, {}, step=step, attempt=1, rules=RULES)
    ids = [r.rollout_id for r in trained]
    state.apply(
        BatchShipped(step=step, group_ids=[g.group_id for g in groups], rollout_ids=ids, baselines=kept, metrics={})
    )
    order = np.argsort(batch.rollout)
    return batch.advantage[batch.offsets[:-1]][order]


def take_one(state: LoopState, max_age: int = 2) -> list[Group] | None:
    return take(state, groups_per_step=1, window=4, max_age=max_age)


# --- by hand


def test_a_late_member_is_compared_with_what_the_others_were_trained_against():
    state = opened(0, 1)
    for rollout_id, reward in enumerate([1.0, 0.0, 0.5]):
        state.apply(RolloutEnded(record=record(rollout_id, reward)))
    assert take_one(state) is None
    state.apply(GroupParted(group_id=0))
    std = np.std([1.0, 0.0, 0.5])
    groups = take_one(state)
    assert groups is not None
    np.testing.assert_allclose(ship(state, groups), np.asarray([0.5, -0.5, 0.0]) / std, rtol=1e-6)
    assert state.groups[0].status is GroupStatus.LATE

    state.apply(RolloutEnded(record=record(3, 0.9)))
    for rollout_id, reward in enumerate([1.0, 0.0, 0.0, 0.0], start=4):
        state.apply(RolloutEnded(record=record(rollout_id, reward)))
    state.apply(GroupClosed(group_id=1, outcome="ready"))
    groups = take_one(state)
    assert groups is not None
    assert [g.group_id for g in groups] == [1, 0], "late members ride behind a full batch"
    advantage = ship(state, groups)
    np.testing.assert_allclose(advantage[0], (0.9 - 0.5) / std, rtol=1e-6)  # not against a mean that it is part of
    assert not state.groups, "all of both is trained"
    assert state.counts["rollouts_late"] == 1


def test_a_group_that_is_complete_before_it_is_taken_is_compared_with_all_of_itself():
    state = opened(0)
    for rollout_id, reward in enumerate([1.0, 0.0, 0.5]):
        state.apply(RolloutEnded(record=record(rollout_id, reward)))
    state.apply(GroupParted(group_id=0))
    state.apply(RolloutEnded(record=record(3, 0.5)))
    state.apply(GroupClosed(group_id=0, outcome="ready"))
    groups = take_one(state)
    assert groups is not None
    np.testing.assert_allclose(ship(state, groups).sum(), 0.0, atol=1e-6)
    assert not state.groups


@pytest.mark.parametrize(
    ("rewards", "has_group_rewards", "may"),
    [
        ([1.0, 0.0], False, True),
        ([1.0], False, False),  # a quarter of it
        ([1.0, 1.0, 1.0], False, False),  # no signal yet: the one that is out may bring it
        ([1.0, 0.0, 0.0], True, False),  # a group reward needs all
    ],
)
def test_a_group_parts_with_half_of_it_and_signal(rewards, has_group_rewards, may):
    state = opened(0)
    state.groups[0].has_group_rewards = has_group_rewards
    for rollout_id, reward in enumerate(rewards):
        state.apply(RolloutEnded(record=record(rollout_id, reward)))
    assert may_part(state.groups[0], drop_zero_signal=True) is may


def test_what_can_train_now_and_never_again_is_a_last_chance():
    state = opened(0, 1, 2)
    state.next_step = 5
    state.apply(RolloutEnded(record=record(0, 1.0, version=3)))  # age 2 of at most 2
    state.apply(RolloutEnded(record=record(4, 1.0, version=4)))  # may wait
    state.apply(RolloutEnded(record=record(8, 1.0, version=2)))  # too late anyway
    assert [g.group_id for g in last_chances(state, before=3, max_age=2)] == [0]
    assert last_chances(state, before=0, max_age=2) == []


def test_a_rollout_in_flight_is_too_old_by_its_first_token():
    state = opened(0)
    for rollout_id, version in ((0, 2), (1, 3)):
        reply = Reply(token_ids=[1, 2], logprobs=[-1.0] * 2, spans=(Span(version, 0, 2),), finish_reason="abort")
        piece = JournalledReply(call=0, prompt_hash=0, reply=reply)
        state.apply(PartlyReplied(rollout_id=rollout_id, piece=piece))
    state.next_step = 5
    assert too_old_in_flight(state, range(4), max_age=2) == [0]
    state.apply(RolloutCut(rollout_id=0, num_tokens=state.num_known_tokens(0)))
    assert state.groups[0].records[0].ending is Ending.INVALID
    assert state.counts["rollouts_cut"] == 1
    assert state.counts["tokens_dispatched"] == 2, "it counts among the dispatched: dropping long ones must show"


def test_lengths_dispatched_against_lengths_trained():
    state = opened(0)
    for rollout_id, tokens in enumerate([2, 4, 6, 8]):
        version = 0 if tokens == 8 else 3
        state.apply(RolloutEnded(record=record(rollout_id, float(rollout_id), tokens=tokens, version=version)))
    state.apply(GroupClosed(group_id=0, outcome="ready"))
    state.next_step = 3
    groups = take_one(state)
    assert groups is not None
    ship(state, groups)
    assert state.length_drift == pytest.approx(4 / 5 - 1)  # the one of 8 tokens was too old


async def test_a_pulse_is_quiet_after_so_long_without_a_beat_and_beats_again(monkeypatch):
    told: list[float] = []
    clock = LoopClock(monkeypatch)
    with Pulse(0.4, lambda: told.append(clock.now)) as pulse:
        for _ in range(4):
            await clock.pass_by(0.15)
            pulse.beat()
        await clock.pass_by(0.39)
        assert not told, "beats put it off"
        assert not pulse.is_quiet
        await clock.pass_by(0.02)
        assert len(told) == 1
        assert pulse.is_quiet
        await clock.pass_by(0.6)
        assert len(told) == 1, "it says so once"
        pulse.beat()
        assert not pulse.is_quiet
    await clock.pass_by(0.6)
    assert len(told) == 1, "a stopped pulse says nothing"


async def test_silence_counts_from_the_end_of_a_work_that_cannot_beat(monkeypatch):
    told: list[float] = []
    clock = LoopClock(monkeypatch)
    with Pulse(0.2, lambda: told.append(clock.now)) as pulse:
        with pulse.at_work(), pulse.at_work():
            await clock.pass_by(0.5)
        assert not told
        await clock.pass_by(0.19)
        assert not told
        await clock.pass_by(0.02)
        assert len(told) == 1
        with pulse.at_work():
            assert not pulse.is_quiet
            pulse.__exit__()
    await clock.pass_by(0.4)
    assert len(told) == 1, "a stopped pulse says nothing"


async def test_a_rollout_is_not_stuck_while_the_endpoint_of_a_seat_works_but_while_others_are_before_it():
    told: list[float] = []
    call = Call(rollout_id=0, call=0, token_ids=[], sampling=Sampling(), messages=[{"role": "user"}], seat="user")
    endpoint = ChatEndpoint(Endpoint(url="http://nowhere/v1", max_in_flight=1), "m")
    endpoint._client.ask = slow_answer  # type: ignore[method-assign]
    dispatcher = object.__new__(dispatch.Dispatcher)
    dispatcher._desk = SimpleNamespace(  # type: ignore[assignment]
        state=LoopState(), seats=SeatsOf(endpoint), journal=SimpleNamespace(record=lambda event: None)
    )
    with Pulse(0.15, lambda: told.append(0.0)) as pulse:
        dispatcher._pulses = {0: pulse}
        await dispatcher._answer_seat(opened(0).groups[0], 0, call, seed=0)
        assert not told
        before = asyncio.ensure_future(endpoint.ask(call, seed=0))
        await asyncio.sleep(0)
        await dispatcher._answer_seat(opened(0).groups[0], 0, call, seed=0)
        await before
    assert len(told) == 1
    await endpoint.close()


async def slow_answer(messages, tools, sampling, *, seed):
    await asyncio.sleep(0.4)
    return ChatReply(message={"role": "assistant", "content": "hm"}, finish_reason="stop", num_tokens=1)


@dataclasses.dataclass
class SeatsOf:
    endpoint: ChatEndpoint

    async def ask(self, source: str, call: Call, *, seed: int, **how) -> ChatReply:
        return await self.endpoint.ask(call, seed=seed, **how)


# --- in the loop


def hang_first(loop_life: Life, held: list) -> None:
    """A worker whose first rollout ends only when `held` is released."""
    handle = loop_life.loop.desk.pool.handle

    def keep(peer, message):
        if type(message).__name__ == "Ended" and not held:
            held.append(lambda: handle(peer, message))
        else:
            handle(peer, message)

    loop_life.loop.desk.pool.handle = keep


def reward_by_member(record) -> float:
    """There is signal in a group whoever is missing."""
    return float(record.rollout_id % 2)


async def test_a_stuck_member_holds_no_step_up_and_trains_when_it_ends(tmp_path):
    """It is stuck while other steps go by, then ends; everything trains once."""
    algo = {"stuck_s": 0.05, "max_age": 8, "pace_age": 2.0}
    config = make_config(tmp_path, algo=algo, train={"steps": 10}, env={"stall_s": 20})
    life, held = Life(config, reward=reward_by_member, step_s=0.02), []
    hang_first(life, held)
    playing = asyncio.ensure_future(life.play())
    while len(life.trainer.trained) < 4:  # these go by without it
        await asyncio.sleep(0.01)
        assert not playing.done()
    assert life.journal.state.counts["groups_parted"] >= 1
    held[0]()
    await asyncio.wait_for(playing, 20)
    trained = [i for _, ids in life.trainer.trained for i in ids]
    assert len(trained) == len(set(trained))
    assert life.journal.state.counts["rollouts_late"] >= 1  # on a busy machine others are stuck, too
    summary = json.loads(life.run.summary.read_text())
    assert summary["counts"]["rollouts_shipped"] == len(trained)


async def test_without_parting_the_stuck_member_holds_the_loop_up(tmp_path, monkeypatch):
    """The negative control of the test above."""
    monkeypatch.setattr(dispatch, "may_part", lambda group, drop_zero_signal: False)
    algo = {"stuck_s": 0.05, "max_age": 8, "pace_age": 2.0, "window_groups": 0}
    config = make_config(tmp_path, algo=algo, train={"steps": 10}, env={"stall_s": 20})
    life, held = Life(config, reward=reward_by_seed, step_s=0.02), []
    hang_first(life, held)
    await life.play(kill_after_s=1.5)
    assert len(life.trainer.trained) < 4


class LongTail(ScriptedEngine):
    """Log-normal lengths, capped at 16 times the median; a reply takes time by its length."""

    SECONDS_PER_TOKEN = 0.0012

    @staticmethod
    def size(seed: int) -> int:
        return min(round(4 * random.Random(seed).lognormvariate(0.0, 1.0)) + 1, 64)

    def _reply(self, seed: int) -> Reply:
        size = self.size(seed)
        return Reply(
            token_ids=[10] * size, logprobs=[-0.5] * size, spans=(Span(self.loaded, 0, size),), finish_reason="stop"
        )


def reward_by_length(rollout) -> float:
    return float(rollout.num_sampled_tokens)


def long_tail_config(tmp_path, **sections):
    return make_config(
        tmp_path,
        algo={"groups_per_step": 4, "group_size": 4, "max_age": 8, "pace_age": 2.0, "drop_zero_signal": False},
        sampling={"max_tokens": 80},
        train={"steps": 60, "max_pack_tokens": 512, "checkpoint_every": 60},
        engine={"max_model_len": 128, "max_in_flight": 64, "join_max_tokens": 0},
        **sections,
    )


async def play_long_tail(tmp_path, **sections) -> Life:
    def delay(seed: int) -> float:
        return LongTail.SECONDS_PER_TOKEN * LongTail.size(seed)

    life = Life(
        long_tail_config(tmp_path, **sections),
        reward=reward_by_length,
        engine=lambda url: LongTail(url, delay_s=delay),
        step_s=0.01,
    )
    await life.play()
    return life


def length_of(rollout_id: int) -> int:
    return LongTail.size(seed_for(0, rollout_id // 4, 0) + rollout_id % 4)


def drift(life: Life) -> float:
    """Mean length trained over mean length dispatched, less 1, of all groups before the first that is not done yet."""
    groups_done = min(life.journal.state.groups, default=life.journal.state.next_group)
    trained = [i for _, ids in life.trainer.trained for i in ids if i < 4 * groups_done]
    dispatched = range(4 * groups_done)
    assert groups_done >= 200
    return float(np.mean([length_of(i) for i in trained]) / np.mean([length_of(i) for i in dispatched])) - 1


async def test_the_loop_selects_nothing_by_length(tmp_path):
    """The reward is the length and lengths have a long tail: what trains is as long as what was dispatched, to 2 %."""
    life = await play_long_tail(tmp_path)
    assert life.journal.state.counts["rollouts_shipped"] >= 60 * 16
    assert abs(drift(life)) < 0.02
    assert abs(life.journal.state.length_drift) < 0.02, "and the loop says so itself"


async def test_a_loop_that_drops_slow_rollouts_fails_that_test(tmp_path, monkeypatch):
    """The negative control: a limit on the time of a rollout, which many frameworks have, is a bias by length."""
    play = dispatch.Dispatcher._play_validly

    async def impatient(self, group, rollout_id):
        if length_of(rollout_id) > 20:
            return record(rollout_id, 0.0, ending=Ending.INVALID)
        return await play(self, group, rollout_id)

    monkeypatch.setattr(dispatch.Dispatcher, "_play_validly", impatient)
    assert drift(await play_long_tail(tmp_path)) < -0.02


async def test_groups_that_are_cut_in_a_row_are_no_fault_of_their_environment(tmp_path, monkeypatch):
    """All in flight, of more groups than may be invalid in a row; they are replaced, and the run ends well."""
    planted, in_flight = iter([True]), dispatch.too_old_in_flight

    def all_at_once(state, rollout_ids, *, max_age):
        once = state.next_step == 2 and next(planted, False)
        return list(rollout_ids) if once else in_flight(state, rollout_ids, max_age=max_age)

    monkeypatch.setattr(dispatch, "too_old_in_flight", all_at_once)
    algo = {"groups_per_step": 8, "group_size": 4, "pace_age": 3.0, "max_age": 8}
    config = make_config(tmp_path, algo=algo, engine={"max_in_flight": 64}, train={"max_pack_tokens": 512})
    life = Life(
        config, reward=reward_by_seed, engine=lambda url: ScriptedEngine(url, delay_s=lambda seed: 0.05 * (seed % 4))
    )
    await life.play()
    counts = life.journal.state.counts
    assert counts["rollouts_cut"] > dispatch._INVALID_GROUPS * 4
    assert counts["groups_too_old"] >= dispatch._INVALID_GROUPS
    assert "groups_all_invalid" not in counts
    assert len(life.trainer.trained) == config.train.steps


async def test_members_of_several_groups_are_cut_while_the_first_of_them_is_scored(tmp_path, monkeypatch):
    """Group rewards take their time, in which others that are too old end by themselves: none ends twice."""
    planted, in_flight, cut = [], dispatch.too_old_in_flight, []

    def last_members(state, rollout_ids, *, max_age):
        old = [i for i in rollout_ids if len(state.groups[i // 4].records) == 3]
        if planted or len({i // 4 for i in old}) < 2:
            return in_flight(state, rollout_ids, max_age=max_age)
        planted.append(old)
        return old

    class Holding(ScriptedEngine):
        """Of every group it holds one member: of the first four groups until six have no other left, of the others
        until they are to be cut."""

        num_held = 0

        async def stream(self, token_ids, sampling, *, seed, **how):
            if seed % 4 == 3:
                self.num_held += 1
                await self._hold(0 if self.num_held > 4 else 6)
            return await super().stream(token_ids, sampling, seed=seed, **how)

        async def _hold(self, num_waiting: int) -> None:
            def goes_on() -> bool:
                held = [group for group in state.groups.values() if len(group.records) == 3]
                return planted != [] or 0 < num_waiting <= len(held)

            await until(goes_on)

    async def score(source, records):
        await asyncio.sleep(0.2)
        return records

    monkeypatch.setattr(dispatch, "too_old_in_flight", last_members)
    algo = {"groups_per_step": 4, "group_size": 4, "max_age": 8, "pace_age": 3.0, "window_groups": 64}
    engine = {"max_in_flight": 64, "join_max_tokens": 0}
    config = make_config(tmp_path, algo=algo, engine=engine, train={"max_pack_tokens": 512, "steps": 4})
    life = Life(config, reward=reward_by_seed, engine=lambda url: Holding(url, delay_s=lambda seed: 0.05))
    pool, state = life.loop.desk.pool, life.journal.state
    read_chunk = life.loop._dispatcher._sources.read_chunk

    async def with_group_rewards(label, *place):
        tasks = await read_chunk(label, *place)
        life.loop._dispatcher._sources.has_group_rewards[label] = True
        return tasks

    monkeypatch.setattr(life.loop._dispatcher._sources, "read_chunk", with_group_rewards)
    monkeypatch.setattr(pool, "score_group", score)
    await life.play()
    [cut] = planted
    assert life.journal.state.counts["rollouts_cut"] >= len(cut) >= 2
    assert len(life.trainer.trained) == 4
    recover(life.run.journal, None).close()


@pytest.mark.parametrize("trained", [5, 6, 7, 8])
async def test_a_late_member_holds_up_no_publish(tmp_path, trained: int):
    """It ends in whatever step between two publishes, and trains beside a full batch; some groups have no signal."""

    def is_telling(record) -> bool:
        return int(record.task.key.removeprefix("task ")) % 3 > 0

    def reward(record) -> float:
        return reward_by_member(record) * is_telling(record)

    algo = {"stuck_s": 0.05, "max_age": 8, "pace_age": 1.0}
    train = {"steps": 20, "batch_deadline_s": 20}
    config = make_config(tmp_path, algo=algo, sync={"every": 2}, train=train, engine={"max_in_flight": 64})
    life, held = Life(config, reward=reward, step_s=0.03), []
    handle = life.loop.desk.pool.handle

    def hold_one(peer, message):
        if type(message).__name__ == "Ended" and not held and is_telling(message.record):
            held.append((peer, message))
        else:
            handle(peer, message)

    async def release():
        while len(life.trainer.trained) < trained or not held:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        handle(*held[0])

    life.loop.desk.pool.handle = hold_one
    releasing = asyncio.create_task(release())
    await life.play()
    await releasing
    assert len(life.trainer.trained) == 20
    assert life.journal.state.counts["rollouts_late"] >= 1


async def test_cutting_long_rollouts_in_flight_shows_in_what_the_loop_says_of_itself(tmp_path, monkeypatch):
    """Another one: an age bound that the tail does not keep is a bias that has to be seen."""
    cut = dispatch.too_old_in_flight

    def eager(state, rollout_ids, *, max_age):
        long = [i for i in rollout_ids if state.num_known_tokens(i) >= 20]
        return sorted({*long, *cut(state, rollout_ids, max_age=max_age)})

    monkeypatch.setattr(dispatch, "too_old_in_flight", eager)
    monkeypatch.setattr(gateway, "_PIECE_TOKENS", 1)
    life = await play_long_tail(tmp_path)
    assert life.journal.state.counts["rollouts_cut"] > 0
    assert life.journal.state.length_drift < -0.02
