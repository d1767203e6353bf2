"""`palestra bench env`, small: real evaluations with the engine whose replies are made up."""

import pytest

from palestra.config import load
from palestra.launch.bench import env


@pytest.mark.slow
def test_the_numbers_of_small_evaluations(tmp_path, monkeypatch):
    for name, value in {
        "IN_FLIGHT": 50,
        "FEWER": 50,
        "MORE": 1000,
        "BURNING": 64,
        "CROWD": 300,
        "CROWD_S": 10.0,
    }.items():
        monkeypatch.setattr(env, name, value)
    numbers = env._measure(load(env.RECIPE).config, tmp_path)
    assert 0 < numbers["bare_cpu_ms_per_request"] < numbers["cpu_ms_per_rollout"] < 50
    assert numbers["ratio_to_bare_client"] > 1
    assert 0 < numbers["p99_loop_lag_ms"] < 1000 > numbers["crowd_p99_loop_lag_ms"] > 0
    assert numbers["crowd_in_flight"] == 300
    assert numbers["rollouts_per_s"] > 10
    assert 0 < numbers["wall_s_32_single_turn"] < 5


def test_the_most_in_flight_is_counted():
    class Known(env.Evaluated):
        def _spans(self):
            return [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75), (5.0, 6.0)]

    known = Known(run=None, cpu_s=0.0)  # type: ignore[arg-type]
    assert (known.peak, known.wall_s) == (3, 6.0)
