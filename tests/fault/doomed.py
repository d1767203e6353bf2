"""Start a program of a run so that something happens to it, or to another one, at a named point.

`python -m tests.fault.doomed MODULE CONFIG` runs MODULE as it would run by itself. Functions that are named as points
are wrapped before anything else imports them; nothing else of the program is changed.
"""

import functools
import importlib
import inspect
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from palestra.core.process import life
from palestra.wire.rundir import RunDir
from tests.fault.witness import Witness, faults_directory

NAME = "PALESTRA_FAULTY_NAME"
AFTER_S = 240.0


class Fault(Struct, frozen=True, kw_only=True):
    """At the `nth` call of `at` ("module:Class.function") in one life of `process`, on entering or leaving: `do` it.

    kill, stop: SIGKILL, SIGSTOP to `victims`, one after the other. fill: the disk under `path`. clock: `time.time` of
    the process jumps by `seconds`. refuse: kill the victims and hold the first engine's port for `seconds`.
    skip: the function is not called. fail: it raises a broken connection. wait: nothing. It happens `times` in all.
    `after`: a file that is waited for at that call, before it happens.
    """

    process: str
    at: str
    nth: int = 1
    life: int | None = None  # only in this life of the process
    attempt: int | None = None  # only in this attempt of the run
    when: str = "enter"
    do: str = "kill"
    victims: tuple[str, ...] = ()
    path: str = ""
    seconds: float = 0.0
    times: int = 1
    after: str = ""


def write_faults(directory: Path, faults: list[Fault]) -> None:
    (directory / "faults.json").write_bytes(msgspec.json.encode(faults))


def arm(number: int, fault: Fault, witness: Witness) -> None:
    """Wrap the function that the fault names."""
    module, _, path = fault.at.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, name, _wrapped(getattr(owner, name), _Point(number, fault, witness)))


class _Point:
    """Counts the calls of one function."""

    def __init__(self, number: int, fault: Fault, witness: Witness):
        self._number, self.fault, self._witness, self._calls = number, fault, witness, 0

    def pass_by(self, when: str) -> bool:
        """Whether it happened; it is noted down before it does."""
        if when != self.fault.when:
            return False
        self._calls += 1
        if self._calls < self.fault.nth or self._witness.num_fired(self._number) >= self.fault.times:
            return False
        if self.fault.after:
            _wait_for(Path(self.fault.after))
        self._witness.fired(self._number)
        _ACTIONS[self.fault.do](self.fault, self._witness)
        return True


def _wrapped(function: Callable[..., Any], point: _Point) -> Callable[..., Any]:
    if point.fault.when == "leave" and inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def leaving(*args: Any, **kwargs: Any) -> Any:
            result = await function(*args, **kwargs)
            point.pass_by("leave")
            return result

        return leaving

    @functools.wraps(function)
    def around(*args: Any, **kwargs: Any) -> Any:
        if point.pass_by("enter") and point.fault.do == "skip":
            return None
        result = function(*args, **kwargs)
        point.pass_by("leave")
        return result

    return around


def _wait_for(file: Path) -> None:
    """Errors: TimeoutError, in the process that was to be hurt."""
    ends_at = time.monotonic() + AFTER_S
    while not file.exists():
        if time.monotonic() > ends_at:
            raise TimeoutError(f"{file} was not there within {AFTER_S:g} s")
        time.sleep(0.01)


# --- what can happen


def _signal(number: signal.Signals, fault: Fault, witness: Witness) -> None:
    """This process last, if it is one of them."""
    pids = [witness.pid(name) for name in fault.victims or (fault.process,)]
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
        os.kill(pid, number)


def _fill(fault: Fault, _: Witness) -> None:
    fill(Path(fault.path))


def fill(directory: Path) -> None:
    """The file system of `directory`, with a file called ballast."""
    with (directory / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass  # full


def _jump(fault: Fault, _: Witness) -> None:
    real = time.time
    time.time = lambda: real() + fault.seconds


def _refuse(fault: Fault, witness: Witness) -> None:
    """Somebody takes the engine's port in the moment it dies, and gives it back later."""
    host, port = witness.engine_address
    _signal(signal.SIGKILL, fault, witness)
    holder = _listen_once_free(host, port)
    threading.Timer(fault.seconds, holder.close).start()


def _listen_once_free(host: str, port: int) -> socket.socket:
    ends_at = time.monotonic() + AFTER_S
    while True:
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((host, port))
            holder.listen()
        except OSError:
            holder.close()
            if time.monotonic() > ends_at:
                raise
            time.sleep(0.005)
        else:
            return holder


def _fail(_: Fault, __: Witness) -> None:
    raise ConnectionResetError("planted: the stream is dropped")


_ACTIONS: dict[str, Callable[[Fault, Witness], None]] = {
    "kill": functools.partial(_signal, signal.SIGKILL),
    "stop": functools.partial(_signal, signal.SIGSTOP),
    "fill": _fill,
    "clock": _jump,
    "refuse": _refuse,
    "fail": _fail,
    "skip": lambda fault, witness: None,
    "wait": lambda fault, witness: None,
}


def _note_what_ends(witness: Witness) -> None:
    """Beside the journal: which rollouts it was said to hold."""
    from palestra.orchestrate.journal import Journal
    from palestra.orchestrate.state import RolloutEnded

    record = Journal.record

    def noted(self: Journal, event: Any) -> None:
        record(self, event)
        if isinstance(event, RolloutEnded):
            witness.ended(event.record.rollout_id)

    Journal.record = noted


def be_doomed(name: str, *, attempt: int) -> None:
    """Arm what is planned for this life of this process."""
    witness = Witness(faults_directory())
    witness.started(name, life())
    faults = msgspec.json.decode((witness.directory / "faults.json").read_bytes(), type=list[Fault])
    for number, fault in enumerate(faults):
        if fault.process == name and fault.life in (None, life()) and fault.attempt in (None, attempt):
            arm(number, fault, witness)
    if name == "orchestrator":
        _note_what_ends(witness)


def main() -> None:
    module, *arguments = sys.argv[1:]
    be_doomed(os.environ[NAME], attempt=RunDir(Path(arguments[-1]).parent).read_attempt().number)
    sys.argv = [module, *arguments]
    if module.startswith("tests."):
        sys.exit(importlib.import_module(module).main())
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
