"""What an evaluation says, against numbers computed by hand."""

import math
import statistics

import pytest

from palestra.algo.scores import difference, estimate, of_rewards, pass_at_k, scores
from palestra.core.records import Ending, RolloutRecord, Task


def record(key: str, reward: float, *, ending: Ending = Ending.OK, error: str = "", tokens: int = 10) -> RolloutRecord:
    return RolloutRecord(
        rollout_id=0,
        environment="e",
        task=Task(key=key),
        ending=ending,
        reward=reward,
        rewards={} if ending == Ending.INVALID else {"right": reward},
        num_tokens=tokens,
        num_turns=1,
        error=error,
    )


def test_with_one_rollout_of_each_task_it_is_the_textbooks_standard_error():
    values = [0.0, 1.0, 1.0, 0.5]
    found = estimate({str(number): [value] for number, value in enumerate(values)})
    assert found.mean == statistics.mean(values)
    assert found.standard_error == pytest.approx(statistics.stdev(values) / 2)
    assert (found.low, found.high) == pytest.approx(
        (found.mean - 1.959964 * found.standard_error, found.mean + 1.959964 * found.standard_error)
    )


def test_rollouts_of_one_task_are_one_cluster():
    """The same rollout ten times tells no more than once. The planted fault: an error over all rollouts alike."""
    once = estimate({"a": [0.0], "b": [1.0], "c": [1.0]})
    tenfold = estimate({"a": [0.0] * 10, "b": [1.0] * 10, "c": [1.0] * 10})
    assert tenfold.standard_error == pytest.approx(once.standard_error)
    alike = statistics.stdev([0.0] * 10 + [1.0] * 20) / math.sqrt(30)
    assert tenfold.standard_error > 3 * alike


def test_clusters_of_different_sizes_by_hand():
    found = estimate({"a": [1.0, 1.0], "b": [0.0]})
    assert found.mean == pytest.approx(2 / 3)
    # deviations of the sums: 2 - 4/3 = 2/3 and 0 - 2/3 = -2/3; sqrt(2/1 * 8/9) / 3
    assert found.standard_error == pytest.approx(math.sqrt(16 / 9) / 3)


def test_one_task_tells_nothing_of_others():
    found = estimate({"a": [0.0, 1.0]})
    assert (found.mean, found.standard_error, found.low, found.high) == (0.5, None, None, None)


@pytest.mark.parametrize(
    ("num", "solved", "k", "share"), [(4, 0, 2, 0.0), (4, 4, 2, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 3, 1.0)]
)
def test_pass_at_k_by_hand(num, solved, k, share):
    assert pass_at_k(num, solved, k) == pytest.approx(share)


def test_a_summary_counts_what_has_a_reward_and_names_why_others_have_none():
    found = scores(
        [
            record("a", 1.0),
            record("a", 0.0, ending=Ending.TRUNCATED, tokens=30),
            record("b", 1.0),
            record("b", 0.0, ending=Ending.INVALID, error="no answer\nat line 3", tokens=0),
        ]
    )
    assert found["reward"]["mean"] == pytest.approx(2 / 3)
    assert (found["reward"]["num_rollouts"], found["reward"]["num_tasks"]) == (3, 2)
    assert found["pass_at"] == {"1": pytest.approx(0.75)}  # b has one rollout with a reward
    assert found["rewards"] == {"right": pytest.approx(2 / 3)}
    assert found["tokens"] == pytest.approx(50 / 3)
    assert found["endings"] == {"ok": 2, "truncated": 1, "invalid": 1}
    assert found["errors"] == {"no answer": 1}


@pytest.mark.parametrize(("reward", "low", "high"), [(0.0, 0.0, 0.0582), (1.0, 0.9418, 1.0), (0.5, 0.5, 0.5)])
def test_fifty_tasks_that_all_fail_do_not_prove_that_none_would_succeed(reward, low, high):
    """(1 - 0.0582)^50 = 0.05."""
    found = of_rewards({str(task): [reward, reward] for task in range(50)})
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert (found.mean, found.standard_error) == (reward, 0)


def test_a_difference_is_paired_by_task():
    """Tasks differ far more than the models: apart from each other they prove nothing, paired they do."""
    one = [record(str(number), number / 10) for number in range(10)]
    other = [record(str(number), number / 10 + 0.05) for number in range(10)]
    found = difference(one, other)
    assert (found.mean, found.standard_error) == (pytest.approx(0.05), pytest.approx(0.0, abs=1e-12))
    assert estimate({r.task.key: [r.reward] for r in one}).standard_error > 0.05
    with pytest.raises(ValueError, match="no task is in both"):
        difference(one, [record("x", 1.0)])
