"""The simulated loop: schedules computed by hand, conservation, Little's law, limits that are known."""

import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palestra.core.errors import UserError
from palestra.core.records import Ending, RolloutRecord, Sample, Seat, Span, Task
from palestra.orchestrate import buffer as loops_own
from palestra.orchestrate import state
from palestra.orchestrate.simulate.curves import (
    Curves,
    EngineCurve,
    LogNormal,
    PublishCurve,
    Recorded,
    RecordedGroup,
    TrainerCurve,
)
from palestra.orchestrate.simulate.engine import Engine, Request
from palestra.orchestrate.simulate.groups import Buffer, Group
from palestra.orchestrate.simulate.loop import Loop, simulate
from palestra.orchestrate.simulate.outcome import Outcome, outcome_of
from palestra.orchestrate.simulate.rules import Rules
from palestra.orchestrate.simulate.search import best, search
from palestra.orchestrate.simulate.work import GroupWant, Want, Work

EVEN = LogNormal(median_tokens=100, sigma=0, max_tokens=100)
TAIL = LogNormal(median_tokens=100, sigma=1.0, max_tokens=1600, group_share=0.3)
SATURATED = EngineCurve(concurrency=(1,), tokens_per_s=(1000,))  # 1000 tokens/s, whatever the concurrency


def rules(**changed) -> Rules:
    plain = Rules(
        steps=30,
        group_size=4,
        groups_per_step=4,
        max_outstanding=32,
        window=8,
        max_age=8,
        engines=1,
        max_in_flight=64,
    )
    return replace(plain, **changed)


def curves(work=TAIL, engine=SATURATED, step_s=1.0, **more) -> Curves:
    trainer = TrainerCurve(base_s=step_s, s_per_token=1e-9, **more.pop("trainer", {}))
    return Curves(source="test", engine=engine, trainer=trainer, work=work, **more)


# --- one engine, by hand


def ends(engine: Engine, wants: list[tuple[float, float]]) -> list[float]:
    """When requests of (arrival, tokens) end, in the order they do."""
    found: list[float] = []
    coming = sorted(wants)
    while coming or engine.in_flight:
        end = engine.next_end()
        if end is None or (coming and coming[0][0] <= end):
            at, tokens = coming.pop(0)
            engine.admit(at, Request(0, tokens, lambda _: None, lambda: None))
        else:
            engine.end_next(end)
            found.append(end)
    return found


def test_requests_share_an_engine_evenly():
    """10 tokens/s in all. A wants 10 at 0, B 10 at 0.5: A has 5 when B comes; both get 5/s until A ends at 1.5 with
    B at 5; B ends 0.5 later."""
    curve = EngineCurve(concurrency=(1,), tokens_per_s=(10,))
    assert ends(Engine(curve), [(0.0, 10.0), (0.5, 10.0)]) == pytest.approx([1.5, 2.0])


def test_an_engine_is_faster_with_more_requests_as_its_curve_says():
    """1 alone: 10/s. 2: 16/s, 8 each. A wants 10 at 0, B 8 at 0.5: A has 5, needs 5/8 s more; B has 5 then and ends
    0.3 s later."""
    curve = EngineCurve(concurrency=(1, 2), tokens_per_s=(10, 16))
    assert ends(Engine(curve), [(0.0, 10.0), (0.5, 8.0)]) == pytest.approx([1.125, 1.425])


def test_what_exceeds_max_running_waits_its_turn():
    curve = EngineCurve(concurrency=(1,), tokens_per_s=(10,), max_running=1)
    assert ends(Engine(curve), [(0.0, 10.0), (0.1, 5.0), (0.2, 5.0)]) == pytest.approx([1.0, 1.5, 2.0])


