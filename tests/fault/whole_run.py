"""A whole run with planted faults, in a directory of its own, started as often as a test likes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from palestra.config import RunConfig
from palestra.wire.rundir import RunDir
from tests.fault.doomed import Fault, write_faults
from tests.fault.table import FILE, Table
from tests.fault.witness import VARIABLE, Witness
from tests.unit.env.tiny import save_tokenizer

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 105  # that of the tokenizer
STEPS, GROUPS, GROUP_SIZE = 6, 2, 4
GONE_S = 60
ATTEMPT_S = 240.0  # of one attempt, on a machine that is busy with much else
ENVIRONMENTS = Path(__file__).with_name("environment.py")
QUICK: dict[str, dict[str, dict]] = {
    "engine-0": {"engine": {"call_s": 3}, "sync": {"deadline_s": 5}},
    "env-0": {"env": {"stall_s": 5, "answer_s": 3}},
}
"""By who hangs: sections for cases in which only a deadline ends that. A busy machine can break them in others."""


def config_of(outputs: Path, model: Path, **sections: dict) -> RunConfig:
    """Small and quick; `sections` are laid over it. Its deadlines are no matter of speed: a process may stand still."""
    tree: dict = {
        "log": {"name": "run", "outputs": str(outputs)},
        "model": {"path": str(model), "dtype": "float32"},
        "algo": {"groups_per_step": GROUPS, "group_size": GROUP_SIZE, "max_age": 4},
        "sampling": {"max_tokens": 12},
        "train": {"steps": STEPS, "lr": 2.0, "max_pack_tokens": 128, "checkpoint_every": 2, "batch_deadline_s": 60},
        "engine": {"max_model_len": 64, "max_in_flight": 16, "healthy_s": 60, "call_s": 60, "join_max_tokens": 0},
        "sync": {"deadline_s": 60, "probe_tokens": 32},
        "env": {
            "mix": [{"id": f"{ENVIRONMENTS}:TwoTurns", "name": "two"}],
            "stall_s": 60,
            "answer_s": 60,
        },
        "launch": {"stop_s": 5},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return RunConfig.model_validate(tree)


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own. Skips the test where nobody may mount one."""
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def save_table(directory: Path) -> Path:
    """The table's model directory: what a trainer, an engine and a worker look for in one."""
    save_tokenizer(directory)
    Table.random(VOCAB_SIZE).save(directory / FILE)
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return directory


class FaultyRun:
    """`config` is played to its end, with `faults`. `outputs` may be a small disk; notes are kept in `directory`."""

    def __init__(
        self, config: RunConfig, faults: list[Fault], directory: Path, *, kind: str = "table", step_s: float = 0.1
    ):
        self.config, self.run, self.kind = config, RunDir(config.run_dir), kind
        self.witness = Witness(directory / "faults")
        self.witness.directory.mkdir(parents=True)
        self._config_path = directory / "wanted.json"
        self._config_path.write_text(config.model_dump_json())
        write_faults(self.witness.directory, faults)
        (self.witness.directory / "pace.json").write_text(str(step_s))
        self.num_starts = 0

    def start(self, *words: str, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        self.num_starts += 1
        command = [sys.executable, "-m", "tests.fault.supervised", str(self._config_path), self.kind, *words]
        env = {
            **os.environ,
            VARIABLE: str(self.witness.directory),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        }
        return subprocess.Popen(command, env=env, stdout=output, stderr=output, text=True, start_new_session=True)

    def finish(self, *words: str, deadline_s: float = ATTEMPT_S) -> tuple[int, str]:
        """Exit code and everything said; nothing of the run is left afterwards."""
        with self.start(*words) as process:
            try:
                out, err = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"not ended after {deadline_s} s: {process.communicate()}") from None
        self.require_gone()
        return process.returncode, out + err

    def play(self, *, resumes: int = 0, deadline_s: float = ATTEMPT_S) -> str:
        """To its end, resumed as often as it was killed as a whole. What the last attempt said."""
        for number in range(resumes):
            self.break_off(*(["--resume"] if number else []), deadline_s=deadline_s)
        code, said = self.finish(*(["--resume"] if resumes else []), deadline_s=deadline_s)
        assert code == 0, said
        return said

    def break_off(self, *words: str, deadline_s: float = ATTEMPT_S) -> str:
        """One attempt that does not reach the end, and what it said."""
        code, said = self.finish(*words, deadline_s=deadline_s)
        assert code != 0, f"nothing ended the attempt: {said}"
        return said

    def resume(self, *, deadline_s: float = ATTEMPT_S) -> None:
        code, said = self.finish("--resume", deadline_s=deadline_s)
        assert code == 0, said

    def moved_to(self, directory: Path) -> "FaultyRun":
        """Itself, after its run directory was moved."""
        self.run = RunDir(directory)
        return self

    def processes(self) -> list[int]:
        """Every living process of the run, whatever it is called and whoever its parent is."""
        mark = f"{VARIABLE}={self.witness.directory}".encode()
        return [pid for pid in _pids() if mark in _read(pid, "environ").split(b"\0") and not _is_zombie(pid)]

    def require_gone(self) -> None:
        """Errors: AssertionError naming the processes that were left behind."""
        end = time.monotonic() + GONE_S
        while left := self.processes():
            commands = [_read(pid, "cmdline").replace(b"\0", b" ").decode() for pid in left]
            assert time.monotonic() < end, f"left behind: {commands}"
            time.sleep(0.02)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _is_zombie(pid: int) -> bool:
    stat = _read(pid, "stat")
    return not stat or stat.rsplit(b")", 1)[1].split()[0] == b"Z"
