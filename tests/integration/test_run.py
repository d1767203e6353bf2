"""Whole runs on the real engine: what a run must show, and what it must survive."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from palestra.orchestrate.checkpoint import recover_journal
from palestra.orchestrate.state import BatchShipped, Event
from palestra.wire.framelog import read_frames
from palestra.wire.rundir import RunDir, newest_checkpoint
from tests.integration.runs import ENVIRONMENTS, Run, kill_all, maps, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TORCH = "libtorch"
STEPS, EVAL_TASKS = 6, 24
TRIES = 3  # to do something while a run runs: this process may stand still until it is over


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(directory: Path) -> Run:
    """A strictly synchronous run, watched while it ran; another one, where it was over before it was looked at."""
    run = Run(directory, "uninterrupted", max_age=0)
    held_out = f'{{id="{ENVIRONMENTS}:EarlyLetters", name="held-out", num_tasks={EVAL_TASKS}, start=false}}'
    for _ in range(TRIES):
        process = run.start("log.keep_weights=true", f"eval.sets=[{held_out}]")
        mapped = _mapped_in_the_middle(run, process)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err
        assert not run.processes(), "nothing is left behind"
        if mapped:
            break
        shutil.rmtree(run.path)
    light = [(command, files) for command, files in mapped if _is_light(command)]
    assert len(light) >= 3, "supervisor, orchestrator and an environment worker"
    with_torch = [command for command, files in light if TORCH in files]
    assert not with_torch, f"these processes must not load torch: {with_torch}"
    trainers = [files for command, files in mapped if "palestra.train" in command]
    assert trainers, "the trainer runs"
    assert any(TORCH in files for files in trainers), "the check can see torch where it is"
    return run


def _mapped_in_the_middle(run: Run, process: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """The command of each process of the run after step 1, and the files mapped into it; the trainer is stopped
    meanwhile. Nothing, if the run is past its middle by then."""
    wait_until(lambda: 1 in run.rows or process.poll() is not None, deadline_s=240, what="step 1")
    trainers = [pid for pid, command in run.processes().items() if "palestra.train" in command]
    _signal(trainers, signal.SIGSTOP)
    try:
        if max(run.rows, default=0) >= STEPS - 1:
            return []
        return [(command, maps(pid)) for pid, command in run.processes().items()]
    finally:
        _signal(trainers, signal.SIGCONT)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_light(command: str) -> bool:
    return any(name in command for name in ("palestra.launch.cli", "palestra.orchestrate", "palestra.env"))


def test_a_run_tells_what_it_did(finished: Run):
    summary = finished.summary
    assert summary["steps"] == 6
    assert summary["publishes"] == 7  # versions 0 to 6
    assert summary["publish_max_abs_logprob_gap"] <= 1e-4
    assert summary["ledger_closure"] <= 0.01
    assert summary["mean_age"] == 0
    assert (finished.path / "weights" / "config.json").exists()


@pytest.fixture(scope="module")
def adapted(directory: Path) -> Run:
    """Adapters only, stopped after some steps and gone on with."""
    run = Run(directory, "adapted", max_age=0)
    code, said = run.finish(*ADAPTED, "train.steps=4")
    assert code == 0, said
    code, said = run.finish(*ADAPTED, "--resume")
    assert code == 0, said
    return run


ADAPTED = ("model.lora.rank=4", "model.lora.alpha=8", "train.checkpoint_every=2")


def test_a_run_of_adapters_is_resumed_and_ends_with_both_layouts(adapted: Run):
    assert sorted(adapted.rows) == list(range(6))
    assert all(row["train/rl/mismatch_max"] <= 1e-4 for row in adapted.rows.values())
    assert adapted.summary["publish_max_abs_logprob_gap"] <= 1e-4
    export = adapted.path / "weights"
    assert (export / "model.safetensors").exists()
    assert (export / "adapter" / "adapter_config.json").exists()
    code, said = adapted.finish("train.steps=7", "--resume")
    assert code == 2
    assert "model.lora.rank: 4 in the run, nothing now" in said


def test_trainer_and_engine_agree_at_every_step(finished: Run):
    """On-policy in float32: what the engine said it sampled from is what the trainer computes."""
    assert all(row["train/rl/mismatch_max"] <= 1e-4 for row in finished.rows.values())


def test_killed_at_a_random_moment_and_resumed_it_is_the_same_run(finished: Run, directory: Path):
    """kill -9 of every process, resume: the same rewards step by step, no rollout trained twice, no step missing."""
    run = Run(directory, "killed", max_age=0)
    for _ in range(TRIES):
        _kill_at_a_random_moment(run)
        newest = newest_checkpoint(RunDir(run.path))
        if newest is None or newest.version < STEPS:
            break
        shutil.rmtree(run.path)  # it was over by then
    code, said = run.finish("--resume")
    assert code == 0, said
    assert sorted(run.rows) == sorted(finished.rows)
    for step, row in finished.rows.items():
        assert run.rows[step]["reward/trained"] == pytest.approx(row["reward/trained"], abs=1e-6), f"step {step}"
        assert run.rows[step]["train/grad_norm"] == pytest.approx(row["train/grad_norm"], rel=1e-3), f"step {step}"
    trained = [rollout for event in _shipped(run) for rollout in event.rollout_ids]
    assert max(Counter(trained).values()) == 1
    assert len(trained) == 6 * 4 * 8
    assert _same_weights(run, finished)


def _kill_at_a_random_moment(run: Run) -> None:
    process = run.start()
    seed = time.time_ns()
    chance = random.Random(seed)
    steps_first, delay_s = chance.randint(0, 3), chance.uniform(0, 0.5)
    print(f"seed {seed}: killed {delay_s:.3f} s after step {steps_first}")
    wait_until(
        lambda: steps_first in run.rows or process.poll() is not None, deadline_s=240, what=f"step {steps_first}"
    )
    time.sleep(delay_s)
    kill_all(list(run.processes()))
    out, err = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGKILL, 0), out + err
    wait_until(lambda: not run.processes(), deadline_s=20, what="every process to be gone")


def _shipped(run: Run) -> list[BatchShipped]:
    import msgspec

    frames = [frame for path in sorted((run.path / "journal").glob("*.frames")) for frame in read_frames(path)]
    events = [msgspec.msgpack.decode(frame, type=Event) for frame in frames]
    return [event for event in events if isinstance(event, BatchShipped)]


def _same_weights(run: Run, other: Run) -> bool:
    from safetensors.torch import load_file

    one, two = (load_file(r.path / "weights" / "model.safetensors") for r in (run, other))
    return all(bool((one[name] - two[name]).abs().max() < 1e-4) for name in one)


def test_an_asynchronous_run_updates_rollouts_in_flight_and_no_journal_state_is_lost(directory: Path):
    run = Run(directory, "asynchronous", max_age=4)
    code, said = run.finish("train.steps=12", "sampling.max_tokens=40", "engine.join_max_tokens=0")
    assert code == 0, said
    assert run.summary["max_versions_in_a_rollout"] >= 2
    assert 0 < run.summary["mean_age"] <= 4
    journal = recover_journal(RunDir(run.path), None)
    journal.close()
    assert journal.state.next_step == 12


def test_an_environment_that_cannot_list_its_tasks_is_named(directory: Path):
    run = Run(directory, "raises-in-tasks", environment="RaisesInTasks")
    code, said = run.finish()
    assert code == 2, said
    assert "RaisesInTasks" in said
    assert "words.txt" in said


def test_replies_replay_to_the_same_rewards_and_a_changed_reward_is_seen(finished: Run):
    command = [sys.executable, "-m", "palestra.launch.cli", "replay", str(finished.path), "--from", "replies", "--json"]
    same = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert same.returncode == 0, same.stderr
    outcome = json.loads(same.stdout)
    assert outcome["rollouts"] == outcome["same"] >= 6 * 4 * 8

    config = finished.path / "config.json"
    kept = config.read_text()
    config.write_text(kept.replace(":EarlyLetters", ":LateLetters"))  # the planted fault: another reward
    try:
        changed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        config.write_text(kept)
    assert changed.returncode == 1
    assert json.loads(changed.stdout)["other_reward"] > 0


def test_weights_replay_to_the_same_engine_and_a_swapped_version_is_seen(finished: Run):
    command = [sys.executable, "-m", "palestra.launch.cli", "replay", str(finished.path), "--from", "weights", "--json"]
    same = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert same.returncode == 0, same.stderr
    rows = json.loads(same.stdout)
    assert [row["step"] for row in rows] == list(range(7))
    assert all(row["publish/max_abs_logprob_gap"] <= 1e-4 for row in rows)
    assert all(row["replay/largest_difference"] <= 1e-4 for row in rows[:6])  # version 6 sampled nothing that trained
    shutil.rmtree(finished.path.with_name("uninterrupted-replay"))

    published = finished.path / "published"
    other = json.loads((published / "000006" / "staged.json").read_text())
    early = json.loads((published / "000002" / "staged.json").read_text())
    (published / "000006" / "staged.json").write_text(json.dumps(other | {"probe": early["probe"]}))  # planted fault
    changed = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert changed.returncode == 1
    assert "version 6 reached none of 1 engines" in changed.stderr


def test_an_evaluation_of_the_exported_weights_gives_the_number_that_the_run_ended_with(finished: Run, tmp_path: Path):
    words = [f"{ENVIRONMENTS}:EarlyLetters", "--checkpoint", str(finished.path / "weights"), "--max-tokens", "12"]
    words += ["engine.max_model_len=64", "engine.kv_cache_gib=0.25", "model.dtype=float32"]
    command = [sys.executable, "-m", "palestra.launch.cli", "eval", *words, "-n", str(EVAL_TASKS), "--json"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["sets"].values()
    assert found["reward"]["mean"] == pytest.approx(finished.summary["reward_after"], abs=1e-9)
    inside = (finished.path / "rollouts" / "eval-held-out-v000006.jsonl").read_text().splitlines()
    after = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert _said(inside) == _said(after)
    assert len(_said(after)) == EVAL_TASKS
    assert found["versions"] == [0]
    assert found["tokens"] > 0


def _said(lines: list[str]) -> dict[int, list]:
    """Prompt, reply and reward of every rollout, by its number."""
    return {row["rollout_id"]: [*row["messages"], row["reward"]] for row in map(json.loads, lines)}
