"""Which steps of a run are measured for the simulator's curves."""

from pathlib import Path

import pytest

from palestra.core.spans import SpanLog
from palestra.orchestrate.simulate.measure import _skip
from palestra.wire.rundir import RunDir


@pytest.mark.parametrize(("first_s", "skipped"), [(20.0, 10), (305.0, 30), (5000.0, 96)])
def test_steps_are_skipped_for_the_evaluation_at_the_start_and_not_for_later_ones(tmp_path: Path, first_s, skipped):
    """A hundred steps of ten seconds: a tenth of them, or as many as the first evaluation takes, but four."""
    run = RunDir(tmp_path)
    spans = SpanLog(run.spans("orchestrator"), "orchestrator")
    for began, wall_s, version in ((0.0, first_s, 0), (400.0, 20.0, 40), (900.0, 20.0, 90)):
        spans.write("evaluate", began, wall_s, {"version": version, "set": "held-out"})
    spans.close()
    assert _skip(run, [{"time": 10.0 * (step + 1)} for step in range(100)]) == skipped
