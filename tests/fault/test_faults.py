"""What goes wrong without a kill: disks, files, ports, clocks, and processes that are there but useless."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from palestra.orchestrate.state import TaskQuarantined
from palestra.wire.rundir import checkpoint_dir, read_manifests
from palestra.wire.runlog import read_ledger, read_restarts, read_summary
from tests.fault.counts import count, read_events
from tests.fault.doomed import Fault
from tests.fault.test_kills import POINTS
from tests.fault.whole_run import ENVIRONMENTS, FaultyRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ENGINE = "tests.fault.replaying_engine:Engine"
ALL = Fault(process="trainer", at="tests.fault.table_trainer:TableTrainer.train", nth=4, victims=("supervisor",))

FULL = {
    "checkpointing-the-orchestrators-part": ("orchestrator", "palestra.orchestrate.journal:Journal.snapshot", 2),
    "checkpointing-the-trainers-part": ("trainer", "tests.fault.table_trainer:TableTrainer.save", 2),
    "journalling": ("orchestrator", "palestra.wire.framelog:FrameLog.append", 150),
    "shipping": ("orchestrator", "palestra.wire.batches:BatchFiles.write", 3),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_disk_is_full_while(moment: str, small_disk: Path, faulty, judge):
    process, at, nth = FULL[moment]
    run = faulty(Fault(process=process, at=at, nth=nth, do="fill", path=str(small_disk)), outputs=small_disk)
    said = run.break_off()
    assert "free space and resume" in said
    (small_disk / "ballast").unlink()
    run.resume()
    judge(run, fired=1)


def test_a_journal_ends_in_half_an_event(faulty, judge):
    run = faulty(ALL)
    run.break_off()
    segment = max(run.run.journal.glob("*.frames"))
    before = read_events(run.run)
    with segment.open("ab") as file:
        file.write(b"\x40\x00\x00\x00 torn")  # of 64 bytes, five
    run.resume()
    assert read_events(run.run)[: len(before)] == before
    judge(run, fired=1)


def _tear_the_newest_batch(run: FaultyRun) -> Path:
    path = run.run.batches.path(run.run.batches.steps()[-1])
    path.write_bytes(path.read_bytes()[:-40])
    return path


def test_a_torn_batch_is_named(faulty):
    run = faulty(ALL)
    run.break_off()
    path = _tear_the_newest_batch(run)
    said = run.break_off("--resume")
    assert f"{path} is torn" in said


@pytest.mark.xfail(strict=True, reason="no batch is made anew, though the journal has every rollout of it")
def test_a_torn_batch_is_made_anew(faulty, judge):
    run = faulty(ALL)
    run.break_off()
    _tear_the_newest_batch(run)
    run.resume()
    judge(run, fired=1)


def test_a_manifest_is_torn(faulty, judge):
    """Said in words; the checkpoint before it is used, as the words say."""
    run = faulty(ALL.__class__(process="trainer", at=ALL.at, nth=5, victims=ALL.victims))
    run.break_off()
    newest = read_manifests(run.run)[-1].version
    assert newest == 4
    manifest = checkpoint_dir(run.run, newest) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    said = run.break_off("--resume")
    assert f"{manifest} cannot be read" in said
    assert "delete its directory to use the one before" in said
    shutil.rmtree(manifest.parent)
    run.resume()
    judge(run, fired=1)


@pytest.mark.parametrize(
    ("victim", "point"),
    [("engine-0", "generating"), ("engine-0", "publishing"), ("env-0", "generating"), ("env-0", "scoring")],
)
def test_stopped(victim: str, point: str, faulty, judge):
    """SIGSTOP: it is there, and does nothing."""
    run = faulty(POINTS[point].kills(victim, do="stop"))
    run.play()
    judge(run, fired=1)


def test_a_stopped_trainer_ends_the_run_in_words(faulty, judge):
    run = faulty(POINTS["training"].kills("trainer", do="stop"), train={"batch_deadline_s": 8})
    said = run.break_off()
    assert "DeadlineError: waited 8 s for" in said
    run.resume()
    judge(run, fired=1)


def test_a_port_is_taken_while_its_engine_is_started_again(faulty, judge):
    run = faulty(POINTS["training"].kills("engine-0", do="refuse", seconds=3))
    run.play()
    judge(run, fired=1)


def test_an_engine_of_two_goes_on_with_old_weights(faulty, judge):
    """It loads, checks, names the new version, and computes with the one before: only the probe can tell."""
    run = faulty(Fault(process="engine-0", at=f"{ENGINE}.take", nth=3, do="skip"), engine={"replicas": 2})
    said = run.play()
    assert "engine-0 died (the orchestrator gave it up" in said
    assert "the probe" in said
    judge(run, fired=1)


def test_the_only_engine_goes_on_with_old_weights(faulty, judge):
    run = faulty(Fault(process="engine-0", at=f"{ENGINE}.take", nth=3, do="skip"))
    said = run.break_off()
    assert "reached none of 1 engines" in said
    assert "the probe" in said
    run.resume()
    judge(run, fired=1)


def test_streams_break_off_half_way(faulty, judge):
    run = faulty(Fault(process="engine-0", at=f"{ENGINE}.event", nth=9, do="fail", times=3))
    run.play()
    judge(run, fired=3)


@pytest.mark.parametrize(
    ("process", "hours"),
    [("orchestrator", 1), ("orchestrator", -1), ("trainer", -1), ("env-0", 1), ("supervisor", 1), ("supervisor", -1)],
)
def test_a_clock_jumps(process: str, hours: int, faulty, judge):
    points = {
        "orchestrator": POINTS["packing"],
        "trainer": POINTS["training"],
        "env-0": POINTS["scoring"],
        "supervisor": POINTS["training"].__class__("supervisor", "palestra.launch.supervisor:Supervisor._hear", 6),
    }
    run = faulty(points[process].kills(do="clock", seconds=3600 * hours), POINTS["checkpointing"].kills("engine-0"))
    run.play()
    judge(run, fired=2)
    _ledgers_close(run)


def _ledgers_close(run: FaultyRun) -> None:
    summary = read_summary(run.run)
    assert summary is not None
    assert summary["ledger_closure"] <= 0.01
    assert 0 < summary["wall_s"] < 600
    assert summary["sample_tokens_per_s"] > 1
    assert all(0 <= entry.wall_s < 600 and entry.closure <= 0.05 for entry in read_ledger(run.run))


def test_an_engine_that_dies_again_and_again_ends_the_run_with_the_cause(faulty, judge):
    deaths = [
        Fault(process="engine-0", at=f"{ENGINE}.start_update", nth=1 if life else 3, life=life) for life in range(3)
    ]
    run = faulty(*deaths, launch={"max_restarts": 2})
    said = run.break_off()
    assert "engine-0 ended the run (killed by SIGKILL; 3 ends within 600 s, launch.max_restarts=2)" in said
    run.resume()
    judge(run, fired=3)


def test_a_task_that_kills_its_workers_is_quarantined(faulty, judge):
    run = faulty(env={"mix": [{"id": f"{ENVIRONMENTS}:Deadly", "name": "deadly"}]})
    run.play()
    judge(run)
    (quarantined,) = {event.task for event in read_events(run.run) if isinstance(event, TaskQuarantined)}
    assert quarantined == "deadly/deadly"
    restarts = [restarted.process for restarted in read_restarts(run.run)]
    assert restarts == ["env-0"] * 3


def test_events_that_never_reach_the_disk_are_noticed(faulty):
    """The negative control of the whole suite: what the orchestrator did then is gone with it, and done once more."""
    forgets = Fault(process="orchestrator", at="palestra.wire.framelog:FrameLog.append", nth=25, do="skip", times=25)
    run = faulty(forgets, dataclasses.replace(POINTS["training"], nth=2).kills("orchestrator"))
    code, _ = run.finish()
    counts = count(run.run, run.witness, max_age=run.config.algo.max_age)
    assert code != 0 or counts.lost or counts.ended_twice
