"""Quantiles of the ratio by age: equal to those of all tokens within the width of a bin, however the tokens are cut."""

import math

import numpy as np
import pytest
import torch

from palestra.core.metrics import values
from palestra.train.spread import AGE_BUCKETS, QUANTILES, histogram, spread_metrics


def counts(log_ratio, age, where=None):
    where = np.ones(len(log_ratio)) if where is None else where
    return histogram(torch.tensor(log_ratio), torch.tensor(age), torch.tensor(where) != 0)


def test_quantiles_by_hand():
    # 100 values -0.50, -0.49, ..., 0.49: the smallest that 1 % do not exceed is the first, the median is the 50th
    log_ratio = [i / 100 - 0.5 for i in range(100)]
    found = values(spread_metrics(counts(log_ratio, [2] * 100)))
    assert set(found) == {f"train/rl/log_ratio/age_2/{name}" for name in QUANTILES}
    assert found["train/rl/log_ratio/age_2/p01"] == pytest.approx(-0.50, rel=0.075)
    assert found["train/rl/log_ratio/age_2/p50"] == pytest.approx(-0.01, rel=0.075)
    assert found["train/rl/log_ratio/age_2/p99"] == pytest.approx(0.48, rel=0.075)


def test_ages_fall_into_their_buckets():
    ages = [0, 1, 2, 3, 4, 5, 8, 9, 30]
    per_bucket = counts([0.1] * 9, ages).sum(1).tolist()
    assert dict(zip(AGE_BUCKETS, per_bucket, strict=True)) == {
        "age_0": 1,
        "age_1": 1,
        "age_2": 1,
        "age_3_4": 2,
        "age_5_8": 2,
        "age_9_up": 2,
    }


@pytest.mark.parametrize("scale", [1e-3, 0.03, 1.0])
def test_packs_add_up_to_the_quantiles_of_all_tokens(scale: float):
    rng = np.random.default_rng(0)
    log_ratio, age = scale * rng.standard_t(2, 20_000), rng.integers(0, 4, 20_000)
    cuts = [slice(0, 300), slice(300, 9000), slice(9000, None)]
    whole = sum((counts(log_ratio[cut], age[cut]) for cut in cuts), torch.zeros(1))
    assert torch.equal(whole, counts(log_ratio, age))
    found = values(spread_metrics(whole))
    for name, of_age in {"age_0": age == 0, "age_1": age == 1, "age_3_4": age == 3}.items():
        for quantile, share in QUANTILES.items():
            exact = np.quantile(log_ratio[of_age], share, method="inverted_cdf")
            assert found[f"train/rl/log_ratio/{name}/{quantile}"] == pytest.approx(exact, rel=0.08, abs=1e-4)
    # the control: the mean of the parts' quantiles is another number
    parts = [np.quantile(log_ratio[cut][age[cut] == 0], 0.99) for cut in cuts]
    assert np.mean(parts) != pytest.approx(np.quantile(log_ratio[age == 0], 0.99), rel=0.02)


def test_only_trained_tokens_count_and_the_absurd_stays_finite():
    found = counts([0.5, math.nan, math.inf, -math.inf, 9.0], [0] * 5, [1, 1, 1, 1, 0])
    assert found.sum() == 4
    numbers = values(spread_metrics(found))
    assert numbers["train/rl/log_ratio/age_0/p99"] == pytest.approx(20, rel=0.08)
    assert numbers["train/rl/log_ratio/age_0/p01"] == pytest.approx(-20, rel=0.08)


def test_on_policy_it_is_zero():
    assert set(values(spread_metrics(counts([1e-6, -2e-7, 0.0], [0] * 3))).values()) == {0.0}


def test_no_tokens_no_numbers():
    assert spread_metrics(counts(np.zeros(0), np.zeros(0, np.int64))) == {}
