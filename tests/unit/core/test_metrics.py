"""Metrics that add: the whole is the sum of its parts, however they are cut."""

import math

import pytest

from palestra.core.metrics import Last, Max, Mean, Metrics, Sum, merge, percentile, values


def test_a_mean_adds_totals_and_counts():
    assert (Mean(6.0, 3) + Mean(10.0, 1)).value == 4.0


def test_a_mean_of_means_is_something_else():
    """The fault that `Mean` is there against: unequal parts weighed equally."""
    parts = [Mean(6.0, 3), Mean(10.0, 1)]
    mean_of_means = sum(part.value for part in parts) / len(parts)
    assert mean_of_means == 6.0
    assert merge([{"reward": part} for part in parts])["reward"].value == 4.0


def test_parts_of_ranks_equal_one_rank():
    rewards = [0.0, 1.0, 1.0, 0.25, 0.5]
    whole = merge({"reward": Mean(reward)} for reward in rewards)["reward"]
    left, right = (merge({"reward": Mean(r)} for r in part)["reward"] for part in (rewards[:1], rewards[1:]))
    assert whole.value == sum(rewards) / 5
    assert merge([{"reward": left}, {"reward": right}])["reward"] == whole


def test_an_empty_mean_has_no_value_but_adds():
    assert math.isnan(Mean(0.0, 0).value)
    assert (Mean(0.0, 0) + Mean(3.0, 2)).value == 1.5


def test_sum_max_and_last():
    steps: list[Metrics] = [
        {"tokens": Sum(10.0), "lag": Max(3.0), "lr": Last(0.2)},
        {"tokens": Sum(5.0), "lag": Max(1.0), "lr": Last(0.1)},
    ]
    assert values(merge(steps)) == {"tokens": 15.0, "lag": 3.0, "lr": 0.1}


def test_a_name_that_only_one_part_has_is_kept():
    assert merge([{"a": Sum(1.0)}, {"b": Sum(2.0)}]) == {"a": Sum(1.0), "b": Sum(2.0)}


def test_one_name_with_two_kinds_is_refused():
    with pytest.raises(TypeError, match="metric reward is a Mean and a Sum"):
        merge([{"reward": Mean(1.0)}, {"reward": Sum(1.0)}])


@pytest.mark.parametrize(
    ("numbers", "share", "expected"),
    [
        (range(1, 101), 0.99, 99),
        (range(1, 101), 1.0, 100),
        ([0, 1], 0.5, 0),
        ([3, 1, 2], 0.5, 2),
        ([5], 0.01, 5),
        ([], 0.99, 0),
    ],
)
def test_a_percentile_is_the_smallest_that_so_many_do_not_exceed(numbers, share, expected):
    assert percentile(list(numbers), share) == expected
