"""What is told about runs afterwards: lists, one run, where the time went, replays compared."""

import json
from pathlib import Path

import pytest

from palestra.config import RunConfig
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.core.ledger import LedgerEntry
from palestra.core.metrics import Mean
from palestra.launch import closing, replay, runs
from palestra.launch.cli import main
from palestra.launch.doctor import Finding, examine
from palestra.launch.machine import Gpu, Machine
from palestra.launch.memory import GIB
from palestra.launch.start import write_config
from palestra.wire import accounts
from palestra.wire.rundir import Attempt, Manifest, RunDir, checkpoint_dir, write_manifest
from palestra.wire.runlog import Restarted, RunLog, append_restart

SUMMARY = {"reward_before": 0.25, "reward_after": 0.9, "steps": 2, "wall_s": 130.0, "trainer_idle": 0.031}


def config(outputs: Path, *, is_rl: bool = True) -> RunConfig:
    tree = {"log": {"name": "demo", "outputs": outputs}, "model": {"path": "x"}}
    data = {"env": {"mix": [{"id": "e"}]}} if is_rl else {"data": {"sources": [{"path": "x"}]}}
    return RunConfig.model_validate({**tree, **data})


def entry(process: str, **parts_s: float) -> LedgerEntry:
    return LedgerEntry(process=process, started_at=0.0, wall_s=sum(parts_s.values()), parts_s=parts_s)


LOOP = [
    entry("trainer", start=50.0, wait_for_batch=50.0),  # before the loop: does not count
    entry("trainer", wait_for_batch=30.0, forward_backward=70.0),
    entry("trainer", wait_for_batch=10.0, forward_backward=90.0),
    entry("engine-0", start=10.0, idle=90.0),
    entry("engine-0", generate=95.0, idle=5.0),
    entry("engine-0", generate=99.0, idle=1.0),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "outputs" / "demo")
    write_config(run, config(run.path.parent))
    log = RunLog(run)
    log.metrics(99, {"train/grad_norm": Mean(7.0)}, phase="warmup")
    for step, reward in enumerate((0.2, 0.8)):
        log.metrics(step, {"reward/trained": Mean(reward), "train/grad_norm": Mean(1.0)})
    for part in LOOP:
        log.ledger(part)
    log.summary(SUMMARY)
    log.close()
    return run


def test_shares_and_closure_of_a_process():
    (engine, trainer) = accounts.account(LOOP)
    assert (engine.process, engine.wall_s, engine.parts_s["generate"]) == ("engine-0", 300.0, 194.0)
    shown = accounts.as_dict(trainer)
    assert shown["shares"]["wait_for_batch"] == 90 / 300
    assert shown["closure"] == 0.0
    assert list(shown["parts_s"]) == ["forward_backward", "wait_for_batch", "start"]


def test_unaccounted_time_shows():
    hole = LedgerEntry(process="trainer", started_at=0.0, wall_s=100.0, parts_s={"forward_backward": 90.0})
    assert accounts.as_dict(hole)["closure"] == pytest.approx(0.1)


def words(tmp_path: Path, trainer: dict[str, float], engine: dict[str, float]) -> str:
    return accounts.bottleneck([entry("trainer", **trainer), entry("engine-0", **engine)], is_rl=True)


def test_the_bottleneck_in_words(tmp_path: Path):
    busy = {"generate": 99.0, "idle": 1.0}
    assert accounts.bottleneck(LOOP, is_rl=True).startswith(
        "the trainer waited 20% for batches: generation is the bottleneck; add engines"
    )
    told = words(tmp_path, {"wait_for_batch": 1.0, "forward_backward": 99.0}, {"generate": 60.0, "idle": 40.0})
    assert told.startswith("the engines idled 40% and the trainer waited 1%")
    assert "training is the bottleneck" in told
    told = words(tmp_path, {"wait_for_batch": 60.0, "forward_backward": 40.0}, {"generate": 50.0, "idle": 50.0})
    assert "held up outside the engines" in told
    assert words(tmp_path, {"wait_for_batch": 1.0, "forward_backward": 99.0}, busy).startswith("no bottleneck")
    told = words(tmp_path, {"wait_for_batch": 1.0, "forward_backward": 99.0}, {"generate": 80.0, "publish": 20.0})
    assert told.endswith("Publishing stopped the engines 20% of the time; raise sync.every")


