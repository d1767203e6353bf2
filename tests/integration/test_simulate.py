"""The simulator does what the loop's own code does, given engines and a trainer of the same speed."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from palestra.core.ledger import Ledger, LedgerSelector
from palestra.launch.cli import main
from palestra.orchestrate.simulate.curves import Curves, LogNormal, PublishCurve, TrainerCurve
from palestra.orchestrate.simulate.loop import Loop, simulate
from palestra.orchestrate.simulate.measure import Measured, curves_from
from palestra.orchestrate.simulate.outcome import Outcome, outcome_of
from palestra.orchestrate.simulate.rules import rules_of
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_ledger, read_metrics
from tests.unit.orchestrate.simulate import paced
from tests.unit.orchestrate.simulate.paced import CURVE, STOP_S, PacedEngine, SameWork, config_of

PRESET = [str(Path(__file__).parents[2] / "benchmarks" / f"intellect3-{name}.toml") for name in ("report", "curves")]
CURVES = Curves(
    source="the peers' own",
    engine=CURVE,
    trainer=TrainerCurve(s_per_token=1e-9),
    publish=PublishCurve(stop_s=STOP_S),
    work=LogNormal(median_tokens=1, sigma=0, max_tokens=1),  # not used: `SameWork`
)
BEAT_S, USUAL_S = 0.02, 0.005  # that a loop which has something to do wakes later is no stall
STALL_S, TRIES = 0.1, 5  # in all of a play, whose steps may differ by a tenth of half a second


def simulated(config, *, skip: int, step_s: float) -> Outcome:
    """With the time that the trainer really slept, on this machine."""
    trainer = TrainerCurve(base_s=step_s, s_per_token=1e-9)
    loop = Loop(rules_of(config), CURVES.model_copy(update={"trainer": trainer}), seed=0)
    loop.work = SameWork(config)  # type: ignore[assignment]
    loop.run()
    return outcome_of(loop.course, skip=skip)


def slept_s(run: RunDir, *, skip: int) -> float:
    """Of the steps after the first `skip` ones, as all that is measured."""
    entries = [entry for entry in read_ledger(run) if "forward_backward" in entry.parts_s][skip + 1 :]
    return sum(entry.wall_s for entry in entries) / len(entries)


def hops_s(run: RunDir) -> float:
    """What a busy machine adds to a step: from process to process a word waits for the event loop, four times."""
    lags_ms = [row["orchestrator/loop_lag_p99_ms"] for row in read_metrics(run)]
    return 4 * sum(lags_ms) / len(lags_ms) / 1000


class ClockedEngine(PacedEngine):
    """Tells when each of its updates began, and what it really took."""

    def __init__(self, url: str, updates: list[tuple[float, float]]):
        super().__init__(url)
        self._updates = updates

    async def update(self, *words, **fields):
        began_at, began = time.time(), time.monotonic()
        await super().update(*words, **fields)
        self._updates.append((began_at, time.monotonic() - began))


class Play:
    """One run of the peers, by an event loop that books its turns, beside a heartbeat."""

    def __init__(self, config, monkeypatch: pytest.MonkeyPatch):
        self.config, self.run, self.late_s = config, RunDir(config.run_dir), 0.0
        self._updates: list[tuple[float, float]] = []
        monkeypatch.setattr(paced, "PacedEngine", lambda url: ClockedEngine(url, self._updates))
        selector = LedgerSelector(Ledger("orchestrator"))
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            self.real = runner.run(self._played())
        self.slept_s = slept_s(self.run, skip=self.real.skipped)

    async def _played(self) -> Measured:
        beating = asyncio.create_task(self._beat())
        try:
            return await paced.really(self.config)
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(BEAT_S)
            self.late_s += max(0.0, time.monotonic() - began - BEAT_S - USUAL_S)

    @property
    def stop_s(self) -> float:
        """Mean of what the updates really took that are measured."""
        ends_at = [row["time"] for row in read_metrics(self.run) if "phase" not in row]
        inside = [took_s for at, took_s in self._updates if ends_at[self.real.skipped] < at < ends_at[-1]]
        return sum(inside) / len(inside)

    def require_agreement(self) -> None:
        real, same = self.real, simulated(self.config, skip=self.real.skipped, step_s=self.slept_s)
        print(
            f"step {real.step_s:.3f} s, simulated {same.step_s:.3f}; age {real.mean_age:.2f}, simulated "
            f"{same.mean_age:.2f}; the machine stood still for {self.late_s:.2f} s"
        )
        assert 0.9 * real.step_s - hops_s(self.run) <= same.step_s <= 1.1 * real.step_s
        assert same.mean_age == pytest.approx(real.mean_age, rel=0.15, abs=0.05)
        self._require_measured_curves()

    def _require_measured_curves(self) -> None:
        """What the run's files tell is what its peers were made to do, and predicts the run itself."""
        real, found = self.real, curves_from(self.run)
        assert found.publish.stop_s == pytest.approx(self.stop_s, rel=0.3)
        assert found.engine.per_request(4) == pytest.approx(CURVE.per_request(4), rel=0.25)
        predicted = simulate(rules_of(self.config), found, skip=real.skipped)
        assert found.trainer.step_s(round(predicted.tokens_per_step), 1) == pytest.approx(self.slept_s, rel=0.1)
        assert predicted.step_s == pytest.approx(real.step_s, rel=0.2)  # a few groups, drawn again by chance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "engines"),
    [({"pace_age": 1.0}, 1), ({"pace_age": 0.0}, 1), ({"pace_age": 3.0, "groups_per_step": 2}, 2)],
    ids=["paced", "in turns", "deep, two engines"],
)
def test_step_time_and_age_agree(tmp_path, monkeypatch, algo, engines):
    """Played again where the machine stood still meanwhile: then nothing was measured."""
    for number in range(TRIES):
        play = Play(config_of(tmp_path / str(number), steps=14, engines=engines, **algo), monkeypatch)
        try:
            play.require_agreement()
            break
        except AssertionError:
            if play.late_s < STALL_S or number == TRIES - 1:
                raise


@pytest.mark.slow
def test_the_reports_run(capsys):
    """About 1,500 s a step, and more than twice as long without in-flight updates: docs/simulate.md."""
    assert main(["simulate", PRESET[0], "--curves", PRESET[1], "--steps", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["variants"]["as the recipe says"]["step_s"] == pytest.approx(1500, rel=0.1)
    assert found["in_flight_factor"] > 2
