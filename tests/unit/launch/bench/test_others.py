"""What others use of the processors, from numbers made by hand and from a process that is not ours to count."""

import subprocess
import sys
import time

import pytest

from palestra.launch.bench.others import Used, busy_s

STAT = """cpu  9 9 9 9 9 9 9 9 9 9
cpu0 1000 200 300 9000 500 10 20 30 400 50
cpu1 1 0 0 7 7 0 0 0 0 0
cpu10 1 1 1 1 1 1 1 1 1 1
intr 1
"""


def test_busy_is_all_but_idle_and_waiting():
    """1000 + 200 + 300 + 10 + 20 + 30 ticks; guests are part of the first. Of those processors that may be used."""
    assert busy_s(STAT, 100, {0}) == pytest.approx(15.6)
    assert busy_s(STAT, 100, {0, 1}) == pytest.approx(15.61)
    assert busy_s(STAT, 100, {10}) == pytest.approx(0.06)


def test_others_are_all_but_ours():
    """Of 2 x 10 s of processors 12 were used, 9 of them by us."""
    before, after = Used(all_s=100.0, ours_s=5.0, at=0.0), Used(all_s=112.0, ours_s=14.0, at=10.0)
    assert after.by_others(before, 2) == pytest.approx(3 / 20)
    assert Used(all_s=112.0, ours_s=18.0, at=10.0).by_others(before, 2) == 0.0  # clocks differ a little


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat")
def test_a_child_that_ended_is_ours():
    before = Used.now()
    burn = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    after = Used.now()
    assert before is not None
    assert after is not None
    assert after.ours_s - before.ours_s >= 0.5
    assert after.all_s - before.all_s >= 0.4
    assert after.at <= time.monotonic()
