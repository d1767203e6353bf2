"""The guard: a process that outlives another by a moment, to end what that one leaves behind, killed or not.

Consumes: lines on its standard input, `watch PGID`, `ended PGID`, `remove DIRECTORY`. Waits for: the end of that input,
which the kernel brings about however the supervisor dies. Then it kills the process groups still watched, removes the
directories (sockets, shared memory), and ends.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_CLEAN_UP_S = 60.0


class Guard:
    """The side of the process that it outlives. Errors: OSError, if no process can be started."""

    def __init__(self):
        argv = (sys.executable, "-m", "palestra.core.guard")
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, text=True, start_new_session=True)

    def watch(self, group: int) -> None:
        self._say(f"watch {group}")

    def ended(self, group: int) -> None:
        self._say(f"ended {group}")

    def remove(self, directory: Path) -> None:
        self._say(f"remove {directory}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # somebody killed the guard; processes still ask the kernel to end with their parent

    def close(self) -> None:
        """Let it clean up, and wait for its end; a file system that hangs is left alone."""
        try:
            self._process.communicate(timeout=_CLEAN_UP_S)
        except subprocess.TimeoutExpired:
            print(f"the guard did not finish cleaning up within {_CLEAN_UP_S:.0f} s", file=sys.stderr)


def keep(lines: Iterable[str]) -> None:
    """Errors: none; what is gone already needs no cleaning."""
    groups: set[int] = set()
    directories: list[str] = []
    for line in lines:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "watch":
            groups.add(int(rest))
        elif word == "ended":
            groups.discard(int(rest))
        elif word == "remove":
            directories.append(rest)
    for group in groups:
        kill_group(group, signal.SIGKILL)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def kill_group(group: int, number: signal.Signals) -> None:
    """Signal every process of the group; none left is fine."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # it ended by itself


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep(sys.stdin)
