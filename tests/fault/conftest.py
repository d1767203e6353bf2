"""What the cases of the suite share: a model, a run with faults, and the table at the end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.cases import Maker
from tests.fault.counts import Counts, count, replayed
from tests.fault.table import FILE, Table
from tests.fault.whole_run import FaultyRun, save_table

ROW = "row of the table of faults"  # the property of a test: it travels from the process that ran it
_HEAD = (
    f"{'case':<58}{'finished':>9}{'trained':>8}{'lost':>6}{'twice':>6}{'back':>6}"
    f"{'version':>9}{'starts':>8}{'recovery':>10}"
)


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "when")]
    ran = [report for report in reports if report.when == "call"]
    if rows := [value for report in ran for name, value in report.user_properties if name == ROW]:
        terminalreporter.section("faults: what was lost, and how long it took")
        terminalreporter.write_line(_HEAD)
        for row in rows:
            terminalreporter.write_line(row)


def row_of(name: str, counts: Counts, steps: int, num_starts: int) -> str:
    took = "" if counts.recovery_s is None else f"{counts.recovery_s:.1f} s"
    lost, twice = len(counts.lost), len(counts.trained_twice) + len(counts.ended_twice)
    return (
        f"{name:<58}{counts.finished:>9}{counts.trained:>8}{lost:>6}{twice:>6}{len(counts.went_back):>6}"
        f"{counts.final_version:>6}/{steps:<2}{num_starts:>8}{took:>10}"
    )


@pytest.fixture(scope="session")
def table_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_table(tmp_path_factory.mktemp("models") / "table")


@pytest.fixture
def make(table_model: Path, tmp_path: Path) -> Maker:
    """Makes the run of a test that plays it by itself."""
    return Maker(table_model, tmp_path)


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Callable[..., Counts]:
    """Counts what a run did, notes the line of the table, and asserts that nothing is lost or trained twice."""

    def judge(run: FaultyRun, *, name: str, fired: int | None = None) -> Counts:
        config = run.config
        counts = count(run.run, run.witness, max_age=config.algo.max_age)
        record_property(ROW, row_of(name, counts, config.train.steps, run.num_starts))
        assert fired is None or len(run.witness.read("fired")) == fired, "the faults did not all happen"
        assert (counts.lost, counts.ended_twice, counts.trained_twice, counts.went_back) == ([], [], [], [])
        assert counts.steps == list(range(config.train.steps))
        assert counts.final_version == config.train.steps
        assert counts.finished >= counts.trained >= config.train.steps * config.algo.groups_per_step
        if run.kind == "table":
            assert Table.load(run.run.export / FILE).equals(replayed(run.run, Path(config.model_dir), config.train.lr))
        return counts

    return judge
