"""Spans of a process, one line each."""

import json
import time
from pathlib import Path

import pytest

from palestra.core.spans import SpanLog


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_span_has_its_time_and_attributes(tmp_path: Path):
    path = tmp_path / "spans" / "trainer.jsonl"
    log = SpanLog(path, "trainer")
    before = time.time()
    with log.span("step", step=3) as attributes:
        time.sleep(0.02)
        attributes["tokens"] = 99
    (row,) = rows(path)  # written when it ends, not when the log is closed
    assert (row["process"], row["name"], row["step"], row["tokens"]) == ("trainer", "step", 3, 99)
    assert row["wall_s"] >= 0.02
    assert before - 0.01 <= row["started_at"] <= time.time() + 0.01
    log.close()


def test_a_span_that_fails_is_written(tmp_path: Path):
    log = SpanLog(tmp_path / "x.jsonl", "trainer")
    with pytest.raises(ZeroDivisionError), log.span("step"):
        raise ZeroDivisionError
    assert len(rows(tmp_path / "x.jsonl")) == 1
    log.close()
