"""Curves, marks and the time ledger: the numbers of the files, and no second lost or counted twice."""

from pathlib import Path

import pytest

from palestra.core.ledger import LedgerEntry
from palestra.hub.curves import bands, curve, latest, marks
from palestra.hub.jsonlines import Growing, last_rows

ROWS = [
    {"step": 0, "time": 10.0, "phase": "warmup", "reward/trained": 9.0},
    {"step": 0, "time": 20.0, "reward/trained": 0.25},
    {"step": 1, "time": 30.0, "reward/trained": 0.5},
    {"step": 1, "time": 50.0, "reward/trained": 0.75},
    {"step": 2, "time": 60.0, "phase": "eval-end", "eval/greedy/reward": 1.0},
    {"step": 1, "time": 55.0, "phase": "warning", "rule": "r", "text": "look"},
]


def test_a_step_that_was_trained_again_counts_once():
    found = curve(ROWS, "reward/trained", 100)
    assert (found.steps, found.values, found.times) == ([0, 1], [0.25, 0.75], [20.0, 50.0])
    assert latest(ROWS)["reward/trained"] == 0.75


def test_evaluations_are_at_their_version():
    found = curve(ROWS, "eval/greedy/reward", 100)
    assert (found.steps, found.values) == ([2], [1.0])


def test_thinned_curves_keep_values_and_ends():
    rows = [{"step": step, "time": float(step), "a/b": step**2} for step in range(1000)]
    found = curve(rows, "a/b", 50)
    assert len(found.steps) == 50
    assert (found.steps[0], found.steps[-1]) == (0, 999)
    assert found.values == [step**2 for step in found.steps]


def test_marks_stand_where_their_time_is():
    spans = [{"name": "publish", "started_at": 24.0, "wall_s": 1.0, "version": 1}, {"name": "batch"}]
    restarts = [{"process": "env-0", "why": "killed", "ended_at": 35.0}]
    found = marks([row for row in ROWS if row["time"] != 50.0], spans, restarts)
    assert [(mark.kind, mark.step) for mark in found] == [("publish", 0.5), ("restart", 1.0), ("warning", 1.0)]


def test_every_second_of_a_ledger_is_in_one_slice():
    entries = [
        LedgerEntry(process="trainer", started_at=100.0, wall_s=7.0, parts_s={"work": 5.0, "idle": 2.0}),
        LedgerEntry(process="trainer", started_at=107.0, wall_s=3.5, parts_s={"work": 3.5}),
        LedgerEntry(process="env-0", started_at=101.0, wall_s=20.0, parts_s={"idle": 20.0}),
    ]
    found = {band.process: band for band in bands(entries, 37)}
    assert list(found) == ["trainer", "env-0"]
    for band in found.values():
        width = band.times[1] - band.times[0]
        for cause, shares in band.shares.items():
            assert sum(shares) * width == pytest.approx(band.seconds[cause], abs=1e-3)
    assert found["trainer"].seconds == {"work": 8.5, "idle": 2.0}
    assert all(sum(column) <= 1.0001 for column in zip(*found["trainer"].shares.values(), strict=True))


def test_a_growing_file_is_read_once(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    growing = Growing(path)
    assert not growing.update()
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert growing.update()
    assert not growing.update()
    with path.open("ab") as file:
        file.write(b'}\nno json\n[1]\n{"a": 3}\n')
    growing.update()
    assert growing.rows == [{"a": 1}, {"a": 2}, {"a": 3}]
    path.write_bytes(b'{"a": 4}\n')
    growing.update()
    assert growing.rows == [{"a": 4}]


def test_the_end_of_a_long_file_is_enough(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"step": %d, "filler": "%s"}\n' % (i, b"x" * 900) for i in range(1000)) + b'{"st')
    found = last_rows(path)
    assert found[-1]["step"] == 999
    assert len(found) < 400
