"""What every process of a run does at its start."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from palestra.core.clock import unix_now
from palestra.core.errors import UserError

LIFE = "PALESTRA_LIFE"  # environment variable: how often this process was started before, in this attempt of the run
_PR_SET_PDEATHSIG = 1


def life() -> int:
    """How often this process was started before in this attempt of the run."""
    return int(os.environ.get(LIFE, "0"))


def die_with_parent(expected_parent: int) -> None:
    """Ask the kernel (Linux) to kill this process when its parent dies, however it dies.

    Errors: SystemExit, if the parent is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected_parent:
        raise SystemExit(f"the parent process {expected_parent} is gone; not starting")


def exit_with(main: Callable[..., int]) -> NoReturn:
    """End with what `main` makes of the command line's words. The user's mistake is told in words, with exit code 2."""
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def collect_garbage_seldom() -> None:
    """For an event loop with thousands of rollouts, whose objects live long and are many: looking through all of them
    takes half a second in which nobody is answered. By default that happens whenever a quarter came to them; now, after
    two million new ones. What is there already is never looked at again. Young garbage is found as before.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 100)


def started_at() -> float:
    """Unix time at which this process began (Linux: read from the kernel), so that imports are accounted for."""
    try:
        with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime", encoding="ascii") as uptime:
            ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
            running_s = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return unix_now()
    return unix_now() - max(running_s, 0.0)


def resident_bytes() -> int:
    """Memory that this process holds (Linux); 0 where the kernel does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
