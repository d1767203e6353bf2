"""The simulator does what the loop's own code does, given engines and a trainer of the same speed."""

import json
from pathlib import Path

import pytest

from palestra.launch.cli import main
from palestra.orchestrate.simulate.curves import Curves, LogNormal, PublishCurve, TrainerCurve
from palestra.orchestrate.simulate.loop import Loop, simulate
from palestra.orchestrate.simulate.measure import Measured, curves_from
from palestra.orchestrate.simulate.outcome import Outcome, outcome_of
from palestra.orchestrate.simulate.rules import rules_of
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_ledger, read_metrics
from tests.unit.orchestrate.simulate.paced import CURVE, STOP_S, SameWork, config_of, really

PRESET = [str(Path(__file__).parents[2] / "benchmarks" / f"intellect3-{name}.toml") for name in ("report", "curves")]
CURVES = Curves(
    source="the peers' own",
    engine=CURVE,
    trainer=TrainerCurve(s_per_token=1e-9),
    publish=PublishCurve(stop_s=STOP_S),
    work=LogNormal(median_tokens=1, sigma=0, max_tokens=1),  # not used: `SameWork`
)


def simulated(config, *, skip: int, step_s: float) -> Outcome:
    """With the time that the trainer really slept, on this machine."""
    trainer = TrainerCurve(base_s=step_s, s_per_token=1e-9)
    loop = Loop(rules_of(config), CURVES.model_copy(update={"trainer": trainer}), seed=0)
    loop.work = SameWork(config)  # type: ignore[assignment]
    loop.run()
    return outcome_of(loop.course, skip=skip)


def slept_s(run: RunDir) -> float:
    entries = [entry for entry in read_ledger(run) if "forward_backward" in entry.parts_s]
    return sum(entry.wall_s for entry in entries) / len(entries)


def hops_s(run: RunDir) -> float:
    """What a busy machine adds to a step: from process to process a word waits for the event loop, four times."""
    lags_ms = [row["orchestrator/loop_lag_p99_ms"] for row in read_metrics(run)]
    return 4 * sum(lags_ms) / len(lags_ms) / 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "engines"),
    [({"pace_age": 1.0}, 1), ({"pace_age": 0.0}, 1), ({"pace_age": 3.0, "groups_per_step": 2}, 2)],
    ids=["paced", "in turns", "deep, two engines"],
)
async def test_step_time_and_age_agree(tmp_path, algo, engines):
    config = config_of(tmp_path, steps=14, engines=engines, **algo)
    real = await really(config)
    run = RunDir(config.run_dir)
    same = simulated(config, skip=real.skipped, step_s=slept_s(run))
    print(
        f"step {real.step_s:.3f} s, simulated {same.step_s:.3f}; age {real.mean_age:.2f}, simulated {same.mean_age:.2f}"
    )
    assert same.step_s == pytest.approx(real.step_s, abs=0.1 * real.step_s + hops_s(run))
    assert same.mean_age == pytest.approx(real.mean_age, rel=0.15, abs=0.05)
    _measured_curves_agree(run, config, real)


def _measured_curves_agree(run: RunDir, config, real: Measured) -> None:
    """What the run's files tell is what its peers were made to do, and predicts the run itself."""
    found = curves_from(run)
    assert found.publish.stop_s == pytest.approx(STOP_S, rel=0.3)
    assert found.engine.per_request(4) == pytest.approx(CURVE.per_request(4), rel=0.25)
    predicted = simulate(rules_of(config), found, skip=real.skipped)
    assert found.trainer.step_s(round(predicted.tokens_per_step), 1) == pytest.approx(slept_s(run), rel=0.1)
    assert predicted.step_s == pytest.approx(real.step_s, rel=0.2)  # a few groups, drawn again by chance


@pytest.mark.slow
def test_the_reports_run(capsys):
    """About 1,500 s a step, and more than twice as long without in-flight updates: docs/simulate.md."""
    assert main(["simulate", PRESET[0], "--curves", PRESET[1], "--steps", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["variants"]["as the recipe says"]["step_s"] == pytest.approx(1500, rel=0.1)
    assert found["in_flight_factor"] > 2
