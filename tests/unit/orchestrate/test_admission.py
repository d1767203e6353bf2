"""Admission: the law by hand-computed numbers; loads on a simulated engine, with controls that fail."""

import pytest

from palestra.orchestrate import admission
from palestra.orchestrate.admission import Admission, Reading, begin, expected_kv
from tests.unit.orchestrate.simulated import Controlled, SimulatedEngine, Trace, fixed, log_normal, simulate


def reading(kv_use: float = 0.0, *, rollouts: int = 0, ended: int = 0, preempted: int = 0, waiting: int = 0) -> Reading:
    return Reading(kv_use=kv_use, waiting=waiting, preempted=preempted, rollouts=rollouts, ended=ended)


def started(limit: int, *, most: int = 1000) -> Admission:
    return begin(reading(), most=most, safe=limit)


def after_generation(limit: int, kv_use: float, *, rollouts: int | None = None, waiting: int = 0) -> Admission:
    """With a steady use, and exactly as many rollouts ended as a generation has."""
    state, rollouts = started(limit), limit if rollouts is None else rollouts
    state = state.next(reading(kv_use, rollouts=rollouts, ended=max(2 * limit, 128) - 1, waiting=waiting))
    assert state.limit == limit, "no verdict before the generation is complete"
    return state.next(reading(kv_use, rollouts=rollouts, ended=max(2 * limit, 128), waiting=waiting))


# --- the law


def test_it_starts_with_what_has_room_at_full_length_and_never_exceeds_the_most():
    assert started(24, most=256).limit == 24
    assert started(600, most=256).limit == 256
    assert begin(reading(), most=256, safe=0.4).limit == 1
    assert begin(reading(), most=256, safe=None).limit == 256


def test_growth_goes_to_the_rollouts_that_fill_the_cache_at_most_doubled():
    assert after_generation(100, 0.66).limit == 166  # 1.1 / 0.0066
    assert after_generation(100, 0.2).limit == 200  # not 550
    assert after_generation(100, 0.8).limit == 137  # 1.1 / 0.008


def test_within_the_band_nothing_changes():
    """1.1 / (use / 100) is within 100 / 1.3 and 130 for uses of 0.847 to 1.43."""
    assert after_generation(100, 0.84).limit == 130
    assert after_generation(100, 0.85).limit == 100
    assert after_generation(100, 0.89).limit == 100


def test_no_growth_where_slots_are_unused_or_requests_wait():
    assert after_generation(100, 0.3, rollouts=99).limit == 100
    assert after_generation(100, 0.3, waiting=1).limit == 100


def test_a_limit_that_is_not_reached_is_trimmed_to_what_would_fill_the_cache():
    """40 rollouts hold 0.88: each 0.022, so 50 would fill 1.1."""
    assert after_generation(100, 0.88, rollouts=40).limit == 50


def test_generations_are_averaged_by_the_rollouts_that_ended_in_them():
    """200 rollouts at 0.009, then 200 at 0.011 each: 0.010."""
    state = after_generation(100, 0.9)
    state = state.next(reading(1.1, rollouts=100, ended=400))
    assert state.kv_each == pytest.approx(0.010)
    assert state.known == 400


def test_rollouts_that_hold_twice_as_much_are_measured_anew():
    """Beside as much of the past: (0.004 + 0.012) / 2 after one generation, whatever was known before."""
    state = after_generation(100, 0.4)
    for ended in range(400, 1400, 200):
        state = state.next(reading(0.4, rollouts=100, ended=200 + ended))
    before = state
    state = state.next(reading(0.012 * 90, rollouts=90, ended=before.last.ended + 2 * before.limit))
    assert before.kv_each == pytest.approx(0.004)
    assert state.kv_each == pytest.approx(0.008)


def test_the_brake_looks_one_reading_ahead_as_far_as_the_same_rollouts_are_there():
    before = reading(0.7, rollouts=100, ended=0)
    assert expected_kv(before, reading(0.8, rollouts=100, ended=0)) == pytest.approx(0.9)
    assert expected_kv(before, reading(0.8, rollouts=100, ended=50)) == pytest.approx(0.85)
    assert expected_kv(before, reading(0.8, rollouts=100, ended=300)) == pytest.approx(0.8)
    assert expected_kv(before, reading(0.6, rollouts=100, ended=0)) == pytest.approx(0.6)
    state = started(100).next(reading(0.75, rollouts=100))
    assert state.is_braked  # from 0.0
    assert not state.next(reading(0.8, rollouts=100)).is_braked
    assert state.next(reading(0.91, rollouts=100)).is_braked
    assert not state.next(reading(0.91, rollouts=99)).is_braked, "there is room for 100 at their full length"


def test_more_preemptions_than_three_quarters_of_the_rollouts_cut_the_limit_once_until_it_has_taken_effect():
    state = started(100)
    assert state.next(reading(0.5, rollouts=100, preempted=75)).limit == 100
    state = state.next(reading(0.5, rollouts=100, preempted=76))
    assert state.limit == 80
    assert state.aim == pytest.approx(0.99)
    state = state.next(reading(0.5, rollouts=95, preempted=500))
    assert state.limit == 80, "95 rollouts are still there: the cut has not taken effect"
    assert state.next(reading(0.5, rollouts=80, preempted=1)).limit == 64


# --- loads

