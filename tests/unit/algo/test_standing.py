"""What a leaderboard says, against numbers computed by hand, and what must not move it."""

import math
import random
from itertools import product

import pytest

from palestra.algo.intervals import over_tasks
from palestra.algo.standing import duel, standing
from palestra.core.records import Ending, RolloutRecord, Task


def record(key: str, reward: float, *, ending: Ending = Ending.OK, said: int = 10, heard: int = 90, error: str = ""):
    return RolloutRecord(
        rollout_id=0,
        environment="e",
        task=Task(key=key),
        ending=ending,
        reward=reward,
        num_turns=1,
        num_tokens=said,
        num_prompt_tokens=heard,
        error=error,
    )


def test_the_bootstrap_of_two_tasks_is_the_four_draws_there_are():
    """Tasks of 0 and 1: a quarter of the draws is 0, a quarter 1, half is 1/2; 95 % of them reach from 0 to 1."""
    found = over_tasks([0.0, 1.0])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_the_bootstrap_is_near_all_draws_of_four_tasks():
    """All 4^4 draws, one by one, against the random ones: the planted fault is a draw of rollouts instead of tasks."""
    sums, counts = [2.0, 0.0, 1.0, 3.0], [2, 2, 1, 4]
    means = sorted(sum(sums[i] for i in drawn) / sum(counts[i] for i in drawn) for drawn in product(range(4), repeat=4))
    found = over_tasks(sums, counts, resamples=20_000)
    assert found.value == pytest.approx(6 / 9)
    assert found.low == pytest.approx(means[int(0.025 * 256)], abs=0.02)
    assert found.high == pytest.approx(means[int(0.975 * 256)], abs=0.02)
    apart = over_tasks([1.0] * 6 + [0.0] * 3, resamples=20_000)
    assert apart.low > found.low + 0.05


def test_it_agrees_with_the_normal_interval_where_tasks_are_many():
    chance = random.Random(3)
    values = [chance.random() for _ in range(2000)]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / math.sqrt(len(values))
    found = over_tasks(values)
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=error / 8)
    assert over_tasks(values) == found
    assert over_tasks(values, seed=1) != found


def test_ten_times_the_same_rollouts_are_not_surer():
    once = over_tasks([0.0, 1.0, 1.0, 0.0, 1.0], [1] * 5)
    tenfold = over_tasks([0.0, 10.0, 10.0, 0.0, 10.0], [10] * 5)
    assert tenfold == once


def test_one_task_tells_nothing_of_others():
    found = standing([record("a", 1.0), record("a", 0.0)])
    assert (found.reward.value, found.reward.low, found.reward.high) == (0.5, None, None)


def test_a_standing_by_hand():
    """a: 1, 0; b: 1, 1, 0; c: one rollout, and one that is invalid, whose reward counts nowhere."""
    found = standing(
        [
            *(record("a", reward) for reward in (1.0, 0.0)),
            *(record("b", reward) for reward in (1.0, 1.0, 0.0)),
            record("c", 0.0, ending=Ending.TRUNCATED, said=40),
            record("c", 0.0, ending=Ending.INVALID, error="no answer\nline 3", said=0, heard=5),
        ]
    )
    assert found.reward.value == pytest.approx(3 / 6)
    assert found.avg_at_k.value == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert (found.k, found.num_tasks, found.num_rollouts, found.num_errors) == (1, 3, 6, 1)
    assert list(found.pass_at) == ["1"]
    assert found.pass_at["1"].value == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert found.errors == {"no answer": 1}
    assert found.endings == {"ok": 5, "truncated": 1, "invalid": 1}
    assert (found.tokens.completion, found.tokens.prompt) == (90, 545)
    assert found.tokens.per_rollout == pytest.approx(635 / 7)


def test_pass_at_2_of_four_rollouts_by_hand():
    """1 - C(3, 2) / C(4, 2) = 1/2 of the one that was solved once, and 0."""
    found = standing([*(record("a", reward) for reward in (1, 0, 0, 0)), *(record("b", 0) for _ in range(4))])
    assert {k: interval.value for k, interval in found.pass_at.items()} == pytest.approx(
        {"1": 1 / 8, "2": 1 / 4, "4": 1 / 2}
    )


def test_what_nobody_counted_is_no_zero():
    assert standing([record("a", 1.0, heard=0)]).tokens.prompt is None
    assert standing([record("a", 1.0, heard=0), record("b", 1.0)]).tokens.prompt is None


def test_fifty_tasks_that_all_fail_do_not_prove_that_none_would_succeed():
    found = standing([record(str(number), 0.0) for number in range(50)])
    assert (found.reward.low, found.reward.high) == pytest.approx((0.0, 0.0582), abs=1e-4)


def test_errors_alone_are_no_standing():
    with pytest.raises(ValueError, match="no rollout has a reward"):
        standing([record("a", 0.0, ending=Ending.INVALID)])


def test_two_evaluations_task_by_task_by_hand():
    found = duel({"a": 0.0, "b": 0.5, "c": 1.0, "x": 1.0}, {"a": 1.0, "b": 0.25, "c": 1.0, "y": 0.0, "z": 0.0})
    assert found.difference.value == pytest.approx((1.0 - 0.25 + 0.0) / 3)
    assert (found.won, found.lost, found.alike) == (1, 1, 1)
    assert (found.only_one, found.only_other) == (1, 2)
    assert [pair.key for pair in found.pairs] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no task is in both"):
        duel({"a": 1.0}, {"b": 1.0})


def test_a_paired_difference_is_surer_than_two_means():
    """Tasks differ far more than the models: the difference of each is 0.05."""
    one = {str(number): number / 10 for number in range(10)}
    found = duel(one, {key: value + 0.05 for key, value in one.items()})
    assert (found.difference.low, found.difference.high) == (pytest.approx(0.05), pytest.approx(0.05))
    assert (found.won, found.lost) == (10, 0)
    apart = over_tasks(list(one.values()))
    assert apart.high - apart.low > 0.2
