"""What processes of a faulty run note down outside of the run directory, beside everything the run itself keeps.

One line per note, at once, so that a kill loses none.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "PALESTRA_FAULTS"  # the directory; every process of the run has it in its environment, the guard too


def faults_directory() -> Path:
    return Path(os.environ[VARIABLE])


class Witness:
    """Notes under one directory, and what was noted."""

    def __init__(self, directory: Path):
        self.directory = directory

    # --- written by the processes

    def started(self, process: str, life: int) -> None:
        self._note("pids", process=process, life=life, pid=os.getpid())

    def fired(self, number: int) -> None:
        self._note("fired", fault=number)

    def ended(self, rollout_id: int) -> None:
        """It is in the journal that this rollout is finished."""
        self._note("ended", rollout=rollout_id)

    def trained(self, step: int, rollouts: list[int]) -> None:
        self._note("trained", step=step, rollouts=rollouts)

    def listening(self, host: str, port: int) -> None:
        self._note("listening", host=host, port=port)

    def served(self, engine: str, version: str) -> None:
        """From now on this engine samples with `version`."""
        self._note("served", engine=engine, version=version)

    def entered(self, process: str, *, is_alone: bool) -> None:
        """The device that it shares is its own from now on, or should be."""
        self._note("entered", process=process, is_alone=is_alone)

    def _note(self, name: str, **fields: Any) -> None:
        line = json.dumps({"time": time.monotonic(), **fields}) + "\n"
        with (self.directory / f"{name}.jsonl").open("a") as file:
            file.write(line)

    # --- read by the tests

    def read(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def pid(self, process: str) -> int:
        """Of its newest life."""
        return [note["pid"] for note in self.read("pids") if note["process"] == process][-1]

    @property
    def engine_address(self) -> tuple[str, int]:
        """Of the newest process that listened there."""
        note = self.read("listening")[-1]
        return note["host"], note["port"]

    def num_fired(self, number: int) -> int:
        return sum(note["fault"] == number for note in self.read("fired"))