POOL = 20_000
SETTLED = 600


def engine(*, shown: float = 1.0) -> SimulatedEngine:
    return SimulatedEngine(pool_tokens=POOL, max_tokens=20 + 16 * 50, shown=shown)


def steady(limit_of, seed: int = 0, **kind: float) -> Trace:
    return simulate(engine(**kind), log_normal(50), limit_of, seconds=1600, seed=seed)


def is_calm(trace: Trace) -> bool:
    return trace.turns(SETTLED) <= 1


@pytest.fixture(scope="module")
def best() -> float:
    """Tokens per second of the best fixed limit: about 170, which nobody knows beforehand."""
    limits = (110, 140, 155, 170, 190)
    runs = [simulate(engine(), log_normal(50), fixed(limit), seconds=600) for limit in limits]
    return max(run.tokens_per_s(200) for run in runs)


@pytest.mark.parametrize("seed", range(2))
def test_under_a_step_it_converges_near_the_best_fixed_limit(best: float, seed: int):
    trace = steady(Controlled(), seed)
    assert trace.tokens_per_s(SETTLED) > 0.98 * best
    assert trace.preempted_share(SETTLED) < 0.15
    assert is_calm(trace)


@pytest.mark.parametrize("seed", range(2))
def test_where_few_rollouts_fit_it_is_careful(seed: int):
    """About 30: chance moves cache use by a third. The best fixed limit preempts every rollout more than once."""

    def small(limit_of) -> Trace:
        engine = SimulatedEngine(pool_tokens=4000, max_tokens=20 + 16 * 50)
        return simulate(engine, log_normal(50), limit_of, seconds=2000, seed=seed)

    careful, best = small(Controlled()), small(fixed(46))
    assert best.preempted_share(SETTLED) > 1
    assert careful.preempted_share(SETTLED) < 0.15
    assert careful.tokens_per_s(SETTLED) > 0.8 * best.tokens_per_s(SETTLED)
    assert careful.turns(SETTLED) <= 8


def test_a_limit_that_is_too_high_costs_little_with_the_brake_and_much_without():
    def braked(engine: SimulatedEngine) -> tuple[int, bool]:
        return 190, Controlled.__call__(control, engine)[1]

    control = Controlled()
    with_brake, without = steady(braked), steady(fixed(190))
    assert with_brake.preempted_share(SETTLED) < 0.3 * without.preempted_share(SETTLED)
    assert with_brake.tokens_per_s(SETTLED) > without.tokens_per_s(SETTLED)


def test_without_hysteresis_and_generations_it_swings(monkeypatch):
    for name, value in {"_BAND": 1.0, "_LIVES": 0.0, "_FEW": 1, "_MEMORY": 1}.items():
        monkeypatch.setattr(admission, name, value)
    trace = steady(Controlled())
    assert trace.turns(SETTLED) > 20


@pytest.mark.parametrize("seed", range(2))
def test_a_full_cache_that_the_gauge_does_not_show_is_found_by_its_preemptions(seed: int):
    trace = steady(Controlled(), seed, shown=0.6)
    assert trace.preempted_share(SETTLED) < 0.3
    assert is_calm(trace)


def test_ignoring_preemptions_thrashes_there(monkeypatch):
    monkeypatch.setattr(admission, "_SHARE", 1e9)
    assert steady(Controlled(), shown=0.6).preempted_share(SETTLED) > 0.6


def test_under_a_ramp_of_demand_it_follows_and_settles(best: float):
    trace = simulate(engine(), log_normal(50), Controlled(), seconds=2000, demand=lambda now_s: 5 + now_s / 5)
    assert all(limit >= rollouts for limit, rollouts in zip(trace.limits[600:], trace.rollouts[600:], strict=True))
    assert trace.tokens_per_s(1200) > 0.96 * best
    assert trace.turns(0) <= 3


@pytest.mark.parametrize("seed", range(2))
def test_sudden_long_contexts_are_survived_and_headroom_is_recovered(best: float, seed: int):
    """Replies six times as long for a while: a sixth of the rollouts fit."""

    def law(rng, now_s):
        prompt, reply = log_normal(50)(rng, now_s)
        return prompt, 6 * reply if 600 <= now_s < 2400 else reply

    def roomy() -> SimulatedEngine:
        return SimulatedEngine(pool_tokens=POOL, max_tokens=20 + 6 * 16 * 50)

    trace = simulate(roomy(), law, Controlled(), seconds=3000, seed=seed)
    careless = simulate(roomy(), law, fixed(170), seconds=1200, seed=seed)
    assert trace.preempted_share(600, 1199) < 0.5 * careless.preempted_share(600, 1199)
    assert max(trace.limits[1500:2400]) < 60, "about a sixth of what fitted before"
    assert trace.turns(1300, 2400) <= 2
    assert trace.tokens_per_s(2700) > 0.96 * best
    assert trace.turns(2700) == 0


def test_an_engine_with_room_for_all_is_never_held_back():
    """Short rollouts, a large cache: the most from the first moment to the last, as without any controller."""

    def large() -> SimulatedEngine:
        return SimulatedEngine(pool_tokens=10**6, max_tokens=820)

    trace = simulate(large(), log_normal(50), Controlled(most=256), seconds=200)
    assert trace == simulate(large(), log_normal(50), fixed(256), seconds=200)
