"""Cases of the fault suite: each is a run with planted faults, played by a function that returns it when it has ended.

Runs are mostly waits for processes to start, so two are played at a time, ahead of the tests that judge them.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.fault.doomed import Fault
from tests.fault.whole_run import FaultyRun, config_of

DEADLINE_S = 240  # of one case, and of those before it that are still being played


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


class Ahead:
    """Plays cases in their order, two at a time."""

    def __init__(self, cases: list[Case], model: Path, make_directory: Callable[[str], Path]):
        self._pool = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 2))
        self._played: dict[str, Future[FaultyRun]] = {
            case.name: self._pool.submit(case.play, Maker(model, make_directory(f"case-{number}")))
            for number, case in enumerate(cases)
        }

    def run_of(self, case: Case) -> FaultyRun:
        """Errors: whatever the case raised."""
        return self._played[case.name].result(timeout=DEADLINE_S)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
