"""The time ledger: every second is booked once, so the parts sum to the wall clock."""

import asyncio
import selectors
import time
from itertools import pairwise

import pytest
from tests.unit.core.clocks import LedgerClock

from palestra.core.ledger import Ledger, LedgerEntry, LedgerSelector, total


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> LedgerClock:
    return LedgerClock(monkeypatch)


def test_nested_causes_are_not_booked_twice(clock: LedgerClock):
    ledger = Ledger("trainer", "work")
    with ledger.spend("step"):
        clock.burn(0.02)
        with ledger.spend("publish"):
            clock.burn(0.05)
        clock.burn(0.02)
    entry = ledger.close()
    assert entry.parts_s == pytest.approx({"work": 0.0, "publish": 0.05, "step": 0.04})
    assert entry.wall_s == pytest.approx(0.09)
    assert entry.closure < 1e-9


def test_an_error_inside_a_cause_ends_the_cause():
    ledger = Ledger("trainer", "work")
    with pytest.raises(ZeroDivisionError), ledger.spend("step"):
        raise ZeroDivisionError
    assert ledger.cause == "work"


def test_time_before_the_ledger_existed_is_booked(clock: LedgerClock):
    ledger = Ledger("trainer", since=clock.unix() - 5.0)
    clock.burn(0.25)
    entry = ledger.close()
    assert entry.parts_s == pytest.approx({"start": 5.25})
    assert entry.wall_s == pytest.approx(5.25)


def test_entries_follow_each_other_without_a_gap():
    ledger = Ledger("trainer", "work")
    entries = []
    for _ in range(5):
        time.sleep(0.01)
        entries.append(ledger.close())
    for one, following in pairwise(entries):
        assert following.started_at == pytest.approx(one.started_at + one.wall_s, abs=1e-6)
    assert all(set(entry.parts_s) == {"work"} for entry in entries)


def test_a_process_that_stands_still_between_its_two_clocks_leaves_no_hole(clock: LedgerClock, monkeypatch):
    ledger, stalls_s = Ledger("trainer", "work"), iter([0.02, 0.03])

    def unix() -> float:
        clock.burn(next(stalls_s, 0.0))
        return clock.unix()

    monkeypatch.setattr("palestra.core.ledger.unix_now", unix)
    clock.burn(0.1)
    entry = ledger.close()
    assert entry.parts_s == pytest.approx({"work": 0.15})
    assert entry.closure < 1e-9


def test_a_second_booked_nowhere_opens_the_closure():
    """The negative control of every closure test: the measure sees a hole."""
    assert LedgerEntry(process="x", started_at=0, wall_s=10.0, parts_s={"work": 9.0}).closure == pytest.approx(0.1)
    assert LedgerEntry(process="x", started_at=0, wall_s=10.0, parts_s={"work": 11.0}).closure == pytest.approx(0.1)


def test_the_total_of_entries_is_their_sum():
    entries = [
        LedgerEntry(process="trainer", started_at=10.0, wall_s=3.0, parts_s={"a": 1.0, "b": 2.0}),
        LedgerEntry(process="trainer", started_at=13.0, wall_s=2.0, parts_s={"b": 0.5, "c": 1.5}),
    ]
    whole = total(entries)
    assert (whole.started_at, whole.wall_s, whole.closure) == (10.0, 5.0, 0.0)
    assert whole.parts_s == {"a": 1.0, "b": 2.5, "c": 1.5}


def run_loop(ledger: Ledger, selector: LedgerSelector, main, clock: LedgerClock | None = None) -> None:
    def make() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(selector)
        if clock is not None:
            loop.time = clock.time  # type: ignore[method-assign]
        return loop

    with asyncio.Runner(loop_factory=make) as runner:
        ledger.switch("work")
        runner.run(main())


def sleep_by(clock: LedgerClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that waits moves the clock."""
    select = selectors.DefaultSelector.select

    def moved(self, timeout: float | None = None):
        clock.burn(max(timeout or 0.0, 0.0))
        return select(self, timeout and 0)

    monkeypatch.setattr(selectors.DefaultSelector, "select", moved)


def test_an_event_loop_books_its_sleep_as_idle_and_the_rest_as_work(clock: LedgerClock, monkeypatch):
    ledger = Ledger("orchestrator")
    selector = LedgerSelector(ledger)
    sleep_by(clock, monkeypatch)

    async def main() -> None:
        await asyncio.sleep(0.1)
        clock.burn(0.05)
        with ledger.spend("batch"):
            clock.burn(0.07)
        await asyncio.gather(*(asyncio.sleep(0.05) for _ in range(10)))

    run_loop(ledger, selector, main, clock)
    entry = ledger.close()
    assert entry.closure < 1e-9
    assert entry.parts_s == pytest.approx({"start": 0.0, "idle": 0.15, "work": 0.05, "batch": 0.07}, abs=1e-6)


def test_the_lag_of_a_loop_is_its_longest_turn(clock: LedgerClock):
    selector = LedgerSelector(Ledger("orchestrator"))

    async def main() -> None:
        await asyncio.sleep(0)
        selector.take_lag()
        clock.burn(0.08)
        await asyncio.sleep(0)

    run_loop(selector.ledger, selector, main)
    assert max(selector.take_lag()) == pytest.approx(0.08)
    assert selector.take_lag() == []


def test_a_loop_whose_lag_nobody_asks_for_does_not_grow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("palestra.core.ledger._MAX_TURNS", 100)
    selector = LedgerSelector(Ledger("supervisor"))

    async def main() -> None:
        for _ in range(500):
            await asyncio.sleep(0)

    run_loop(selector.ledger, selector, main)
    assert len(selector.take_lag()) == 100
