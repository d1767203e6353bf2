"""Limits that count a sandbox as a whole: cgroup v2 where it is delegated, else v1, else none.

A cgroup is used again by the next sandbox: making and removing one costs more than a fork. They are named after this
process, so that what a killed one left behind is known and removed by the next that starts.
"""

import errno
import itertools
import os
from pathlib import Path

from palestra.sandbox.records import MEGABYTE, Limits

_TOP = Path("/sys/fs/cgroup")
_MINE = Path("/proc/self/cgroup")
_NESTED = ("", "unified", "memory", "pids", "cpu")  # where hierarchies are mounted below the top; "" is version 2 alone
_CONTROLLERS = ("memory", "pids", "cpu")
_WAY_MADE, _MOST_ANCESTORS = "palestra-self", 256
_OVERHEAD_MB = 32  # of the agent, and of what the kernel keeps for it


class KillCount:
    """How often the kernel killed for a cgroup's memory. It need not be there yet, or any more."""

    def __init__(self, directory: Path, version: int):
        self._file = directory / ("memory.events" if version == 2 else "memory.oom_control")
        self._before = 0

    def has_grown(self) -> bool:
        """Since it was last asked."""
        try:
            now = _kills(self._file.read_bytes())
        except OSError:
            return False
        before, self._before = self._before, now
        return now > before


def _kills(events: bytes) -> int:
    _, word, rest = events.partition(b"oom_kill ")
    return int(rest.split(b"\n", 1)[0]) if word else 0


class Cgroup:
    """One sandbox's, as `fds` to write `0` into for whoever joins. Files are opened once: they are used often."""

    def __init__(self, directories: dict[str, Path], version: int):
        """Errors: OSError."""
        self.directories, self._version = directories, version
        self._limits: Limits | None = None
        name = "cgroup.procs" if version == 2 else "tasks"  # one thread joins: the kernel need not stop the others
        self._joins = {c: os.open(d / name, os.O_WRONLY | os.O_CLOEXEC) for c, d in self._by_controller().items()}
        events = "memory.events" if version == 2 else "memory.oom_control"
        self._events = os.open(directories["memory"] / events, os.O_RDONLY | os.O_CLOEXEC)
        self._kills_before = 0

    def _by_controller(self) -> dict[str, Path]:
        """One of version 2 has all controllers."""
        return {"memory": self.directories["memory"]} if self._version == 2 else self.directories

    def take(self, limits: Limits) -> None:
        """Errors: OSError."""
        if limits != self._limits:
            for controller, name, value in _settings(limits, self._version):
                file = self.directories[controller] / name if controller in self.directories else None
                if file is not None and (name not in _OPTIONAL or file.exists()):
                    file.write_text(str(value))
            self._limits = limits
        self._kills_before = self._kills()

    @property
    def fds(self) -> list[int]:
        """A share of processors is counted only where there is one."""
        is_shared = self._limits is not None and self._limits.cpus is not None
        return [fd for controller, fd in self._joins.items() if controller != "cpu" or is_shared]

    def has_killed(self) -> bool:
        """Whether the kernel killed for its memory since it was taken, or last asked."""
        before, self._kills_before = self._kills_before, self._kills()
        return self._kills_before > before

    def _kills(self) -> int:
        return _kills(os.pread(self._events, 4096, 0))

    def remove(self) -> None:
        for fd in (*self._joins.values(), self._events):
            os.close(fd)
        for directory in set(self.directories.values()):
            try:
                directory.rmdir()
            except OSError:
                pass  # somebody is still in it; the next process sweeps


def _settings(limits: Limits, version: int) -> list[tuple[str, str, int | str]]:
    """All of a sandbox's files are in memory: they are counted with it."""
    memory = limits.held_bytes + _OVERHEAD_MB * MEGABYTE
    period = 100_000
    quota = None if limits.cpus is None else max(int(limits.cpus * period), 1000)
    if version == 2:
        return [
            ("memory", "memory.max", memory),
            ("memory", "memory.swap.max", 0),
            ("pids", "pids.max", limits.processes + 2),
            ("cpu", "cpu.max", f"{quota or 'max'} {period}"),
        ]
    return [
        ("memory", "memory.limit_in_bytes", memory),
        ("memory", "memory.swappiness", 0),
        ("pids", "pids.max", limits.processes + 2),
        ("cpu", "cpu.cfs_quota_us", quota or -1),
    ]


_OPTIONAL = ("memory.swap.max", "memory.swappiness")  # a kernel that counts no swap has none
_names = itertools.count(1)  # two backends of one process share none


