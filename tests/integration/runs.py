"""Whole runs as a user starts them: the recipe, the command line, the processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RECIPE = """
[log]
name = "{name}"
outputs = "{outputs}"

[model]
dtype = "float32"

[model.build]
architecture = "Qwen3ForCausalLM"
alphabet = "abcdefghijklmnopqrstuvwxyz"

[model.build.config]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 32
tie_word_embeddings = true

[algo]
groups_per_step = 4
group_size = 8
max_age = {max_age}

[sampling]
max_tokens = 12

[train]
steps = 6
lr = 3e-3
max_pack_tokens = 256
checkpoint_every = 2

[engine]
max_model_len = 64
max_in_flight = 64
kv_cache_gib = 0.25

[[env.mix]]
id = "{environment}"
name = "{kind}"
"""

ENVIRONMENTS = Path(__file__).with_name("tiny_environment.py")


class Run:
    """One recipe in a directory of its own, started as often as a test likes."""

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        max_age: int = 4,
        environment: str = "EarlyLetters",
        file: Path = ENVIRONMENTS,
    ):
        self.path = directory / name
        self._recipe = directory / f"{name}.toml"
        self._recipe.write_text(
            RECIPE.format(
                name=name,
                outputs=directory,
                max_age=max_age,
                environment=f"{file}:{environment}",
                kind=environment,
            )
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "palestra.launch.cli", "run", str(self._recipe), *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self, *words: str, deadline_s: float = 280) -> tuple[int, str]:
        """Exit code and everything said."""
        with self.start(*words) as process:
            try:
                out, err = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return process.returncode, out + err

    @property
    def rows(self) -> dict[int, dict]:
        """Step -> the last row of metrics.jsonl for it; evaluations and warm-up left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return {row["step"]: row for row in rows if "phase" not in row}

    @property
    def summary(self) -> dict:
        return json.loads((self.path / "summary.json").read_text())

    def processes(self) -> dict[int, str]:
        """Living processes by pid: those with the run's directory on their command line, and their children."""
        commands = {pid: command for pid in _pids() if (command := _read(pid, "cmdline").replace("\0", " "))}
        found = {
            pid: command
            for pid, command in commands.items()
            if str(self._recipe) in command or str(self.path) in command
        }
        while children := {
            pid: command for pid, command in commands.items() if pid not in found and _parent(pid) in found
        }:
            found |= children
        return found


def wait_until(condition, *, deadline_s: float, what: str, while_alive: subprocess.Popen | None = None) -> None:
    """For tests only: looks ten times a second."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        assert while_alive is None or while_alive.poll() is None, (
            f"the run ended before {what}: {while_alive.stderr.read()}"
        )
        time.sleep(0.1)


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def maps(pid: int) -> str:
    """The files mapped into a process."""
    return _read(pid, "maps")


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    stat = _read(pid, "stat")
    return int(stat.rsplit(")", 1)[1].split()[1]) if stat else 0
