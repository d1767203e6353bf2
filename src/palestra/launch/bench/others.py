"""How much of the processors others used while ours ran: what a number on a shared machine is worth. Linux only."""

import os
import resource
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # columns: idle, waiting for a disk
_COUNTED = 8  # user to steal; guests are in user already


@dataclass(frozen=True)
class Used:
    """Seconds of the processors that this process may use, since the machine's start: by all, and by this process and
    its children that ended."""

    all_s: float
    ours_s: float
    at: float

    @classmethod
    def now(cls) -> "Used | None":
        if not _STAT.is_file():
            return None
        busy = busy_s(_STAT.read_text(), os.sysconf("SC_CLK_TCK"), os.sched_getaffinity(0))
        return cls(busy, _ours_s(), time.monotonic())

    def by_others(self, before: "Used", cpus: int) -> float:
        """Share of these processors, `cpus` of them, from `before` to this."""
        busy_s = (self.all_s - before.all_s) - (self.ours_s - before.ours_s)
        return max(0.0, busy_s / (cpus * (self.at - before.at)))


def busy_s(stat: str, ticks_per_s: int, cpus: Collection[int]) -> float:
    """Of these processors, from the lines of /proc/stat."""
    names, busy = {f"cpu{number}" for number in cpus}, 0
    for name, *words in map(str.split, stat.splitlines()):
        if name in names:
            busy += sum(int(tick) for column, tick in enumerate(words[:_COUNTED]) if column not in _IDLE)
    return busy / ticks_per_s


def _ours_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