class Cgroups:
    """Those of this process. `version` is 0 where there are none to be had.

    `top` is where they are mounted, and `mine` tells which this process is in.
    """

    def __init__(self, name: str | None = None, *, top: Path = _TOP, mine: Path = _MINE):
        self._name = name or f"palestra-{next(_names)}-{os.getpid()}"
        self._numbers, self._free = itertools.count(), list[Cgroup]()
        self._known: list[Cgroup] = []
        self._parents, self.version = _parents(self._name, top, _own_paths(mine))

    def take(self, limits: Limits) -> Cgroup | None:
        """None where there are none. Errors: OSError."""
        if self.version == 0:
            return None
        group = self._free.pop() if self._free else self._make()
        group.take(limits)
        return group

    def give_back(self, group: Cgroup) -> None:
        """Nobody is in it any more: its sandbox has ended, and the first process ends last."""
        self._free.append(group)

    def _make(self) -> Cgroup:
        number = next(self._numbers)
        directories = {controller: parent / str(number) for controller, parent in self._parents.items()}
        for directory in set(directories.values()):
            directory.mkdir(exist_ok=True)
        group = Cgroup(directories, self.version)
        self._known.append(group)
        return group

    def close(self) -> None:
        for group in self._known:
            group.remove()
        self._known, self._free = [], []
        for parent in set(self._parents.values()):
            try:
                parent.rmdir()
            except OSError:
                pass


def _parents(name: str, top: Path, own: dict[str, str]) -> tuple[dict[str, Path], int]:
    """Where this process may make cgroups, by controller, and the version."""
    if "" in own:
        parents = _version_2(top, own[""], name)
        if parents:
            return parents, 2
    found: dict[str, Path] = {}
    for controller in _CONTROLLERS:
        if controller in own:
            parent = top / controller / own[controller].lstrip("/") / name
            if _made(parent):
                found[controller] = parent
    return (found, 1) if {"memory", "pids"} <= set(found) else ({}, 0)


def _version_2(top: Path, own: str, name: str) -> dict[str, Path]:
    """A child of the cgroup that is ours, or of the one above it where others' processes are in the way."""
    for mounted in (top, top / "unified"):
        mine = mounted / own.lstrip("/")
        for place in (mine, mine.parent) if mine != mounted else (mine,):
            try:
                available = set((place / "cgroup.controllers").read_text().split())
                if not {"memory", "pids"} <= available:
                    continue
                wanted = [c for c in _CONTROLLERS if c in available]
                _hand_down(place, wanted)
                parent = place / name
                parent.mkdir(exist_ok=True)
                (parent / "cgroup.subtree_control").write_text(_plus(wanted))
                return dict.fromkeys(wanted, parent)
            except OSError:
                continue
    return {}


def _plus(controllers: list[str]) -> str:
    return " ".join(f"+{controller}" for controller in controllers)


def _hand_down(place: Path, controllers: list[str]) -> None:
    """Let children of `place` have them. The kernel refuses that where processes are in `place` itself; if all of those
    are this process and what it started, they move into a child. Errors: OSError.
    """
    control = place / "cgroup.subtree_control"
    try:
        control.write_text(_plus(controllers))
    except OSError as error:
        inside = [int(number) for number in (place / "cgroup.procs").read_text().split()]
        if error.errno != errno.EBUSY or not all(map(_is_ours, inside)):
            raise
        child = place / _WAY_MADE
        child.mkdir(exist_ok=True)
        for number in inside:
            _move(number, child)
        control.write_text(_plus(controllers))


def _is_ours(number: int) -> bool:
    """Whether it is this process or descends from it. 0 is one that cannot be seen from here."""
    seen = 0
    while number > 1 and number != os.getpid() and seen < _MOST_ANCESTORS:
        try:
            stat = Path(f"/proc/{number}/stat").read_text()
        except OSError:
            return True  # it has ended
        number, seen = int(stat.rpartition(")")[2].split()[1]), seen + 1
    return number == os.getpid()


def _move(number: int, place: Path) -> None:
    try:
        (place / "cgroup.procs").write_text(str(number))
    except ProcessLookupError:
        pass  # it has ended


def _own_paths(mine: Path) -> dict[str, str]:
    """By controller; version 2 under the empty name."""
    found = {}
    try:
        for line in mine.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                found[controller] = path
    except OSError:
        pass
    return found


def _made(directory: Path) -> bool:
    try:
        directory.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


def sweep(*, top: Path = _TOP, mine: Path = _MINE) -> int:
    """Remove what processes that are gone left behind; how many cgroups that were."""
    count = 0
    for place in _places(top, mine):
        for directory in place.glob("palestra-*"):
            owner = directory.name.rpartition("-")[2]
            if owner.isdigit() and not Path(f"/proc/{owner}").exists():
                count += _removed(directory)
    return count


def _places(top: Path, mine: Path) -> set[Path]:
    """Where they are made: in the cgroups of this process, in those above, and by container runtimes at the top."""
    found = set()
    for mounted in (top / name for name in _NESTED):
        for path in _own_paths(mine).values():
            place = mounted / path.lstrip("/")
            found |= {mounted, place, place.parent} if place != mounted else {mounted}
    return found


def _removed(directory: Path) -> int:
    count = 0
    for place in (*directory.glob("*/"), directory):
        try:
            place.rmdir()
            count += 1
        except OSError:
            pass
    return count