def test_a_stop_and_a_prefill_hold_up_everyone():
    curve = EngineCurve(concurrency=(1,), tokens_per_s=(10,), prefill_tokens_per_s=100)
    engine = Engine(curve)
    engine.admit(0.0, Request(50, 10.0, lambda _: None, lambda: None))  # 0.5 s of prefill
    assert engine.next_end() == pytest.approx(1.5)
    engine.stop(1.0, 2.0, version=1, recompute=False)
    assert engine.next_end() == pytest.approx(3.5)
    engine.advance(3.5)
    assert (engine.spent.prefill, engine.spent.publish) == pytest.approx((0.5, 2.0))
    assert engine.spent.generate == pytest.approx(1.0)


def test_recomputing_prefills_what_is_running():
    curve = EngineCurve(concurrency=(1,), tokens_per_s=(10,), prefill_tokens_per_s=100)
    engine = Engine(curve)
    engine.admit(0.0, Request(50, 10.0, lambda _: None, lambda: None))
    engine.stop(1.0, 0.0, version=1, recompute=True)  # 50 of the prompt and 5 sampled: 0.55 s
    assert engine.next_end() == pytest.approx(1.5 + 0.55)


# --- a schedule by hand


class Given:
    """Work that was written down: the tokens of each member, and whether the group trains."""

    def __init__(self, *groups: tuple[list[int], bool]):
        self._groups = groups

    def group(self, group_id: int, position: float) -> GroupWant:
        tokens, trains = self._groups[group_id % len(self._groups)]
        return GroupWant([Want(0, count, 1, 0.0) for count in tokens], trains)


def course(one: Rules, given: Given, measured: Curves):
    loop = Loop(one, measured, seed=0)
    loop.work = given  # type: ignore[assignment]
    loop.run()
    return loop.course


def test_a_schedule_computed_by_hand():
    """Groups of two, one a step, two of them out at a time; a request gets 10 tokens/s, however many there are.

    Group 0 wants 10 and 20, group 1 30 and 10. At 0 all four start. Group 0 is ready at 2, trains from 2 to 3; it is
    still out until version 1 is in the engine (stop 0.5 s): at 3.5. Group 1 lost 0.5 s of sampling from its stop at 3,
    when its long member has all 30: it ended at 3 as well, and trains from 3 to 4. At 3.5 group 2 (like group 0)
    starts with version 1. Version 2 stops the engine from 4 to 4.5; group 3 starts at 4.5. Group 2 has its 20 tokens at
    3.5 + 2 + 0.5 = 6: step 2 ends at 7.
    """
    alone = EngineCurve(concurrency=(1, 100), tokens_per_s=(10, 1000))
    one = rules(steps=3, group_size=2, groups_per_step=1, max_outstanding=4, window=2)
    found = course(
        one, Given(([10, 20], True), ([30, 10], True)), curves(engine=alone, publish=PublishCurve(stop_s=0.5))
    )
    assert [tally.at_s for tally in found.tallies] == pytest.approx([3.0, 4.0, 7.0])
    assert [ages.tolist() for ages in found.ages] == [[0, 0], [1, 1], [1, 1]]


def test_a_group_without_signal_is_replaced():
    alone = EngineCurve(concurrency=(1, 100), tokens_per_s=(10, 1000))
    one = rules(steps=2, group_size=1, groups_per_step=1, max_outstanding=1, window=2)
    found = course(one, Given(([10], True), ([10], False), ([10], False), ([10], True)), curves(engine=alone))
    assert [tally.at_s for tally in found.tallies] == pytest.approx([2.0, 6.0])
    assert found.tallies[-1].groups_dropped == 2


# --- limits that are known


def test_without_a_tail_the_step_is_the_longer_of_generating_and_training():
    """16 rollouts of 100 tokens at 1000 tokens/s: 1.6 s."""
    for step_s in (0.4, 1.0, 3.0):
        found = simulate(rules(steps=70), curves(EVEN, step_s=step_s), skip=10, steps=50)
        assert found.step_s == pytest.approx(max(1.6, step_s), rel=0.01)


def test_in_turns_the_step_is_the_sum():
    in_turns = rules(max_outstanding=16, window=0)
    extras = {"publish": PublishCurve(stop_s=0.25), "trainer": {"stage_s": 0.5}, "batch_s": 0.125}
    found = simulate(in_turns, curves(EVEN, step_s=2.0, **extras), skip=4)
    assert found.step_s == pytest.approx(1.6 + 2.0 + 0.25 + 0.5 + 0.125, rel=1e-6)
    assert found.max_age == 0
    assert found.trainer_idle == pytest.approx(1 - 2.5 / found.step_s, rel=1e-6)


