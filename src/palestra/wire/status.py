"""What state a run is in: status.json, and a lock that the kernel releases however the supervisor ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import msgspec
from msgspec import Struct

from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.wire.rundir import RunDir


class State(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    KILLED = "killed"  # never written: it was running, and nobody holds its lock


class Status(Struct, frozen=True, kw_only=True):
    """Times are unix times; `ended_at` is 0 while it runs."""

    state: State
    attempt: int
    pid: int
    started_at: float
    ended_at: float = 0.0
    error: str = ""


def write_status(run: RunDir, status: Status) -> None:
    write_atomically(run.path / "status.json", msgspec.json.encode(status))


def read_status(run: RunDir) -> Status | None:
    """None for a run that never started."""
    path = run.path / "status.json"
    if not path.exists():
        return None
    status = msgspec.json.decode(path.read_bytes(), type=Status)
    if status.state is State.RUNNING and not _is_locked(run):
        return msgspec.structs.replace(status, state=State.KILLED)
    return status


@contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """One supervisor per run directory. Errors: UserError naming the one that holds it."""
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            status = read_status(run)
            holder = f"process {status.pid}" if status else "another process"
            raise UserError(
                f"{run.path} is running already ({holder}); wait for its end, or give another log.name"
            ) from None
        yield


def now_running(attempt: int, started_at: float) -> Status:
    return Status(state=State.RUNNING, attempt=attempt, pid=os.getpid(), started_at=started_at)


def _is_locked(run: RunDir) -> bool:
    try:
        with (run.path / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
