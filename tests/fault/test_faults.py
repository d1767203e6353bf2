"""What goes wrong without a kill: disks, files, ports, clocks, and processes that are there but useless."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from palestra.orchestrate.state import RolloutEnded, RolloutRetried, TaskQuarantined
from palestra.wire.batches import decode, equal
from palestra.wire.rundir import checkpoint_dir, read_manifests
from palestra.wire.runlog import read_ledger, read_restarts, read_summary
from tests.fault.cases import DEADLINE_S, Case, Make, Maker
from tests.fault.counts import count, read_events
from tests.fault.doomed import Fault
from tests.fault.test_kills import POINTS, Point
from tests.fault.whole_run import ENVIRONMENTS, QUICK, FaultyRun, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(DEADLINE_S)]

STUCK_S = 30  # until a trainer that does nothing is given up; the run's start has no longer either
ENGINE = "tests.fault.replaying_engine:Engine"
ALL = dataclasses.replace(POINTS["training"], nth=4).kills("supervisor")
FULL = {
    "the orchestrator checkpoints": ("orchestrator", "palestra.orchestrate.journal:Journal.snapshot", 2),
    "the trainer checkpoints": ("trainer", "tests.fault.table_trainer:TableTrainer.save", 2),
    "journalling": ("orchestrator", "palestra.wire.framelog:FrameLog.append", 150),
    "shipping": ("orchestrator", "palestra.wire.batches:BatchFiles.write", 3),
}
STOPPED = (("engine-0", "generating"), ("engine-0", "publishing"), ("env-0", "generating"), ("env-0", "scoring"))


def full_disk(moment: str) -> Case:
    process, at, nth = FULL[moment]

    def play(make: Make) -> FaultyRun:
        with small_disk(make.directory / "disk") as disk:
            run = make(Fault(process=process, at=at, nth=nth, do="fill", path=str(disk)), outputs=disk)
            said = run.break_off()
            assert "free space and resume" in said
            (disk / "ballast").unlink()
            run.resume()
            shutil.copytree(run.run.path, kept := make.directory / "kept")
        return run.moved_to(kept)

    return Case(f"a disk is full while {moment}", play)


def torn_journal(make: Make) -> FaultyRun:
    run = make(ALL)
    run.break_off()
    before = read_events(run.run)
    with max(run.run.journal.glob("*.frames")).open("ab") as file:
        file.write(b"\x40\x00\x00\x00 torn")  # of 64 bytes, five
    run.resume()
    assert read_events(run.run)[: len(before)] == before
    return run


def torn_manifest(make: Make) -> FaultyRun:
    """Said in words; the checkpoint before it is used, as the words say."""
    run = make(dataclasses.replace(POINTS["checkpointing"], when="leave").kills("supervisor"))
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
    return run


def stopped(victim: str, point: str) -> Case:
    """SIGSTOP: it is there, and does nothing."""

    def play(make: Make) -> FaultyRun:
        run = make(POINTS[point].kills(victim, do="stop"), **QUICK[victim])
        run.play()
        return run

    return Case(f"{victim} stopped while {point}", play)


def stopped_trainer(make: Make) -> FaultyRun:
    run = make(POINTS["training"].kills("trainer", do="stop"), train={"batch_deadline_s": STUCK_S})
    said = run.break_off()
    assert f"DeadlineError: waited {STUCK_S} s for" in said
    run.resume()
    return run


def refused_port(make: Make) -> FaultyRun:
    run = make(POINTS["training"].kills("engine-0", do="refuse", seconds=3))
    run.play()
    return run


def old_weights_in_one_of_two(make: Make) -> FaultyRun:
    """It loads, checks, names the new version, and computes with the one before: only the probe can tell."""
    run = make(Fault(process="engine-0", at=f"{ENGINE}.take", nth=3, do="skip"), engine={"replicas": 2})
    said = run.play()
    assert "engine-0 died (the orchestrator gave it up" in said
    assert "the probe" in said
    return run


def old_weights_in_the_only_one(make: Make) -> FaultyRun:
    run = make(Fault(process="engine-0", at=f"{ENGINE}.take", nth=3, do="skip"))
    said = run.break_off()
    assert "reached none of 1 engines" in said
    assert "the probe" in said
    run.resume()
    return run


def broken_streams(make: Make) -> FaultyRun:
    run = make(Fault(process="engine-0", at=f"{ENGINE}.event", nth=9, do="fail", times=3))
    run.play()
    return run


def jumping_clock(hours: int) -> Case:
    """In every process in its turn, and one is started again after it."""
    points = [
        POINTS["packing"],
        POINTS["training"],
        POINTS["scoring"],
        Point("supervisor", "palestra.launch.supervisor:Supervisor._hear", 6),
    ]

    def play(make: Make) -> FaultyRun:
        jumps = [point.kills(do="clock", seconds=3600 * hours) for point in points]
        run = make(*jumps, POINTS["checkpointing"].kills("engine-0"))
        run.play()
        summary = read_summary(run.run)
        assert summary is not None
        assert summary["ledger_closure"] <= 0.01
        assert 0 < summary["wall_s"] < 600
        assert summary["sample_tokens_per_s"] > 1
        assert all(0 <= entry.wall_s < 600 and entry.closure <= 0.05 for entry in read_ledger(run.run))
        return run

    return Case(f"every clock jumps by {hours:+d} h", play, fired=len(points) + 1)


def storm(make: Make) -> FaultyRun:
    """An engine that dies again and again ends the run with the cause."""
    deaths = [
        Fault(process="engine-0", at=f"{ENGINE}.start_update", nth=1 if life else 3, life=life) for life in range(3)
    ]
    run = make(*deaths, launch={"max_restarts": 2})
    said = run.break_off()
    ends = "3 ends within 600 s, launch.max_restarts=2", "2 starts in a row failed"  # on a busy machine: not ready yet
    assert any(f"engine-0 ended the run (killed by SIGKILL; {why})" in said for why in ends)
    run.resume()
    return run


def deadly_task(make: Make) -> FaultyRun:
    run = make(env={"mix": [{"id": f"{ENVIRONMENTS}:Deadly", "name": "deadly"}]})
    run.play()
    assert {event.task for event in read_events(run.run) if isinstance(event, TaskQuarantined)} == {"deadly/deadly"}
    assert [restarted.process for restarted in read_restarts(run.run)] == ["env-0"] * 3
    return run


CASES = [
    *map(full_disk, FULL),
    Case("a journal ends in half an event", torn_journal),
    Case("a manifest is torn", torn_manifest),
    *(stopped(victim, point) for victim, point in STOPPED),
    Case("the trainer is stopped", stopped_trainer),
    Case("a port is taken while its engine is started again", refused_port),
    Case("an engine of two goes on with old weights", old_weights_in_one_of_two),
    Case("the only engine goes on with old weights", old_weights_in_the_only_one),
    Case("streams break off half way", broken_streams, fired=3),
    *map(jumping_clock, (1, -1)),
    Case("an engine dies again and again", storm, fired=3),
    Case("a task kills its workers", deadly_task, fired=None),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nothing_is_lost_when(case: Case, make: Maker, judge):
    judge(case.play(make), name=case.name, fired=case.fired)


def _tear_the_newest_batch(run: FaultyRun) -> Path:
    path = run.run.batches.path(run.run.batches.steps()[-1])
    path.write_bytes(path.read_bytes()[:-40])
    return path


def test_a_torn_batch_is_made_anew_to_the_byte_from_the_journal(make: Make):
    run = make(ALL)
    run.break_off()
    path = run.run.batches.path(run.run.batches.steps()[-1])
    whole = decode(path.read_bytes())
    _tear_the_newest_batch(run)
    run.resume()
    assert f"{path} is torn" in run.run.log("orchestrator").read_text()
    anew = decode(path.read_bytes())
    assert equal(dataclasses.replace(anew, attempt=whole.attempt), whole)


def test_a_reward_that_raises_ends_the_run_in_words_and_is_never_a_zero(make: Make):
    run = make(env={"mix": [{"id": f"{ENVIRONMENTS}:Raises"}], "retries": 0})
    code, said = run.finish()
    assert code == 2, said
    assert "no such column" in said
    assert not list(run.run.path.glob("rollouts/step-*"))


@pytest.mark.parametrize(("name", "code"), [("Shows", 2), ("TwoTurns", 0)])
def test_an_environment_that_sends_a_policy_images_ends_the_run_before_a_rollout_is_spent(make: Make, name, code):
    """The control is the same environment in words."""
    run = make(env={"mix": [{"id": f"{ENVIRONMENTS}:{name}", "name": "gallery"}]}, train={"steps": 2})
    ended, said = run.finish()
    assert ended == code, said
    words = "environment 'gallery' cannot be played in tokens: "
    got = "messages[2] (user) holds an image (image/png of 8 bytes)"
    assert ((words in said) and (got in said) and ("--base-url" in said)) == (code == 2), said
    spent = [event for event in read_events(run.run) if isinstance(event, RolloutEnded | RolloutRetried)]
    assert bool(spent) == (code == 0)
    assert not [restart for restart in read_restarts(run.run) if restart.process.startswith("env")]


def test_events_that_never_reach_the_disk_are_noticed(make: Make):
    """The negative control of the whole suite: what the orchestrator did then is gone with it, and done once more."""
    forgets = Fault(
        process="orchestrator", at="palestra.wire.framelog:FrameLog.append", nth=10, do="skip", times=500, life=0
    )
    run = make(forgets, dataclasses.replace(POINTS["training"], nth=2).kills("orchestrator"))
    code, _ = run.finish()
    counts = count(run.run, run.witness, max_age=run.config.algo.max_age)
    assert code != 0 or counts.lost or counts.ended_twice
