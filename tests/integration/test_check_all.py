"""`palestra env check --all --json`: everything that is installed is green, and machines can read it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "environments"
KEYS = {"environment", "passed", "failed", "skipped", "cases"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_that_is_installed_is_green():
    command = [sys.executable, "-m", "palestra.launch.cli", "env", "check", "--all", "--json", "-n", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590)
    reports = json.loads(done.stdout)
    failed = {report["environment"]: report["cases"] for report in reports if report["failed"]}
    assert (failed, done.returncode) == ({}, 0), done.stderr
    ours = {
        name
        for file in PACKAGES.glob("*/pyproject.toml")
        for name in tomllib.loads(file.read_text())["project"]["entry-points"]["palestra.environments"]
    }
    assert ours
    assert ours <= {report["environment"] for report in reports}
    for report in reports:
        assert report.keys() == KEYS
        assert {case["ending"] for case in report["cases"]} <= {"passed", "failed", "skipped"}
        assert len(report["cases"]) == report["passed"] + report["failed"] + report["skipped"] > 10
