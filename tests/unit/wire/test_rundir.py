"""The run directory: attempts, checkpoints, and what a run tells about itself."""

import json
import resource
from pathlib import Path

import pytest

from palestra.core.errors import InfrastructureError, UserError
from palestra.core.ledger import LedgerEntry
from palestra.core.metrics import Mean
from palestra.wire.rundir import (
    Attempt,
    Manifest,
    RunDir,
    checkpoint_dir,
    drop_checkpoints,
    read_manifests,
    require_run,
    write_manifest,
)
from palestra.wire.runlog import (
    Restarted,
    RunLog,
    account_for_gap,
    append_restart,
    read_ledger,
    read_metrics,
    read_restarts,
    read_summary,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "demo")
    run.path.mkdir()
    return run


def save(run: RunDir, version: int) -> None:
    checkpoint_dir(run, version).mkdir(parents=True)
    write_manifest(run, Manifest(version=version, attempt=1, trainer="trainer", orchestrator="orchestrator"))


def test_asking_for_a_path_creates_nothing(tmp_path: Path):
    run = RunDir(tmp_path / "demo")
    for path in (run.log("trainer"), run.spans("trainer"), run.journal, run.batches.directory, run.export):
        assert run.path in path.parents
    assert not run.path.exists()
    assert run.name == "demo"


def test_attempts_are_numbered_and_read_back(run: RunDir):
    assert run.last_attempt_number() == 0
    attempt = Attempt(
        number=3,
        resumed_from=7,
        supervisor="ipc:///s",
        orchestrator="ipc:///o",
        engines=("http://127.0.0.1:1",),
        staging="/dev/shm/x",
        started_at=1.5,
    )
    run.write_attempt(attempt)
    assert run.read_attempt() == attempt
    assert run.last_attempt_number() == 3


def test_only_a_run_is_a_run(run: RunDir):
    with pytest.raises(UserError, match=r"has no config\.json; `palestra runs ls`"):
        require_run(run.path)
    run.config.write_text("{}")
    assert require_run(run.path).path == run.path


def test_a_checkpoint_without_its_manifest_does_not_exist(run: RunDir):
    assert read_manifests(run) == []
    for version in (100, 5):
        save(run, version)
    half = checkpoint_dir(run, 200)
    (half / "trainer").mkdir(parents=True)
    (half / ".manifest.json.4711").write_text('{"version":200,"attempt":1,"trainer":"trainer","orchestrator":"o"}')
    assert [manifest.version for manifest in read_manifests(run)] == [5, 100]


def test_a_manifest_that_cannot_be_read_is_named(run: RunDir):
    save(run, 5)
    (checkpoint_dir(run, 5) / "manifest.json").write_text('{"version":5')
    with pytest.raises(InfrastructureError, match="delete its directory to use the one before"):
        read_manifests(run)


def test_what_a_run_tells_reads_back(run: RunDir):
    log = RunLog(run)
    log.metrics(0, {"reward": Mean(3.0, 4), "nothing": Mean(0.0, 0)}, attempt=2)
    entry = LedgerEntry(process="trainer", started_at=1.0, wall_s=2.0, parts_s={"work": 2.0})
    log.ledger(entry)
    assert read_summary(run) is None
    log.summary({"steps": 1})
    (row,) = read_metrics(run)
    assert (row["step"], row["reward"], row["attempt"], "nothing" in row) == (0, 0.75, 2, False)
    assert read_ledger(run) == [entry]
    assert read_summary(run) == {"steps": 1}
    log.close()


def test_the_gap_of_a_process_is_accounted_for_from_its_last_entry_on(run: RunDir):
    log = RunLog(run)
    for process, started_at in (("trainer", 100.0), ("trainer-1", 101.0), ("env-0", 102.0)):
        log.ledger(LedgerEntry(process=process, started_at=started_at, wall_s=10.0, parts_s={"work": 10.0}))
    log.close()
    account_for_gap(run, "trainer", since=90.0, ended_at=115.0, started_at=118.0)
    account_for_gap(run, "orchestrator", since=90.0, ended_at=115.0, started_at=118.0)
    gaps = {entry.process: (entry.started_at, entry.wall_s, entry.parts_s) for entry in read_ledger(run)[3:]}
    assert gaps == {
        "trainer": (110.0, 8.0, {"lost": 5.0, "restart": 3.0}),
        "trainer-1": (111.0, 7.0, {"lost": 4.0, "restart": 3.0}),
        "orchestrator": (90.0, 28.0, {"lost": 25.0, "restart": 3.0}),
    }


def test_a_row_that_was_not_written_to_its_end_is_left_out(run: RunDir):
    run.metrics.write_text(json.dumps({"step": 0}) + "\n" + '{"step": 1, "rew')
    assert read_metrics(run) == [{"step": 0}]


def restarted(number: int, why: str = "killed") -> Restarted:
    return Restarted(attempt=1, process="env-0", life=number, why=why, ended_at=1.0, gone_s=None)


def test_half_a_row_costs_itself_alone(run: RunDir):
    """As a full disk or a loss of power leaves it; lines of other alphabets' separators are one row."""
    append_restart(run, restarted(1))
    with run.restarts.open("ab") as file:
        file.write(b'{"attempt":1,"process":"env-\xe2\x80')
    append_restart(run, restarted(2, why="one\u2028line"))
    append_restart(run, restarted(3))
    assert [(known.life, known.why) for known in read_restarts(run)] == [
        (1, "killed"),
        (2, "one\u2028line"),
        (3, "killed"),
    ]


def test_a_row_that_does_not_fit_on_the_disk_is_an_error(run: RunDir):
    """The limit on file sizes stands in for the disk: the write is short, and says so by its count alone."""
    append_restart(run, restarted(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.restarts.stat().st_size + 40, limits[1]))
    try:
        with pytest.raises(InfrastructureError, match="free space and resume"):
            append_restart(run, restarted(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_restart(run, restarted(3))
    assert [known.life for known in read_restarts(run)] == [1, 3]


def test_what_a_kill_left_of_an_old_checkpoint_goes_with_the_next_ones(run: RunDir):
    for version in (5, 10, 15):
        save(run, version)
    (checkpoint_dir(run, 5) / "manifest.json").unlink()  # killed between this and the rest
    (checkpoint_dir(run, 20) / "trainer").mkdir(parents=True)  # being written
    assert [manifest.version for manifest in drop_checkpoints(run, keep=1)] == [15]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["000015", "000020"]