def test_one_shared_device_takes_the_sum_too():
    found = simulate(rules(is_shared=True, steps=70), curves(EVEN, step_s=2.0), skip=10, steps=50)
    assert found.step_s == pytest.approx(1.6 + 2.0, rel=0.01)


def _ignores_the_tail(work: LogNormal) -> float:
    """What a simulator would say that knows mean lengths only: tokens of a step over the engine's best speed."""
    lengths = [want.sampled_tokens for i in range(300) for want in Work(work, group_size=4, seed=0).group(i, 0).members]
    return 16 * sum(lengths) / len(lengths) / 1600


def test_a_tail_costs_what_mean_lengths_do_not_tell():
    """A request alone gets 25 tokens/s, 64 together 1600: the last ones of a batch are slow. Batch by batch the longest
    rollout sets the pace, and simulating with mean lengths would miss most of the step."""
    engine = EngineCurve(concurrency=(1, 64), tokens_per_s=(25, 1600))
    by_batch = rules(updates="batches", steps=60, max_outstanding=32)
    found = simulate(by_batch, curves(engine=engine, step_s=0.1), skip=10)
    assert found.step_s > 3 * _ignores_the_tail(TAIL)
    without = simulate(by_batch, curves(EVEN, engine=engine, step_s=0.1), skip=10)
    assert found.step_s > 2.5 * without.step_s


def test_in_flight_updates_are_worth_more_the_longer_the_tail():
    engine = EngineCurve(concurrency=(1, 64), tokens_per_s=(25, 1600))

    def factor(sigma: float) -> float:
        known = curves(TAIL.model_copy(update={"sigma": sigma}), engine=engine, step_s=0.5)
        paced = rules(steps=80, max_outstanding=64, window=32)
        return (
            simulate(replace(paced, updates="batches"), known, skip=20).step_s / simulate(paced, known, skip=20).step_s
        )

    assert 1.0 <= factor(0.0) < factor(0.5) < factor(1.2)


# --- laws


def outcome_and_loop(one: Rules, known: Curves) -> tuple[Outcome, Loop]:
    loop = Loop(one, known, seed=3)
    loop.run()
    return outcome_of(loop.course, skip=5), loop


@pytest.mark.parametrize("changed", [{}, {"engines": 3}, {"updates": "drain"}, {"max_in_flight": 8}, {"joins": True}])
def test_littles_law(changed):
    """Rollouts in flight = rollouts per second x seconds each is in flight."""
    found, _ = outcome_and_loop(rules(steps=400, **changed), curves(step_s=0.5))
    assert found.mean_in_flight == pytest.approx(found.rollouts_per_s * found.mean_rollout_s, rel=0.03)


@pytest.mark.parametrize("changed", [{}, {"engines": 3, "at_once": 2}, {"updates": "batches"}, {"max_age": 1}])
def test_rollouts_are_conserved(changed):
    """Every rollout that was opened was trained, dropped, expired, or is still there."""
    zero = TAIL.model_copy(update={"zero_signal": 0.4})
    one = rules(steps=60, max_outstanding=64, **changed)
    _, loop = outcome_and_loop(one, curves(zero, step_s=0.2))
    last = loop.course.tallies[-1]
    in_batches = sum(len(ages) for ages in loop.course.ages)
    opened = loop._next_group * one.group_size
    dropped = last.groups_dropped * one.group_size
    assert opened == in_batches + dropped + loop._tally.too_old + len(loop.buffer) * one.group_size
    assert all(len(ages) == one.group_size * one.groups_per_step for ages in loop.course.ages) or one.max_age == 1


