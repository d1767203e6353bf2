"""One started process: it leads a process group of its own, writes one log, and talks to the supervisor."""

import asyncio
import os
import signal
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from palestra.core.clock import unix_now
from palestra.core.errors import DeadlineError, InfrastructureError
from palestra.core.guard import Guard, kill_group
from palestra.core.process import LIFE
from palestra.launch.plan import Program
from palestra.wire.messages import Failed

_TAIL_LINES, _TAIL_BYTES = 20, 16_384


@dataclass
class Child:
    """A running process and what it has said. Its log may hold earlier attempts: this one's begins at `log_start`."""

    program: Program
    process: asyncio.subprocess.Process
    log: Path
    log_start: int
    life: int = 0
    started_at: float = field(default_factory=unix_now)
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # an end from now on is no failed start
    done: asyncio.Event = field(default_factory=asyncio.Event)  # it said Done
    done_under: int = 0  # the life of the leader that was heard last before
    last_word: asyncio.Event = field(default_factory=asyncio.Event)  # Done or Failed
    failure: Failed | None = None
    late: DeadlineError | None = None  # it was ended because it was not ready in time
    unwanted: str = ""  # it was ended because the orchestrator asked for it: why
    is_planned: bool = False  # that end

    @property
    def name(self) -> str:
        return self.program.name

    def signal(self, number: signal.Signals) -> None:
        """To every process of its group."""
        kill_group(self.process.pid, number)

    def log_text(self) -> str:
        """The last lines of what this process wrote, "" if it wrote nothing."""
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, self.log.stat().st_size - _TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").rstrip().splitlines()[-_TAIL_LINES:])

    def tail(self) -> str:
        """The last lines of its log, indented, and where the whole log is."""
        text = self.log_text()
        return f"the end of {self.log}:\n{textwrap.indent(text, '    ')}" if text else f"{self.log} is empty"


async def start(program: Program, env: Mapping[str, str], log: Path, guard: Guard, *, life: int) -> Child:
    """Errors: InfrastructureError, if the system cannot start it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        log_start = output.tell()
        try:
            process = await asyncio.create_subprocess_exec(
                *program.argv,
                env={**os.environ, **env, LIFE: str(life)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise InfrastructureError(f"{program.name} could not be started: {error}") from error
    guard.watch(process.pid)
    return Child(program, process, log, log_start, life)


def ended_how(code: int) -> str:
    """In words: `exit code 1`, `killed by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
