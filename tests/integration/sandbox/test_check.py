"""The backend `local` withstands every attack, as root and as an ordinary user, and each of its walls is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.core.errors import UserError
from palestra.sandbox import Isolation, Options, SandboxStartError
from palestra.sandbox.check import Outcome, Report, check
from tests.integration.sandbox import ordinary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LEAST = 29


async def reported(*, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> tuple[Report, dict[str, Outcome]]:
    options = Options(backend="local", packages=("numpy",), without=without)
    told = [one async for one in check(options, only=only)]
    report = told[-1]
    assert isinstance(report, Report)
    return report, {outcome.name: outcome for outcome in report.cases}


async def test_all_cases_hold() -> None:
    report, outcomes = await reported()
    assert [o for o in outcomes.values() if o.passed is False] == []
    assert report.isolation == "namespaces"
    assert report.passed >= LEAST
    skipped = {o.name for o in outcomes.values() if o.passed is None}
    assert skipped <= {"own_user", "processor_share"}


def test_all_cases_hold_for_an_ordinary_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become an ordinary user; the test above ran as one")
    command = [sys.executable, "-m", "palestra.launch.cli", "sandbox", "check", "--backend", "local", "--json"]
    command += ["--packages", "numpy"]
    source = str(Path(__file__).parents[3] / "src")
    done = subprocess.run(
        [sys.executable, ordinary.__file__, *command],
        capture_output=True,
        text=True,
        timeout=1700,
        env={**os.environ, "PYTHONPATH": source},
    )
    report = json.loads(done.stdout)
    assert [c for c in report["cases"] if c["passed"] is False] == [], done.stderr[-2000:]
    assert (done.returncode, report["failed"]) == (0, 0)
    assert "uid" not in report["layers"]
    assert report["passed"] >= LEAST


NEEDED = [
    (("seccomp",), ("namespaces", "io_uring", "keyrings", "userfaultfd", "netlink"), ()),
    (("network",), ("tcp", "udp", "abstract_socket"), ()),
    (("read_only",), ("read_only_root",), ()),
    (("uid",), ("own_user",), ("root",)),
    (("no_capabilities",), ("rights",), ()),
    (("cgroup", "watchdog"), ("memory_of_eight_children",), ()),
]


@pytest.mark.parametrize(("without", "broken", "needs"), NEEDED, ids=lambda value: "+".join(value))
async def test_each_wall_is_needed(without: tuple[str, ...], broken: tuple[str, ...], needs: tuple[str, ...]) -> None:
    if "root" in needs and os.geteuid() != 0:
        pytest.skip("only root can give sandboxes users of their own")
    _, with_it = await reported(only=broken)
    assert {o.name: o.passed for o in with_it.values()} == dict.fromkeys(broken, True)
    _, without_it = await reported(only=broken, without=without)
    assert {o.name: o.passed for o in without_it.values()} == dict.fromkeys(broken, False)


async def test_the_watchdog_holds_what_cgroups_hold() -> None:
    cases = ("memory_of_one_process", "memory_of_eight_children", "memfd")
    report, outcomes = await reported(only=cases, without=("cgroup",))
    assert "watchdog" in report.layers
    assert [o for o in outcomes.values() if not o.passed] == []


async def test_walls_and_cases_that_there_are_not() -> None:
    with pytest.raises(UserError, match="no wall 'moat'"):
        await reported(without=("moat",))
    with pytest.raises(UserError, match="no case 'nonsense'"):
        await reported(only=("nonsense",))


async def test_less_isolation_than_asked_for_is_refused() -> None:
    with pytest.raises(UserError, match="min_isolation"):
        async for _ in check(Options(backend="local", min_isolation=Isolation.KERNEL)):
            pass


@pytest.mark.parametrize("backend", ["bwrap", "gvisor"])
async def test_all_cases_hold_elsewhere(backend: str) -> None:
    told: list[Outcome | Report] = []
    try:
        async for one in check(Options(backend=backend)):
            told.append(one)
    except SandboxStartError as error:
        if told:
            raise
        pytest.skip(f"{backend} does not work here: {error}")
    report = told[-1]
    assert isinstance(report, Report)
    assert [o for o in report.cases if o.passed is False] == []
    assert report.passed >= LEAST
