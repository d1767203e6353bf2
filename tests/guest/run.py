"""Limits by cgroups of version 2, in a small Linux guest that has them: `python tests/guest/run.py`.

Boots Debian's kernel in an emulator (no rights and no /dev/kvm needed), with this Python and these sources in memory,
and runs cases of `palestra sandbox check --backend local` in it. Prints the report as JSON; 0 if all cases passed and
cgroups of version 2 counted them, 1 if not, 3 if Debian's packages cannot be had.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.guest import files
from tests.guest.debian import Pieces, Unavailable, pieces

CASES = [
    "memory_of_one_process",
    "memory_of_eight_children",
    "memfd",
    "fork_bomb",
    "processor_share",
    "killed_service",
    "one_shot",
]
MEMORY_MB = 1536
_LIMIT_S = 900.0

# The root is bound into itself and moved to the top, as a kernel lets nobody leave the very first root.
_INIT = """#!/usr/bin/busybox sh
if [ "$1" != whole ]; then
  export PATH=/usr/bin
  mount --bind / /whole; cd /whole; mount --move . /; exec busybox chroot . /init whole
fi
export HOME=/root
for kind in proc:/proc sysfs:/sys devtmpfs:/dev tmpfs:/tmp cgroup2:/sys/fs/cgroup; do
  mount -t ${{kind%:*}} none ${{kind#*:}}
done
mkdir -p /dev/shm; mount -t tmpfs none /dev/shm; ip link set lo up
export PYTHONPATH={path}
(sleep {limit_s}; poweroff -f) &
{commands}
{python} /end.py >/dev/ttyS1
sync; poweroff -f
"""

# Where in the hierarchy the check runs: in its root; alone in a cgroup below, as a service does; there with a process
# that did not come from it, as in a session; alone in one that looks like the root from within, as in a container.
_START = """
import os, sys
place, command = sys.argv[1], sys.argv[2:]
if place != "root":
    os.makedirs("/sys/fs/cgroup/outer/inner")
    for name in ("", "outer/"):
        open("/sys/fs/cgroup/%scgroup.subtree_control" % name, "w").write("+memory +pids +cpu")
    for number in ("0", str(os.getppid())) if place == "session" else ("0",):
        open("/sys/fs/cgroup/outer/inner/cgroup.procs", "w").write(number)
if place == "container":
    from palestra.sandbox import kernel
    kernel.unshare(kernel.NEWCGROUP | kernel.NEWNS)
    kernel.mount("none", "/", flags=kernel.REC | kernel.PRIVATE)
    kernel.unmount("/sys/fs/cgroup")
    kernel.mount("none", "/sys/fs/cgroup", "cgroup2")
os.execv(command[0], command)
"""

# What a killed owner left there, and what is there after a sweep.
_END = """
import glob, json
from palestra.sandbox.cgroups import sweep
swept = sweep()
print(json.dumps({"swept": swept, "left": glob.glob("/sys/fs/cgroup/**/palestra-*-*/", recursive=True)}))
"""
PLACES = ("root", "service", "session", "container")


def report(
    cases: list[str], *, without: tuple[str, ...] = (), place: str = "root", limit_s: float = _LIMIT_S
) -> dict[str, Any]:
    """As of `reports`, of one check."""
    return reports([(cases, without)], place=place, limit_s=limit_s)[0]


def reports(
    checks: list[tuple[list[str], tuple[str, ...]]], *, place: str = "root", limit_s: float = _LIMIT_S
) -> list[dict[str, Any]]:
    """Of checks in one guest, one after the other, each of cases and of the walls that they are without; with how many
    cgroups a sweep removed after all of them, and those that it left.

    Errors: Unavailable; RuntimeError with the console's end, where a report is missing.
    """
    found = pieces()
    with tempfile.TemporaryDirectory(prefix="palestra-guest-") as directory:
        working = Path(directory)
        archive = files.Archive(working / "files")
        files.fill(archive, found.busybox, _init(checks, place, limit_s))
        archive.text("/start.py", _START)
        archive.text("/end.py", _END)
        archive.close()
        return _booted(found, working, len(checks), limit_s)


def _init(checks: list[tuple[list[str], tuple[str, ...]]], place: str, limit_s: float) -> str:
    path, python = f"{files.SOURCE}:{files.SITE}", files.python()
    commands = "\n".join(
        f"{python} /start.py {place} {shlex.join(_command(cases, without))} >/dev/ttyS1\n"
        f'echo "guest: check {number} ended with $?"'
        for number, (cases, without) in enumerate(checks)
    )
    return _INIT.format(path=path, python=python, commands=commands, limit_s=math.ceil(limit_s))


def _command(cases: list[str], without: tuple[str, ...]) -> list[str]:
    command = [files.python(), "-m", "palestra.launch.cli", "sandbox", "check", *cases]
    return [*command, "--backend", "local", "--json", *(["--without", *without] if without else [])]


def _booted(found: Pieces, working: Path, num_checks: int, limit_s: float) -> list[dict[str, Any]]:
    told, console = working / "report", working / "console"
    machine = ["-accel", "tcg,thread=single", "-cpu", "max", "-m", str(MEMORY_MB), "-smp", "1"]
    bare = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    lines = ["-serial", f"file:{console}", "-serial", f"file:{told}"]
    boot = ["-kernel", str(found.kernel), "-initrd", str(working / "files")]
    command = [*found.emulator, *machine, *bare, *lines, *boot, "-append", "console=ttyS0 quiet panic=-1"]
    said = ""
    try:
        done = subprocess.run(command, env=found.environment, timeout=limit_s, capture_output=True, text=True)
        said = done.stderr
    except subprocess.TimeoutExpired:
        said = f"the guest did not end within {limit_s:g} s"
    try:
        *found_in, end = _objects(told.read_text())
        return [{**check, **end} for check, _ in zip(found_in, range(num_checks), strict=True)]
    except (OSError, ValueError):
        heard = console.read_text(errors="replace") if console.exists() else ""
        raise RuntimeError(f"no report came from the guest. {said}\n{heard[-4000:]}") from None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """One after the other. Errors: ValueError."""
    while text := text.strip():
        found, end = json.JSONDecoder().raw_decode(text)
        yield found
        text = text[end:]


def holds(told: dict[str, Any], cases: list[str]) -> bool:
    """Every case passed, none was skipped, and version 2 counted."""
    passed = {case["name"] for case in told["cases"] if case["passed"]}
    return "cgroup_v2" in told["layers"] and told["failed"] == 0 and set(cases) <= passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, metavar="CASE", help="none: all of them")
    parser.add_argument("--without", nargs="*", default=[], metavar="WALL", help="as of `palestra sandbox check`")
    parser.add_argument("--place", choices=PLACES, default="root", help="where in the hierarchy the check runs")
    parser.add_argument("--limit-s", type=float, default=_LIMIT_S)
    wish = parser.parse_args()
    try:
        told = report(wish.cases, without=tuple(wish.without), place=wish.place, limit_s=wish.limit_s)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 3
    print(json.dumps(told, indent=2))
    return 0 if holds(told, wish.cases) else 1


if __name__ == "__main__":
    sys.exit(main())
