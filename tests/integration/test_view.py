"""`palestra view` as it is started: what it says about a run, and that it hears the run grow."""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from benchmarks.viewer import NAME, make

from palestra.core.errors import UserError
from palestra.hub import Client
from palestra.launch.cli import main
from palestra.wire.rundir import RunDir
from tests.unit.hub.written import record, scan, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WAIT_S = 30.0


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("outputs")
    make(directory, steps=6, rollouts=64, seed=0, num_batches=2)
    return directory


@contextmanager
def viewer(outputs: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "palestra.launch.cli", "view", str(outputs), "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("viewer: "), process.communicate(timeout=WAIT_S)
            yield said.split()[-1], process
        finally:
            if process.poll() is None:
                process.kill()


def test_the_client_has_what_the_files_have(outputs: Path):
    lines = scan(RunDir(outputs / NAME))
    with viewer(outputs) as (url, _), Client(url) as client:
        (row,) = client.runs()
        assert (row.id, row.state, row.steps, row.total_steps) == (NAME, "finished", 6, 6)
        found = list(client.rollouts(NAME, limit=50, sort="-reward"))
        assert {(one.file, one.line, one.reward) for one in found} == {
            (line.file, line.line, line.record.reward) for line in lines
        }
        assert len(found) == 6 * 64
        good = list(client.rollouts(NAME, min_reward=1, environment="calc", min_step=3))
        assert len(good) == sum(
            line.record.reward >= 1 and line.record.environment == "calc" and line.step >= 3 for line in lines
        )
        groups = list(client.groups(NAME))
        assert sum(group.num_rollouts for group in groups) == 6 * 64
        assert list(client.curves(NAME, "reward/trained")) == ["reward/trained"]
        assert client.run(NAME).indexed.num_training == 6 * 64
        assert {mark.kind for mark in client.marks(NAME)} == {"publish"}
        assert {band.process for band in client.ledger(NAME).bands} == {"trainer", "engine-0"}
        history = client.task(NAME, found[0].task)
        assert sum(version.num_rollouts for version in history.versions) == sum(
            line.record.task.key == found[0].task for line in lines
        )
        with pytest.raises(UserError, match="404"):
            client.run("nobody")


def test_tokens_have_both_logprobs_and_what_they_trained_with(outputs: Path):
    lines = {(line.file, line.line): line.record for line in scan(RunDir(outputs / NAME))}
    with viewer(outputs) as (url, _), Client(url) as client:
        shown = client.rollout(NAME, "step-000005", 7)
        early = client.rollout(NAME, "step-000001", 7)
    sample, tokens = lines[("step-000005", 7)].seats[0].samples[0], shown.tokens
    assert tokens is not None
    assert tokens.ids == sample.token_ids
    assert tokens.engine_logprobs == [p if s else None for p, s in zip(sample.logprobs, sample.sampled, strict=True)]
    assert tokens.weights == sample.sampled
    assert {tokens.versions[i] for i, s in enumerate(sample.sampled) if s} == {sample.spans[0].version}
    group = [one.reward for one in shown.siblings]
    assert len(group) == 16
    expected = lines[("step-000005", 7)].reward - sum(group) / 16
    assert [a for a in tokens.advantages if a is not None] == pytest.approx([expected] * sum(sample.sampled), abs=1e-6)
    gaps = [
        abs(trainer - engine)
        for trainer, engine in zip(tokens.trainer_logprobs, tokens.engine_logprobs, strict=True)
        if trainer is not None and engine is not None
    ]
    assert len(gaps) == sum(sample.sampled)
    assert 0 < max(gaps) < 0.2
    assert early.tokens is not None
    assert "keep_batches" in early.tokens.notes[0]


def test_a_run_that_grows_is_told_and_shown(tmp_path: Path):
    run = make(tmp_path, steps=2, rollouts=32, seed=1, num_batches=1)
    heard: list[dict] = []
    with viewer(tmp_path) as (url, _), Client(url) as client:
        assert client.run(NAME).row.steps == 2
        with httpx.stream("GET", f"{url}events?run={NAME}", timeout=WAIT_S) as stream:
            events = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            with run.metrics.open("ab") as file:
                file.write(b'{"step": 2, "time": 1.0, "reward/trained": 0.9')  # torn: nothing to see yet
                file.flush()
                heard.append(next(events))
                assert client.run(NAME).row.steps == 2
                file.write(b"}\n")
            heard.append(next(events))
            assert client.run(NAME).row.steps == 3
            write(run, "step-000002", [record(i, random.Random(i)) for i in range(64, 80)])
            while "rollouts" not in heard[-1]["changed"]:
                heard.append(next(events))
        assert len(list(client.rollouts(NAME, min_step=2))) == 16
    assert {one["run"] for one in heard} == {NAME}
    assert "metrics" in heard[0]["changed"]


def test_a_run_that_begins_is_told(tmp_path: Path):
    with viewer(tmp_path) as (url, _), Client(url) as client:
        assert client.runs() == []
        with httpx.stream("GET", f"{url}events", timeout=WAIT_S) as stream:
            events = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            make(tmp_path, steps=1, rollouts=16, seed=1, num_batches=1)
            assert next(events)["run"] == NAME
        assert [row.id for row in client.runs()] == [NAME]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to_with_readers_there(outputs: Path, number: signal.Signals):
    with viewer(outputs) as (url, process):
        ended = threading.Event()

        def read() -> None:
            with httpx.stream("GET", f"{url}events", timeout=WAIT_S) as stream:
                first.set()
                list(stream.iter_lines())
            ended.set()

        first = threading.Event()
        threading.Thread(target=read, daemon=True).start()
        assert first.wait(timeout=WAIT_S)
        process.send_signal(number)
        _, error = process.communicate(timeout=WAIT_S)
        assert (process.returncode, error) == (0, "")
        assert ended.wait(timeout=WAIT_S)


def test_what_cannot_be_served_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["view", str(tmp_path / "nowhere")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["view", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "name another" in capsys.readouterr().err
