"""What length adds to a reward, by hand."""

import pytest

from palestra.algo.shaping import LengthShaping


@pytest.mark.parametrize(("num_tokens", "added"), [(0, 0), (12, 0), (13, -0.25), (15, -0.75), (16, -1), (40, -1)])
def test_the_soft_overlong_punishment(num_tokens: int, added: float):
    shaping = LengthShaping(max_tokens=16, overlong_tokens=4, overlong_penalty=1.0)
    assert shaping.added_to_reward(num_tokens) == added


def test_the_length_penalty_grows_with_every_token():
    shaping = LengthShaping(max_tokens=100, penalty=0.2)
    assert [shaping.added_to_reward(n) for n in (0, 50, 100)] == pytest.approx([0, -0.1, -0.2])


def test_both_add_up():
    shaping = LengthShaping(max_tokens=100, penalty=0.2, overlong_tokens=10, overlong_penalty=0.5)
    assert shaping.added_to_reward(95) == pytest.approx(-0.19 - 0.25)


def test_off_adds_nothing():
    assert LengthShaping(max_tokens=8).is_off
    assert LengthShaping(max_tokens=8).added_to_reward(8) == 0
    assert not LengthShaping(max_tokens=8, overlong_tokens=2, overlong_penalty=1.0).is_off
