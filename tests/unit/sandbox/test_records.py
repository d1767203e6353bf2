"""Limits that make no sense are refused; a result says in a word how its program ended."""

import pytest

from palestra.core.errors import UserError
from palestra.sandbox import Limits, Result


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"memory_mb": 1}, "memory_mb=1"),
        ({"disk_mb": 0}, "disk_mb=0"),
        ({"processes": 1}, "processes=1"),
        ({"cpus": 0}, "cpus=0"),
    ],
)
def test_limits_say_what_they_may_be(wrong: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Limits(**wrong)


@pytest.mark.parametrize(
    ("of", "status"),
    [
        ({"exit_code": 0}, "ok"),
        ({"exit_code": 1}, "failed"),
        ({"signal": 11}, "failed"),
        ({"timed_out": True}, "timed_out"),
        ({"oom": True, "signal": 9}, "oom"),
        ({"exit_code": 0, "oom": True}, "ok"),  # a child of it was killed, and it did not mind
    ],
)
def test_status(of: dict, status: str) -> None:
    assert Result(**of).status == status
