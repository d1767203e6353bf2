"""Cgroups of version 2 hold what a sandbox may use, in a guest whose kernel has them: see `tests/guest/run.py`."""

from typing import Any

import pytest

from tests.guest import run
from tests.guest.debian import Unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_LIMIT_S = 800.0


CASES = [case for case in run.CASES if case != "one_shot"]  # measures times, which a busy machine makes longer


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """Of one case without a limit; of all of them, last, as the next check would sweep what they leave."""
    try:
        return run.reports([(["memory_of_eight_children"], ("cgroup", "watchdog")), (CASES, ())], limit_s=_LIMIT_S)
    except Unavailable as error:
        pytest.skip(str(error))


def test_all_limits_hold_and_nothing_is_left(told) -> None:
    all_cases = told[1]
    assert [case for case in all_cases["cases"] if not case["passed"]] == []
    assert run.holds(all_cases, CASES)
    assert all_cases["swept"] > 0  # of the owner that a case kills
    assert all_cases["left"] == []


def test_without_a_limit_the_memory_goes_through(told) -> None:
    unlimited = told[0]
    assert not run.holds(unlimited, ["memory_of_eight_children"])
    assert "cgroup_v2" not in unlimited["layers"]
    assert [case["passed"] for case in unlimited["cases"]] == [False]
