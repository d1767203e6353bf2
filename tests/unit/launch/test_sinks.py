"""Metrics told elsewhere, read back from what the real libraries keep: all of them, each once, whatever was killed."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from palestra.core.guard import Guard
from palestra.launch.sinks import keeping
from palestra.launch.sinks.following import Once, Row, Tail
from palestra.wire.rundir import RunDir

pytestmark = pytest.mark.slow

_DEADLINE_S = 60.0


def line(step: int, **values) -> bytes:
    return json.dumps({"step": step, "time": 100.0 + step, **values}).encode() + b"\n"


def write(run: RunDir, *lines: bytes) -> None:
    with run.metrics.open("ab") as file:
        file.write(b"".join(lines))


def steps(*numbers: int, plus: float = 0.0) -> list[bytes]:
    return [line(number, **{"reward/trained": number / 10 + plus}) for number in numbers]


EVAL = line(2, phase="eval-during", **{"eval/words/reward": 0.25})
WARNING = line(3, phase="warning", rule="entropy", text="it falls")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "mine")
    run.path.mkdir()
    run.config.write_text(json.dumps({"log": {"name": "mine", "project": "tests"}, "train": {"lr": 0.5}}))
    return run


def in_the_environment(place: str, home: Path) -> dict[str, str]:
    """Offline, and nothing outside of the test's directory."""
    known = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(home / "trackio"), "HOME": str(home)}
    return known | {"PYTHONPATH": os.pathsep.join(sys.path)}


def tell_once(run: RunDir, place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "palestra.launch.sinks", str(run.path), place, "--once"],
        env=in_the_environment(place, run.path.parent),
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr


# --- what the places keep


