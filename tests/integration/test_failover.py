"""One run on the real engine in which every kind of process is killed, and which ends by itself as if none had been."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from palestra.core.records import Ending
from palestra.orchestrate.state import BatchShipped, Event, Published, RolloutEnded
from palestra.wire.framelog import read_frames
from palestra.wire.rundir import RunDir, newest_checkpoint
from palestra.wire.runlog import read_restarts
from tests.integration.runs import ENVIRONMENTS, Run, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, GROUPS_PER_STEP = 12, 4
ROLLOUTS_PER_STEP = GROUPS_PER_STEP * 8
HELD_FROM = 8  # the step whose rollouts wait until all have died
HELD = """

class HeldLetters(EarlyLetters):
    \"\"\"Rollouts wait for a file, but for those of the tasks that are begun first.\"\"\"

    async def run(self, task, agent):
        import asyncio
        from pathlib import Path

        begun, go_on = Path(__file__).with_name("begun"), Path(__file__).with_name("go-on")
        begun.mkdir(exist_ok=True)
        own = begun / task.prompt
        while not own.exists() and not go_on.exists() and len(list(begun.iterdir())) >= {num_tasks}:
            await asyncio.sleep(0.05)
        own.touch()
        await agent(task.prompt)
"""
MARKS = {
    "engine-0": "vllm.entrypoints",
    "env-0": "palestra.env",
    "trainer": "palestra.train",
    "orchestrator": "palestra.orchestrate",
}


def pid_of(run: Run, name: str) -> int:
    return min(pid for pid, command in run.processes().items() if MARKS[name] in command)


def events_of(run: Run) -> list[Event]:
    frames = [frame for path in sorted((run.path / "journal").glob("*.frames")) for frame in read_frames(path)]
    return [msgspec.msgpack.decode(frame, type=Event) for frame in frames]


def faults(events: list[Event]) -> list[str]:
    """What a run may not do, whoever dies."""
    found = []
    shipped = [event for event in events if isinstance(event, BatchShipped)]
    if [event.step for event in shipped] != list(range(STEPS)):
        found.append("a step is missing, or was shipped twice")
    trained = [rollout for event in shipped for rollout in event.rollout_ids]
    if max(Counter(trained).values()) > 1:
        found.append("a rollout was trained twice")
    ended = [event.record.rollout_id for event in events if isinstance(event, RolloutEnded)]
    if max(Counter(ended).values()) > 1 or not set(trained) <= set(ended):
        found.append("a rollout was lost or ended twice")
    versions = [event.version for event in events if isinstance(event, Published)]
    if versions != sorted(versions) or versions[-1] != STEPS:
        found.append("versions went back, or the last one was not published")
    return found


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run cannot end before the last of them is killed."""
    directory = tmp_path_factory.mktemp("runs")
    file = directory / "held.py"
    file.write_text(ENVIRONMENTS.read_text() + HELD.format(num_tasks=HELD_FROM * GROUPS_PER_STEP))
    run = Run(directory, "survivor", max_age=4, environment="HeldLetters", file=file)
    process = run.start(f"train.steps={STEPS}", "train.checkpoint_every=4")

    def until(condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, deadline_s=240, what=what, while_alive=process)

    def kill(name: str) -> None:
        os.kill(pid_of(run, name), signal.SIGKILL)

    def back(name: str) -> bool:
        return any(restart.process == name for restart in read_restarts(RunDir(run.path)))

    until(lambda: 2 in run.rows, "step 2")
    kill("engine-0")  # the others die while it is away
    kill("env-0")
    until(lambda: back("env-0"), "the worker to be back")
    kill("trainer")
    until(lambda: back("trainer") and back("engine-0"), "trainer and engine to be back")
    step = max(run.rows)
    until(lambda: max(run.rows) > min(step + 1, HELD_FROM - 3), "the run to go on")
    kill("orchestrator")
    file.with_name("go-on").touch()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    print(err)
    assert not run.processes(), "nothing is left behind"
    return run


def test_a_run_in_which_everything_dies_ends_at_the_right_step(survivor: Run):
    assert survivor.summary["steps"] == STEPS
    newest = newest_checkpoint(RunDir(survivor.path))
    assert newest is not None
    assert newest.version == STEPS
    assert sorted(survivor.rows) == list(range(STEPS))
    restarts = read_restarts(RunDir(survivor.path))
    assert sorted(restart.process for restart in restarts) == sorted(MARKS)
    assert all("SIGKILL" in restart.why and restart.life == 1 and restart.gone_s for restart in restarts)
    assert survivor.summary["restarts"] == [msgspec.to_builtins(restart) for restart in restarts]


def test_every_rollout_trains_once_and_versions_never_go_back(survivor: Run):
    events = events_of(survivor)
    assert faults(events) == []
    batches = RunDir(survivor.path).batches
    for event in (event for event in events if isinstance(event, BatchShipped)):
        batch = batches.read(event.step, attempt=1)
        assert sorted(set(batch.rollout.tolist())) == sorted(event.rollout_ids)
        assert len(event.rollout_ids) == ROLLOUTS_PER_STEP
    endings = Counter(event.record.ending for event in events if isinstance(event, RolloutEnded))
    assert endings[Ending.INVALID] == 0, "a death is no rollout's fault"


def test_planted_faults_are_seen(survivor: Run):
    events = events_of(survivor)
    shipped = [event for event in events if isinstance(event, BatchShipped)]
    twice = msgspec.structs.replace(shipped[1], rollout_ids=shipped[0].rollout_ids)
    assert faults([twice if event is shipped[1] else event for event in events]) == ["a rollout was trained twice"]
    assert "a step is missing, or was shipped twice" in faults([e for e in events if e is not shipped[3]])
    assert "versions went back, or the last one was not published" in faults([*events, Published(version=3)])
    lost = next(e for e in events if isinstance(e, RolloutEnded) and e.record.rollout_id in shipped[0].rollout_ids)
    assert faults([e for e in events if e is not lost]) == ["a rollout was lost or ended twice"]


def test_the_final_weights_are_those_of_an_uninterrupted_training_of_the_same_batches(survivor: Run):
    command = [sys.executable, "-m", "palestra.launch.cli", "replay", str(survivor.path), "--from", "batches"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stdout + again.stderr
    from safetensors.torch import load_file

    one, two = (
        load_file(path / "weights" / "model.safetensors")
        for path in (survivor.path, survivor.path.with_name("survivor-replay"))
    )
    assert all(bool((one[name] - two[name]).abs().max() < 1e-5) for name in one)


def test_the_report_names_every_restart(survivor: Run):
    command = [sys.executable, "-m", "palestra.launch.cli", "runs", "show", str(survivor.path), "--json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert sorted(restart["process"] for restart in told["restarts"]) == sorted(MARKS)
    for process in ("env-0", "trainer", "orchestrator"):
        (entry,) = [entry for entry in told["ledger"] if entry["process"] == process]
        assert entry["parts_s"]["restart"] > 0.5
        assert entry["closure"] < 0.01
    assert Path(survivor.path / "restarts.jsonl").exists()
