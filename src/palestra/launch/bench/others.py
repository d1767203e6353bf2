"""How much of the processors others used while ours ran: what a number on a shared machine is worth. Linux only."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # columns: idle, waiting for a disk
_COUNTED = 8  # user to steal; guests are in user already


@dataclass(frozen=True)
class Used:
    """Seconds of processors since the machine's start: by all, and by this process and its children that ended."""

    all_s: float
    ours_s: float
    at: float

    @classmethod
    def now(cls) -> "Used | None":
        if not _STAT.is_file():
            return None
        return cls(busy_s(_STAT.read_text(), os.sysconf("SC_CLK_TCK")), _ours_s(), time.monotonic())

    def by_others(self, before: "Used", cpus: int) -> float:
        """Share of all processors, from `before` to this."""
        busy_s = (self.all_s - before.all_s) - (self.ours_s - before.ours_s)
        return max(0.0, busy_s / (cpus * (self.at - before.at)))


def busy_s(stat: str, ticks_per_s: int) -> float:
    """From the first line of /proc/stat."""
    ticks = [int(word) for word in stat.split("\n", 1)[0].split()[1 : 1 + _COUNTED]]
    return sum(tick for column, tick in enumerate(ticks) if column not in _IDLE) / ticks_per_s


def _ours_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