def test_the_bottleneck_of_a_supervised_run(tmp_path: Path):
    slow = [entry("trainer", read_batch=30.0, forward_backward=70.0)]
    fast = [entry("trainer", read_batch=1.0, forward_backward=99.0)]
    assert "reading data" in accounts.bottleneck(slow, is_rl=False)
    assert "99% into forward_backward" in accounts.bottleneck(fast, is_rl=False)
    assert accounts.bottleneck([], is_rl=True) == "no step has been accounted for yet"


def test_show_one_run(run: RunDir, capsys: pytest.CaptureFixture):
    assert main(["runs", "show", "demo"]) == 0
    shown = capsys.readouterr().out
    for part in ("forward_backward", "generation is the bottleneck", "0.900", "step 1: ", "100.0% of wall"):
        assert part in shown


def test_show_one_run_as_json(run: RunDir, capsys: pytest.CaptureFixture):
    assert main(["runs", "show", str(run.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["summary"] == SUMMARY
    assert shown["metrics"]["reward/trained"] == 0.8
    assert [process["process"] for process in shown["ledger"]] == ["engine-0", "trainer"]
    assert shown["state"] == "never started"


def test_restarts_are_told(run: RunDir, capsys: pytest.CaptureFixture):
    for life, gone_s in ((1, 1.25), (2, None), (3, 2.0)):
        why = "killed by SIGKILL" if life < 3 else "exit code 1"
        append_restart(
            run, Restarted(attempt=1, process="env-0", life=life, why=why, ended_at=float(life), gone_s=gone_s)
        )
    assert main(["runs", "show", "demo"]) == 0
    told = "env-0 was started again 3 times, gone 3.2 s in all; the last time: exit code 1"
    assert told in capsys.readouterr().out
    assert main(["runs", "show", "demo", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [restart["life"] for restart in shown["restarts"]] == [1, 2, 3]


def test_a_run_without_any_step_can_be_shown(run: RunDir, capsys: pytest.CaptureFixture):
    for path in (run.metrics, run.ledger, run.summary):
        path.unlink()
    assert main(["runs", "show", "demo"]) == 0
    assert "no step has been accounted for yet" in capsys.readouterr().out


def test_list_runs(run: RunDir, capsys: pytest.CaptureFixture):
    assert main(["runs", "ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["steps"], row["reward"]) == ("demo", 2, 0.8)
    assert main(["runs", "ls"]) == 0
    assert "demo" in capsys.readouterr().out


def test_an_unknown_run_gets_a_guess(run: RunDir):
    with pytest.raises(UserError, match="did you mean demo"):
        runs.find("deom")
    with pytest.raises(UserError, match="not a run directory"):
        runs.find(str(run.path.parent))


def test_the_closing_words_have_before_and_after(run: RunDir, capsys: pytest.CaptureFixture):
    closing.show(run, as_json=False)
    said = capsys.readouterr()
    assert said.out == ""
    for part in ("reward before", "0.250", "reward after", "0.900", "2 min 10 s", "3.1%", "palestra runs show"):
        assert part in said.err
    closing.show(run, as_json=True)
    assert json.loads(capsys.readouterr().out) == SUMMARY


def test_the_closing_words_repeat_the_warnings(run: RunDir, capsys: pytest.CaptureFixture):
    warning = {"step": 7, "rule": "masked", "text": "12% of the sampled tokens are masked"}
    write_atomically(run.summary, json.dumps(SUMMARY | {"warnings": [warning]}).encode())
    closing.show(run, as_json=False)
    assert "warning at step 7: 12% of the sampled tokens are masked" in capsys.readouterr().err


# --- replay


def test_equal_steps_have_no_difference_and_clocks_are_not_compared():
    old: list[dict] = [{"step": 0, "phase": "warmup", "train/loss": 9.0}]
    old += [{"step": s, "time": s, "reward/trained": 1.0, "train/loss": 0.1 * s, "train/step_s": s} for s in range(3)]
    new = [{"step": s, "time": -s, "train/loss": 0.1 * s, "train/step_s": 9.0} for s in range(3)]
    assert replay.compare(old, new) == [replay.Difference("train/loss", 3, 0.0, None)]


def test_a_step_that_differs_is_found():
    old = [{"step": s, "train/loss": 0.5} for s in range(4)]
    new = [{"step": s, "train/loss": 0.5 + (s >= 2) * 0.25 * s} for s in range(4)]
    assert replay.compare(old, new) == [replay.Difference("train/loss", 4, 0.75, 2)]


def test_the_later_row_of_a_step_trained_twice_counts():
    old = [{"step": 0, "train/loss": 9.0}, {"step": 0, "train/loss": 0.5}]
    assert replay.compare(old, [{"step": 0, "train/loss": 0.5}])[0].largest == 0.0


def record(run: RunDir, *steps: int) -> None:
    addresses = {"supervisor": "ipc://s", "orchestrator": "ipc://o", "engines": (), "staging": "x"}
    run.write_attempt(Attempt(number=4, resumed_from=None, started_at=0.0, **addresses))
    run.batches.directory.mkdir(exist_ok=True)
    for step in steps:
        write_atomically(run.batches.path(step), b"x")


def test_a_replay_begins_where_the_batches_lead_on_from(run: RunDir):
    with pytest.raises(UserError, match="no recorded batches"):
        replay.origin_of(run)
    record(run, 50, 51)
    with pytest.raises(UserError, match="no checkpoint to start from"):
        replay.origin_of(run)
    checkpoint_dir(run, 51).mkdir(parents=True)
    write_manifest(run, Manifest(version=51, attempt=1, trainer="trainer", orchestrator="o"))
    assert replay.origin_of(run) == replay.Origin(4, 51)
    record(run, 0)
    assert replay.origin_of(run) == replay.Origin(4, None)


def test_the_record_is_linked_and_the_run_stays_as_it_is(run: RunDir):
    record(run, 0, 1)
    copy = RunDir(run.path.with_name("demo-replay"))
    replay.link_record(run, copy, replay.Origin(4, None))
    assert copy.batches.steps() == [0, 1]
    write_atomically(copy.batches.path(0), b"changed")
    copy.batches.discard_before(2)
    assert run.batches.path(0).read_bytes() == b"x"
    assert run.batches.steps() == [0, 1]


def test_a_replay_does_not_overwrite(run: RunDir, capsys: pytest.CaptureFixture):
    record(run, 0)
    run.path.with_name("demo-replay").mkdir()
    assert main(["replay", "demo"]) == 2
    assert "demo-replay exists; delete it" in capsys.readouterr().err


# --- the machine


def test_doctor_names_a_fix_where_there_is_one():
    poor = Machine(cpus=2, memory_bytes=8 * GIB, shared_memory_bytes=0)
    fixes = {finding.what: finding.fix for finding in examine(poor)}
    assert "--shm-size" in fixes["shared memory"]
    assert fixes["python"] == ""
    rich = Machine(cpus=2, memory_bytes=8 * GIB, shared_memory_bytes=GIB, gpus=(Gpu(0, "H", 80 * GIB),))
    assert Finding("gpus", "H (80 GiB)") in examine(rich)


def test_doctor_tells_machines_too(capsys: pytest.CaptureFixture):
    main(["doctor", "--json"])
    assert {"what", "found", "fix"} == set(json.loads(capsys.readouterr().out)[0])
