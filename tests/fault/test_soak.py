"""The soak in short, and what it must notice."""

import dataclasses
from pathlib import Path

import pytest

from tests.fault.counts import count
from tests.fault.soak import failures, report, soak_in

SEED = 11


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_under_fire_loses_nothing_and_a_planted_loss_is_noticed(tmp_path: Path):
    soak = soak_in(tmp_path, seed=SEED, steps=12, step_s=1.0, env_every=2, others_every=4, by_steps=True)
    code, said = soak.play(deadline_s=420)
    counts = count(soak.run.run, soak.run.witness, max_age=soak.run.config.algo.max_age)
    report(soak, counts, print)
    assert failures(soak, counts, code) == [], said
    assert soak.kills.total() >= 4

    assert failures(soak, dataclasses.replace(counts, lost=[3]), code) == ["lost: [3]"]
    assert failures(soak, dataclasses.replace(counts, trained_twice=[3]), code) == ["trained twice: [3]"]
    assert failures(soak, counts, 1) == ["the run ended with exit code 1"]
    soak.memory["leak"] = [(float(second), 100.0 + second) for second in range(100)]
    assert failures(soak, counts, 0) == ["leak grew 1.36-fold"]
    assert soak.slope_mib_per_minute("leak") == pytest.approx(60)
