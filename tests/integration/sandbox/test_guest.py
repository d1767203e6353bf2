"""Cgroups of version 2 hold what a sandbox may use, in a guest whose kernel has them: see `tests/guest/run.py`."""

from typing import Any

import pytest

from tests.guest import run
from tests.guest.debian import Unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
_LIMIT_S = 200.0


def report(cases: list[str], **options: Any) -> dict[str, Any]:
    try:
        return run.report(cases, limit_s=_LIMIT_S, **options)
    except Unavailable as error:
        pytest.skip(str(error))


def test_all_limits_hold_and_nothing_is_left() -> None:
    cases = [case for case in run.CASES if case != "one_shot"]  # measures times, which a busy machine makes longer
    told = report(cases)
    assert [case for case in told["cases"] if not case["passed"]] == []
    assert run.holds(told, cases)
    assert told["swept"] > 0  # of the owner that a case kills
    assert told["left"] == []


def test_without_a_limit_the_memory_goes_through() -> None:
    told = report(["memory_of_eight_children"], without=("cgroup", "watchdog"))
    assert not run.holds(told, ["memory_of_eight_children"])
    assert "cgroup_v2" not in told["layers"]
    assert [case["passed"] for case in told["cases"]] == [False]
