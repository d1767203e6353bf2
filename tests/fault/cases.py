"""Cases of the fault suite: each is a run with planted faults, played by a function that returns it when it ended."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.fault.doomed import Fault
from tests.fault.whole_run import ATTEMPT_S, FaultyRun, config_of

DEADLINE_S = 3 * ATTEMPT_S + 80  # of one case, which has three attempts at most, and is judged


class Make(Protocol):
    """Makes the run of a case: its faults, and what differs in its config. `directory` is the case's own."""

    directory: Path

    def __call__(
        self, *faults: Fault, outputs: Path | None = None, step_s: float = 0.1, **sections: dict
    ) -> FaultyRun: ...


@dataclass(frozen=True)
class Case:
    """`play` returns the run for the counts to be taken; so many faults must have happened in it."""

    name: str
    play: Callable[[Make], FaultyRun]
    fired: int | None = 1


@dataclass(frozen=True)
class Maker:
    model: Path
    directory: Path

    def __call__(self, *faults: Fault, outputs: Path | None = None, step_s: float = 0.1, **sections: dict) -> FaultyRun:
        config = config_of(outputs or self.directory / "outputs", self.model, **sections)
        return FaultyRun(config, list(faults), self.directory, step_s=step_s)