def test_mean_age_is_what_pacing_says():
    """Where the trainer is the bottleneck: rollouts out = (1 + age) steps' worth."""
    for pace in (1, 2, 4):
        paced = rules(steps=120, max_outstanding=16 * (1 + pace), window=64)
        found = simulate(paced, curves(EVEN, step_s=5.0), skip=20)
        assert found.mean_age == pytest.approx(pace, abs=0.35)


def test_pacing_counts_what_is_trained_and_not_published():
    rare = rules(steps=120, max_outstanding=16 * 5, window=64, publish_every=3, max_age=4)
    found = simulate(rare, curves(EVEN, step_s=5.0), skip=20)
    assert (found.max_age, found.too_old) == (4, 0)
    assert found.mean_age > 2.5


def test_nothing_older_than_the_bound_trains():
    found = simulate(rules(steps=80, max_outstanding=16 * 9, window=64, max_age=2), curves(step_s=1.6), skip=20)
    assert found.max_age <= 2
    assert found.too_old > 0


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    one, known = rules(), curves()
    assert simulate(one, known, seed=1, skip=5) == simulate(one, known, seed=1, skip=5)
    assert simulate(one, known, seed=1, skip=5) != simulate(one, known, seed=2, skip=5)


def test_more_engines_never_make_a_step_longer():
    engine = EngineCurve(concurrency=(1, 8), tokens_per_s=(100, 400))
    steps_s = [
        simulate(rules(steps=80, engines=n), curves(engine=engine, step_s=0.5), skip=20).step_s for n in (1, 2, 4, 8)
    ]
    assert steps_s == sorted(steps_s, reverse=True)
    assert steps_s[0] > 1.5 * steps_s[-1]


def test_engines_are_stopped_at_once_by_so_many():
    """8 engines, a stop of 0.5 s each: one by one a version takes 4 s, and no more than three may be staged."""
    one_by_one = rules(engines=8, steps=60, max_outstanding=64, window=32)
    known = curves(EVEN, step_s=1.0, publish=PublishCurve(stop_s=0.5))
    slow, fast = simulate(one_by_one, known, skip=20), simulate(replace(one_by_one, at_once=8), known, skip=20)
    assert fast.publish == pytest.approx(0.5 / fast.step_s, rel=0.05)
    assert (fast.step_s, slow.step_s) == pytest.approx((1.0, 4.0), rel=0.01)


def test_what_the_next_publish_needs_is_dispatched_whatever_pacing_says():
    assert simulate(rules(max_outstanding=8), curves()).max_age == 0
    found = simulate(rules(max_outstanding=8, publish_every=3, steps=60), curves(), skip=10)
    assert (found.max_age, found.too_old) == (2, 0)


# --- the buffer's rules are the loop's own


def _record(rollout_id: int, version: int) -> RolloutRecord:
    sample = Sample(token_ids=[1], logprobs=[0.0], sampled=[1], spans=(Span(version, 0, 1),))
    seats = (Seat(samples=(sample,)),)
    return RolloutRecord(rollout_id=rollout_id, environment="e", task=Task(), ending=Ending.OK, seats=seats)


@given(
    members=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=30),
    count=st.integers(1, 6),
    window=st.integers(0, 12),
    step=st.integers(0, 9),
    max_age=st.integers(0, 5),
)
def test_batches_are_taken_as_the_loop_takes_them(members, count, window, step, max_age):
    real, simulated = state.LoopState(next_step=step), Buffer(window)
    for group_id, (is_ready, version) in enumerate(members):
        group = state.Group(group_id=group_id, source="e", task=Task(), size=1)
        mine = Group(group_id, GroupWant([], True), begun=[version])
        real.groups[group_id] = group
        simulated.open[group_id] = mine
        if is_ready:
            group.records[group_id] = _record(group_id, version)
            group.status = state.GroupStatus.READY
            simulated.close(mine)
    gone = loops_own.expired(real, max_age=max_age)
    for group_id in gone:
        del real.groups[group_id]
    assert simulated.expire(step, max_age) == len(gone)
    theirs = loops_own.take(real, groups_per_step=count, window=window, max_age=max_age)
    ours = simulated.take(count)
    assert (ours and [group.group_id for group in ours]) == (theirs and [group.group_id for group in theirs])


