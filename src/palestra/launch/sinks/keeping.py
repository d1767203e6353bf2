"""The processes that tell other places of a run's metrics: started with it, ended with it, and of no weight in it."""

import importlib.util
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from palestra.core.errors import UserError
from palestra.core.guard import Guard, kill_group
from palestra.launch.child import ended_how
from palestra.wire.rundir import RunDir

_LAST_S = 30.0  # that all places together may take for the rest, when a run has ended
_GONE_S = 5.0  # after SIGKILL


def require_places(places: Sequence[str]) -> None:
    """Errors: UserError, naming the library that is not there."""
    for place in places:
        if importlib.util.find_spec(place) is None:
            raise UserError(
                f'log.to names {place}, which is not installed: pip install "palestra[{place}]", or leave it out'
            )


def tell(run: RunDir, place: str) -> int:
    """Everything that is there, once, in the foreground; the exit code of who tells it. Errors: UserError."""
    require_places([place])
    return subprocess.run([sys.executable, "-m", "palestra.launch.sinks", str(run.path), place, "--once"]).returncode


@dataclass(frozen=True)
class _Told:
    """One process, which ends when its standard input does, and who hears of its end."""

    place: str
    process: subprocess.Popen[bytes]
    is_ending: threading.Event
    heeded: threading.Thread


@contextmanager
def telling(run: RunDir, places: Sequence[str], guard: Guard, say: Callable[[str], None]) -> Iterator[None]:
    """For as long as the block lasts; then they tell the rest. `say` hears, once, of a place that failed."""
    started = [told for place in places if (told := _start(run, place, say)) is not None]
    for told in started:
        guard.watch(told.process.pid)
    try:
        yield
    finally:
        _end(started, guard)


def _python() -> str:
    return sys.executable


def _start(run: RunDir, place: str, say: Callable[[str], None]) -> _Told | None:
    log = run.log(f"told-{place}")
    argv = [_python(), "-m", "palestra.launch.sinks", str(run.path), place]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
    except OSError as error:
        say(f"{place} is not told of metrics: {error}; the run goes on")
        return None
    is_ending = threading.Event()
    heeded = threading.Thread(target=_heed, args=(run, place, process, is_ending, say), daemon=True)
    heeded.start()
    return _Told(place, process, is_ending, heeded)


def _heed(
    run: RunDir,
    place: str,
    process: subprocess.Popen[bytes],
    is_ending: threading.Event,
    say: Callable[[str], None],
) -> None:
    """Until it ends, which it does with the run at the latest."""
    code = process.wait()
    if code or not is_ending.is_set():
        say(
            f"{place} is not told of metrics any more ({ended_how(code)}; see {run.log(f'told-{place}')}); "
            f"metrics.jsonl has them all, and `palestra runs tell {run.path} {place}` catches up"
        )


def _end(started: Sequence[_Told], guard: Guard) -> None:
    """What takes longer than it may is killed, and says so."""
    until = time.monotonic() + _LAST_S
    for told in started:
        assert told.process.stdin is not None
        told.is_ending.set()
        told.process.stdin.close()
    for told in started:
        told.heeded.join(timeout=max(until - time.monotonic(), 0.1))
        kill_group(told.process.pid, signal.SIGKILL)
        told.heeded.join(timeout=_GONE_S)
        guard.ended(told.process.pid)
