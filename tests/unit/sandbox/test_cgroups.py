"""Which version is chosen, what is written, what is counted, and what is swept, in directories that stand for the
kernel's. Those files that a kernel makes with a cgroup are made beforehand, where a test needs them.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.sandbox import cgroups
from palestra.sandbox.cgroups import Cgroups, KillCount, sweep
from palestra.sandbox.records import Limits

NAME = "palestra-test-1"
MB = 2**20
LIMITS = Limits(memory_mb=100, disk_mb=28, processes=10, cpus=0.5)
NO_KILL_2 = "low 0\nhigh 0\nmax 7\noom 3\noom_kill 0\noom_group_kill 0\n"
NO_KILL_1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n"


def file(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Machine:
    """`top` and `mine`, as /sys/fs/cgroup and /proc/self/cgroup. This process is in /ours of all hierarchies."""

    def __init__(self, directory: Path):
        self.top, self.mine = directory / "cgroup", file(directory / "mine")

    def add_version_2(self, controllers: str = "cpu io memory pids", own: str = "/ours", at: str = "") -> None:
        self.mine.write_text(self.mine.read_text() + f"0::{own}\n")
        mounted = self.top / at
        for place in {mounted, mounted / own.lstrip("/")}:
            file(place / "cgroup.controllers", controllers)
            file(place / "cgroup.subtree_control")
            file(place / "cgroup.procs")

    def add_version_1(self, controllers: tuple[str, ...] = ("memory", "pids", "cpu")) -> None:
        for number, controller in enumerate(controllers, 1):
            self.mine.write_text(self.mine.read_text() + f"{number}:{controller}:/ours\n")
            (self.top / controller / "ours").mkdir(parents=True)

    def cgroups(self) -> Cgroups:
        return Cgroups(NAME, top=self.top, mine=self.mine)

    def make_2(self, place: str = "ours", *, swap: bool = True) -> Path:
        made = self.top / place / NAME / "0"
        for name in ("cgroup.procs", "memory.max", "pids.max", "cpu.max", *(["memory.swap.max"] if swap else [])):
            file(made / name)
        file(made / "memory.events", NO_KILL_2)
        return made

    def make_1(self) -> dict[str, Path]:
        made = {name: self.top / name / "ours" / NAME / "0" for name in ("memory", "pids", "cpu")}
        for place in made.values():
            file(place / "tasks")
        file(made["memory"] / "memory.oom_control", NO_KILL_1)
        file(made["memory"] / "memory.swappiness", "60")
        return made


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(20)
    return ended.pid


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Of these files, the kernel refuses to be written to while processes are in their cgroup."""
    refused, write = set[Path](), Path.write_text

    def write_text(path: Path, text: str, *rest, **options) -> int:
        inside = (path.parent / "cgroup.procs").read_text().split() if path in refused else []
        moved = "".join(p.read_text() for p in path.parent.glob("palestra-self/cgroup.procs"))
        if set(inside) - set(moved.split()):
            raise OSError(errno.EBUSY, "busy")
        return write(path, text, *rest, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    return refused


# --- which


def test_version_2_is_taken_before_version_1(machine: Machine) -> None:
    machine.add_version_1()
    machine.add_version_2()
    assert machine.cgroups().version == 2
    assert (machine.top / "ours/cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert (machine.top / "ours" / NAME / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert not (machine.top / "memory/ours" / NAME).exists()


@pytest.mark.parametrize("controllers", ["", "cpu io", "memory cpu"])
def test_version_1_is_taken_where_version_2_counts_too_little(machine: Machine, controllers: str) -> None:
    machine.add_version_1()
    machine.add_version_2(controllers, at="unified")
    assert machine.cgroups().version == 1
    assert (machine.top / "memory/ours" / NAME).is_dir()


@pytest.mark.parametrize("controllers", [(), ("cpu",), ("memory", "cpu"), ("pids",)])
def test_none_is_taken_where_memory_or_processes_are_not_counted(
    machine: Machine, controllers: tuple[str, ...]
) -> None:
    machine.add_version_1(controllers)
    own = machine.cgroups()
    assert own.version == 0
    assert own.take(LIMITS) is None


def test_a_processor_that_is_not_counted_is_not_asked_for(machine: Machine) -> None:
    machine.add_version_2("memory pids")
    assert machine.cgroups().version == 2
    assert (machine.top / "ours/cgroup.subtree_control").read_text() == "+memory +pids"


# --- whose processes are in the way


def test_this_process_moves_out_of_its_own_way(machine: Machine, refused: set[Path]) -> None:
    machine.add_version_2()
    file(machine.top / "ours/cgroup.procs", f"{os.getpid()}\n")
    file(machine.top / "ours/palestra-self/cgroup.procs")
    refused.add(machine.top / "ours/cgroup.subtree_control")
    assert machine.cgroups().version == 2
    assert (machine.top / "ours/palestra-self/cgroup.procs").read_text() == str(os.getpid())
    assert (machine.top / "ours" / NAME).is_dir()


@pytest.mark.parametrize("other", [os.getppid(), 0])
def test_others_are_not_moved_and_the_cgroup_above_is_taken(machine: Machine, refused: set[Path], other: int) -> None:
    machine.add_version_2()
    file(machine.top / "ours/cgroup.procs", f"{os.getpid()}\n{other}\n")
    refused.add(machine.top / "ours/cgroup.subtree_control")
    assert machine.cgroups().version == 2
    assert not (machine.top / "ours/palestra-self").exists()
    assert (machine.top / NAME).is_dir()


def test_others_at_the_top_leave_none(machine: Machine, refused: set[Path]) -> None:
    machine.add_version_2(own="/")
    file(machine.top / "cgroup.procs", f"{os.getpid()}\n{os.getppid()}\n")
    refused.add(machine.top / "cgroup.subtree_control")
    assert machine.cgroups().version == 0


# --- what is written


def test_settings_of_version_2(machine: Machine) -> None:
    machine.add_version_2()
    made = machine.make_2()
    group = machine.cgroups().take(LIMITS)
    assert group is not None
    written = {name: (made / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max")}
    assert written == {
        "memory.max": str((100 + 28 + 32) * MB),
        "memory.swap.max": "0",
        "pids.max": "12",
        "cpu.max": "50000 100000",
    }
    assert len(group.fds) == 1
    os.write(group.fds[0], b"0")
    assert (made / "cgroup.procs").read_text() == "0"
    group.remove()


def test_a_kernel_that_counts_no_swap_is_not_told_of_it(machine: Machine) -> None:
    machine.add_version_2()
    made = machine.make_2(swap=False)
    group = machine.cgroups().take(Limits(memory_mb=100, cpus=None))
    assert group is not None
    assert not (made / "memory.swap.max").exists()
    assert (made / "cpu.max").read_text() == "max 100000"
    group.remove()


def test_settings_of_version_1(machine: Machine) -> None:
    machine.add_version_1()
    made = machine.make_1()
    group = machine.cgroups().take(LIMITS)
    assert group is not None
    assert (made["memory"] / "memory.limit_in_bytes").read_text() == str((100 + 28 + 32) * MB)
    assert (made["memory"] / "memory.swappiness").read_text() == "0"
    assert (made["pids"] / "pids.max").read_text() == "12"
    assert (made["cpu"] / "cpu.cfs_quota_us").read_text() == "50000"
    assert len(group.fds) == 3
    group.take(Limits(cpus=None))
    assert (made["cpu"] / "cpu.cfs_quota_us").read_text() == "-1"
    assert len(group.fds) == 2
    group.remove()


def test_one_that_was_given_back_is_used_again_with_the_next_ones_limits(machine: Machine) -> None:
    machine.add_version_2()
    made = machine.make_2()
    own = machine.cgroups()
    first = own.take(LIMITS)
    assert first is not None
    own.give_back(first)
    again = own.take(Limits(memory_mb=200, disk_mb=28))
    assert again is first
    assert (made / "memory.max").read_text() == str((200 + 28 + 32) * MB)
    own.close()


# --- kills


@pytest.mark.parametrize("version", [1, 2])
def test_kills_are_counted_once(machine: Machine, version: int) -> None:
    if version == 2:
        machine.add_version_2()
        events, before = machine.make_2() / "memory.events", NO_KILL_2
    else:
        machine.add_version_1()
        events, before = machine.make_1()["memory"] / "memory.oom_control", NO_KILL_1
    own = machine.cgroups()
    group = own.take(LIMITS)
    assert group is not None
    assert not group.has_killed()
    events.write_text(before.replace("oom_kill 0", "oom_kill 12"))
    assert [group.has_killed(), group.has_killed()] == [True, False]
    events.write_text(before.replace("oom_kill 0", "oom_kill 13"))
    own.give_back(group)
    assert own.take(LIMITS) is group
    assert not group.has_killed()  # that was the sandbox before
    own.close()


def test_limits_that_were_reached_without_a_kill_are_none(tmp_path: Path) -> None:
    count = KillCount(tmp_path, 2)
    assert not count.has_grown()  # not there yet
    events = file(tmp_path / "memory.events", NO_KILL_2)
    assert not count.has_grown()
    events.write_text(NO_KILL_2.replace("oom_kill 0", "oom_kill 1"))
    assert [count.has_grown(), count.has_grown()] == [True, False]


# --- what others left


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_dead_left_is_swept_and_the_living_keep_theirs(machine: Machine, version: int, gone: int) -> None:
    machine.add_version_2() if version == 2 else machine.add_version_1()
    ours = machine.top / ("" if version == 2 else "memory") / "ours"
    left = [ours / f"palestra-1-{gone}", ours.parent / f"palestra-local2-{gone}"]  # also in the cgroup above
    kept = [ours / f"palestra-1-{os.getpid()}", ours / "palestra-self", ours / f"others-{gone}"]
    for place in (*left, *kept):
        (place / "0").mkdir(parents=True)
    assert sweep(top=machine.top, mine=machine.mine) == 4
    assert [place for place in left if place.exists()] == []
    assert [place for place in kept if not (place / "0").exists()] == []


def test_one_with_somebody_in_it_stays(machine: Machine, gone: int) -> None:
    machine.add_version_2()
    inside = machine.top / "ours" / f"palestra-1-{gone}" / "0"
    file(inside / "somebody")  # a directory that is not empty stands for a cgroup that is not
    assert sweep(top=machine.top, mine=machine.mine) == 0
    assert inside.exists()


def test_descendants_are_ours_and_ancestors_are_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert cgroups._is_ours(child.pid)
        assert cgroups._is_ours(os.getpid())
        assert not cgroups._is_ours(os.getppid())
        assert not cgroups._is_ours(0)
    finally:
        child.communicate(b"\n", timeout=20)