def of_tensorboard(run: RunDir) -> dict[tuple[str, int], list[float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[tuple[str, int], list[float]] = {}
    for path in sorted((run.path / "tensorboard").glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(round(value.tensor.float_val[0], 5))
    return found


def of_wandb(run: RunDir) -> dict[tuple[str, int], list[float]]:
    """The history of all offline runs: their records are LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[tuple[str, int], list[float]] = {}
    for path in sorted(run.path.glob("wandb/offline-run-*/run-*.wandb")):
        for data in _records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for name, value in items.items():
                    if name[0] != "_" and name != "step":
                        found.setdefault((name, items["step"]), []).append(round(value, 5))
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """Blocks of 32 KiB, the first behind a header of 7 bytes; a record may go over several."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
        if kind in (0, 1, 4):
            parts = b""


def of_trackio(run: RunDir) -> dict[tuple[str, int], list[float]]:
    code = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
rows = [row for name in SQLiteStorage.get_runs("tests") for row in SQLiteStorage.get_logs("tests", name)]
print(json.dumps(rows, default=str))
"""
    environment = in_the_environment("trackio", run.path.parent)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=_DEADLINE_S)
    found: dict[tuple[str, int], list[float]] = {}
    for row in json.loads(done.stdout):
        for name, value in row.items():
            if "/" in name:
                found.setdefault((name, row["train_step"]), []).append(round(value, 5))
    return found


READ: dict[str, Callable[[RunDir], dict[tuple[str, int], list[float]]]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "trackio": of_trackio,
}
KEPT = {"tensorboard": "events.out.*", "wandb": "run-*.wandb", "trackio": "tests*.db"}
PLACES = pytest.mark.parametrize("place", READ)


def require(place: str) -> None:
    pytest.importorskip("trackio.sqlite_storage" if place == "trackio" else place)


def rewards(*numbers: int, plus: float = 0.0) -> dict[tuple[str, int], list[float]]:
    return {("reward/trained", number): [round(number / 10 + plus, 5)] for number in numbers}


# --- laws


@PLACES
def test_a_place_has_every_metric_once_and_the_rest_after_it_is_told_again(place, run: RunDir):
    require(place)
    write(run, *steps(0, 1), EVAL, WARNING)
    tell_once(run, place)
    evaluated = {("eval/words/reward", 2): [0.25]}
    assert READ[place](run) == rewards(0, 1) | evaluated
    write(run, *steps(2, 3))
    tell_once(run, place)
    assert READ[place](run) == rewards(0, 1, 2, 3) | evaluated


@PLACES
def test_steps_that_are_measured_again_are_there_once(place, run: RunDir):
    """A run that goes on from a checkpoint. TensorBoard's files are made anew, with the later values."""
    require(place)
    write(run, *steps(0, 1, 2))
    tell_once(run, place)
    write(run, *steps(1, 2, 3, plus=0.01))
    tell_once(run, place)
    later = rewards(0) | rewards(1, 2, 3, plus=0.01)
    earlier = rewards(0, 1, 2) | rewards(3, plus=0.01)
    assert READ[place](run) == (later if place == "tensorboard" else earlier)


def started(run: RunDir, place: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "palestra.launch.sinks", str(run.path), place],
        env=in_the_environment(place, run.path.parent),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + _DEADLINE_S
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.1)


@PLACES
def test_killed_while_it_follows_nothing_is_lost_and_nothing_twice(place, run: RunDir):
    require(place)
    write(run, *steps(0, 1))
    first = started(run, place)
    until(lambda: any(run.path.parent.rglob(KEPT[place])))
    write(run, *steps(*range(2, 40)))
    time.sleep(0.7)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.stdin is not None
    first.stdin.close()
    assert first.wait(10) == -signal.SIGKILL
    write(run, *steps(40, 41))
    second = started(run, place)
    write(run, *steps(42), b'{"step": 43, "half of a')
    assert second.stdin is not None
    second.stdin.close()  # the run ended: it tells the rest
    assert second.wait(_DEADLINE_S) == 0
    assert READ[place](run) == rewards(*range(43))


def test_while_it_follows_it_tells(run: RunDir):
    write(run, *steps(0))
    following = started(run, "tensorboard")
    until(lambda: ("reward/trained", 0) in of_tensorboard(run))
    write(run, *steps(1))
    until(lambda: ("reward/trained", 1) in of_tensorboard(run))
    write(run, *steps(1, plus=0.5))  # the orchestrator died, and went on from a checkpoint
    until(lambda: of_tensorboard(run) == rewards(0) | rewards(1, plus=0.5))
    assert following.stdin is not None
    following.stdin.close()
    assert following.wait(_DEADLINE_S) == 0


def test_a_place_that_fails_is_told_of_once_and_the_run_goes_on(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """Where its events should go is a file: the library raises."""
    (run.path / "tensorboard").write_text("not a directory")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    said: list[str] = []
    heard = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        heard.set()

    guard = Guard()
    with keeping.telling(run, ["tensorboard"], guard, say):
        write(run, *steps(0, 1))
        assert heard.wait(_DEADLINE_S)
    guard.close()
    assert len(said) == 1
    assert "tensorboard is not told of metrics any more (exit code 1;" in said[0]
    assert "palestra runs tell" in said[0]
    assert Tail(run.metrics).take()[-1].step == 1


def test_a_place_that_hangs_is_left_after_its_time(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    hanging = run.path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 300\n")
    hanging.chmod(0o755)
    said: list[str] = []
    monkeypatch.setattr(keeping, "_LAST_S", 0.3)
    monkeypatch.setattr(keeping, "_python", lambda: str(hanging))
    guard = Guard()
    begun = time.monotonic()
    with keeping.telling(run, ["wandb"], guard, said.append):
        pass
    guard.close()
    assert time.monotonic() - begun < 60
    assert len(said) == 1
    assert "killed by SIGKILL" in said[0]


def test_a_library_that_is_missing_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeping.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(keeping.UserError, match=r'log\.to names wandb, which is not installed: pip install "palestra'):
        keeping.require_places(["wandb"])
    keeping.require_places([])


# --- rows


def test_a_row_is_its_line_and_half_a_line_is_waited_for(run: RunDir):
    tail = Tail(run.metrics)
    assert tail.take() == []
    write(run, *steps(0), WARNING, b"spoiled\n", b'{"step": 1, "time": 1, "a": NaN, "b": true, "c"')
    assert tail.take() == [Row(number=0, step=0, time=100.0, values={"reward/trained": 0.0})]
    write(run, b": 2}\n")
    assert tail.take() == [Row(number=3, step=1, time=1.0, values={"c": 2.0})]
    assert tail.take() == []


def test_of_a_step_that_is_told_again_what_is_new_in_it_counts():
    once = Once()
    first, again = Row(0, 1, 0.0, {"a": 1.0}), Row(1, 1, 0.0, {"a": 2.0, "b": 3.0})
    assert [row.values for row in once.new([first, again])] == [{"a": 1.0}, {"b": 3.0}]
    assert once.has_again([again])
    assert not once.has_again([Row(2, 2, 0.0, {"a": 1.0})])
    assert [row.values for row in once.latest([first, again])] == [{"a": 2.0, "b": 3.0}]
