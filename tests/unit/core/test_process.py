"""What every process does at its start."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
child.wait()
"""
CHILD = """
import os, time
from palestra.core.process import die_with_parent
die_with_parent(os.getppid())
print("ready", flush=True)
time.sleep(600)
"""


def test_a_process_dies_with_its_parent_however_that_dies():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, word = parent.stdout.readline().split()
    assert word == "ready"
    assert is_alive(int(pid))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while is_alive(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_whose_parent_is_gone_does_not_start():
    script = "from palestra.core.process import die_with_parent; die_with_parent(1 << 22); print('started')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "is gone; not starting" in ended.stderr
    assert ended.stdout == ""


def test_the_start_of_a_process_is_before_its_imports():
    script = "import time; time.sleep(0.3); from palestra.core.process import started_at; print(started_at())"
    before = time.time()
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert before - 0.1 < float(said) < time.time() - 0.25


@pytest.mark.parametrize(("first", "is_seldom"), [("collect_garbage_seldom()", True), ("pass", False)])
def test_a_process_whose_objects_become_many_does_not_look_through_all_of_them_again_and_again(
    first: str, is_seldom: bool
):
    code = (
        f"import gc; from palestra.core.process import collect_garbage_seldom; {first}\n"
        "before = gc.get_stats()[2]['collections']\n"
        "kept = [[] for _ in range(300_000)]\n"
        "print(gc.get_stats()[2]['collections'] - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (int(done.stdout) == 0) == is_seldom
