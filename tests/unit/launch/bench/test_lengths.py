"""The law of lengths, against numbers computed by hand and its own integral."""

from random import Random

import pytest

from palestra.launch.bench.lengths import LengthLaw

LAW = LengthLaw(median=64)


@pytest.mark.parametrize(("z", "tokens"), [(0.0, 64), (1.0, 174), (-1.0, 24), (2.0, 473), (2.77, 1021), (-9.0, 1)])
def test_lengths_at_given_deviations(z: float, tokens: int):
    """64 e = 173.97, 64 / e = 23.54, 64 e^2 = 472.90, 64 e^2.77 = 1021.4"""
    assert LAW.at(z) == tokens


def test_the_cap_is_a_multiple_of_the_median():
    assert LAW.longest == 1024
    assert LAW.at(3.0) == 1024  # 64 e^3 = 1285
    assert LengthLaw(median=64, cap=1e9).at(3.0) == 1285


def test_the_mean_is_that_of_the_law():
    """Without a cap e^0.5 medians; with one at 16: 1.6487 x 0.9618 + 16 x 0.00277 = 1.6301 medians."""
    assert LengthLaw(median=1, cap=1e12).mean == pytest.approx(1.6487, abs=1e-4)
    assert LAW.mean / 64 == pytest.approx(1.6301, abs=2e-3)
    drawn = [LAW.draw(Random(seed)) for seed in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(LAW.mean, rel=0.02)
    assert sorted(drawn)[10_000] == pytest.approx(64, abs=2)


def test_a_law_without_spread():
    law = LengthLaw(median=7, sigma=0.0)
    assert {law.draw(Random(seed)) for seed in range(5)} == {7}
    assert law.mean == 7


def test_the_seed_alone_decides():
    lengths = [LAW.draw(Random(seed)) for seed in range(50)]
    assert lengths == [LAW.draw(Random(seed)) for seed in range(50)]
    assert lengths != [LAW.draw(Random(seed + 50)) for seed in range(50)]
