"""Unix time that only goes forward: the machine's clock may be set while a process runs."""

import time

import pytest

from palestra.core.clock import unix_now
from palestra.core.ledger import Ledger


def test_it_is_unix_time():
    assert unix_now() == pytest.approx(time.time(), abs=1.0)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_jump_of_the_machines_clock_is_not_seen(hours: int, monkeypatch: pytest.MonkeyPatch):
    ledger, before, real = Ledger("trainer", "work"), unix_now(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    assert abs(time.time() - before) > 3000  # the jump is there
    assert 0 <= unix_now() - before < 60
    entry = ledger.close()
    assert 0 < entry.wall_s < 60
    assert sum(entry.parts_s.values()) == pytest.approx(entry.wall_s, abs=0.1)