# --- work


def test_the_law_has_the_median_the_spread_and_the_limit_it_says():
    work = Work(LogNormal(median_tokens=100, sigma=1.0, max_tokens=400, zero_signal=0.25), group_size=8, seed=0)
    groups = [work.group(i, 0.0) for i in range(1000)]
    tokens = sorted(want.sampled_tokens for group in groups for want in group.members)
    assert tokens[len(tokens) // 2] == pytest.approx(100, rel=0.05)
    assert tokens[int(0.16 * len(tokens))] == pytest.approx(100 / 2.718, rel=0.1)
    assert tokens[-1] == 400
    assert sum(group.trains for group in groups) / 1000 == pytest.approx(0.75, abs=0.04)


def test_rollouts_of_a_group_are_alike_where_the_task_decides():
    alone, same = (
        Work(LogNormal(median_tokens=100, sigma=1.0, max_tokens=10**6, group_share=share), group_size=8, seed=0)
        for share in (0.0, 1.0)
    )
    assert len({want.sampled_tokens for want in same.group(0, 0.0).members}) == 1
    assert len({want.sampled_tokens for want in alone.group(0, 0.0).members}) > 4


def test_recorded_groups_are_used_again_at_their_place():
    def group(position: float) -> RecordedGroup:
        late = position >= 0.5
        return RecordedGroup(
            position=position,
            trains=not late,
            sampled_tokens=(100 if late else 10,) * 2,
            prompt_tokens=(1, 1),
            turns=(1, 1),
            env_s=(0.0, 0.0),
        )

    work = Work(Recorded(groups=tuple(group(i / 100) for i in range(100))), group_size=2, seed=0)
    early, late = ([work.group(i, place) for i in range(50)] for place in (0.2, 0.8))
    assert {(group.members[0].sampled_tokens, group.trains) for group in early} == {(10, True)}
    assert {(group.members[0].sampled_tokens, group.trains) for group in late} == {(100, False)}


# --- many devices


def test_the_best_split_is_where_both_are_busy():
    """A trainer of 1000 tokens/s and an engine of 500 for each device: a third of the devices should train."""
    engine = EngineCurve(concurrency=(1,), tokens_per_s=(500,))
    trainer = TrainerCurve(s_per_token=1e-3, efficiency=1.0)
    known = Curves(source="test", engine=engine, trainer=trainer, work=EVEN)
    one = rules(groups_per_step=32, max_outstanding=16 * 32, window=256, max_in_flight=64)
    splits = search(one, known, gpus=24, skip=10)
    assert best(splits).trainer_gpus == pytest.approx(8, abs=1)
    assert best(splits).outcome.step_s == pytest.approx(128 * 100 / 8000, rel=0.1)
    assert all(split.trainer_gpus + split.engines == 24 for split in splits)


def test_one_device_is_shared():
    splits = search(rules(), curves(EVEN), gpus=1, skip=5)
    assert [(split.is_shared, split.engines, split.trainer_gpus) for split in splits] == [(True, 1, 1)]


def test_too_few_devices_are_an_error():
    wide = EngineCurve(concurrency=(1,), tokens_per_s=(500,), gpus=8)
    with pytest.raises(UserError, match="an engine needs 8"):
        search(rules(), curves(engine=wide), gpus=4)


def test_ten_thousand_devices_take_seconds():
    began = time.process_time()
    wide = EngineCurve(concurrency=(1, 64), tokens_per_s=(100, 2000), gpus=8)
    large = rules(group_size=16, groups_per_step=256, max_outstanding=8192, window=512, engines=1100, steps=8)
    found = simulate(large, curves(engine=wide, step_s=10), skip=2)
    assert found.steps == 5
    assert time.process_time() - began < 15


def test_groups_go_where_the_fewest_are():
    loop = Loop(rules(engines=4, max_outstanding=64), curves(EVEN), seed=0)
    loop.settle()
    assert Counter(engine.in_flight for engine in loop.fleet.engines) == {16: 4}
