"""The trainer's benches from the command line, on a CPU: what measures a GPU machine still runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.launch.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[2] / "benchmarks/trainer_gpu.py"


def test_the_command_tells_a_step_as_json(capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", "tiny", "--tokens", "64", "--documents", "3", "--steps", "1", "--json", "--kind", "sft"]
    assert main(["bench", "trainer", *arguments, "model.dtype=float32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["kind"], told["ranks"], told["tokens_per_step"]) == ("tiny", "sft", 1, 64)
    assert told["tokens_per_s"] == pytest.approx(64 / told["step_s"])
    assert 0 < told["mfu"] < 1
    assert told["peak_bytes"] > told["state_bytes"] > 0


def test_the_script_for_gpu_machines_runs(tmp_path: Path):
    parts, file = ["experts-32k", "rl-16k", "muon-16k"], tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(file), "--only", *parts]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(file.read_text())
    assert list(found) == parts
    assert not any("error" in part for part in found.values())
    assert found["experts-32k"]["tflops"] > 0
    for name in parts[1:]:
        assert found[name]["tokens_per_step"] == 256
        assert 0 < found[name]["optimizer_share"] < 1
    assert found["rl-16k"]["state_bytes"] > found["muon-16k"]["state_bytes"], "Muon has one moment of a matrix"
    assert all(f"\n{name} {{" in f"\n{ended.stdout}" for name in parts)
