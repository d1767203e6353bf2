"""What the benches run and how their numbers are put together, on parts that are made by hand instead of run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from palestra.config import RunConfig, load
from palestra.core.errors import UserError
from palestra.core.ledger import LedgerEntry
from palestra.launch.bench import inflight, loop
from palestra.launch.bench.bare import Alone
from palestra.launch.bench.lead import Pass
from palestra.launch.bench.parts import Bench
from palestra.launch.bench.report import tell
from palestra.launch.start import write_config
from palestra.wire.rundir import RunDir
from palestra.wire.status import State, now_running, write_status


@dataclass
class MadePart:
    config: RunConfig
    rows: list[dict[str, Any]]
    entries: list[LedgerEntry] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    alone: list[Alone] = field(default_factory=list)
    cpu_by_others: float = 0.02

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.run_dir)


@dataclass(frozen=True)
class MadeBench(Bench):
    """An engine samples 1000 tokens a second, but 900 before and 1100 after a loop of a ratio, as machines drift; a
    trainer takes 1 ms per token; the loop takes 1.25 times the slower one, and the synchronous one both in turns.
    Generating has a tail of 2 s, and the loop's own cost is a tenth."""

    configs: list[RunConfig] = field(default_factory=list)

    def loop(self, config: RunConfig, *, alone: Sequence[Pass] = ()) -> Any:
        self.configs.append(config)
        algo, prompt = config.algo, config.env.mix[0].args["prompt_tokens"]
        sampled, tokens = 100 * algo.rollouts_per_step, (100 + prompt) * algo.rollouts_per_step
        generate_s, train_s = sampled / 1000, tokens / 1000
        step_s = generate_s + 2 + train_s if algo.max_age == 0 else 1.25 * max(generate_s, train_s)
        rows, spans = [], []
        for step in range(config.train.steps):
            rows.append(_row(step, step_s, sampled=100.0, rollouts=algo.rollouts_per_step, tokens=tokens))
            spans += [
                {"name": "publish", "version": step, "started_at": 100.0 * step, "wall_s": 1.0},
                {"name": "batch", "step": step, "started_at": 100.0 * step + 1 + 1.1 * (generate_s + 2), "wall_s": 1.0},
            ]
        return MadePart(config, rows, spans=spans, alone=[_alone(config, part, DRIFT[0]) for part in alone])

    def engines_alone(self, part: Any, wanted: Pass) -> Alone:
        return _alone(part.config, wanted, DRIFT[1])

    def train_alone(self, part: Any, *, steps: int, beside: bool = True) -> Any:
        """With nothing beside it, it takes three quarters of the time."""
        rows = [row | {"train/step_s": row["train/step_s"] * (1.0 if beside else 0.75)} for row in part.rows[:steps]]
        return MadePart(part.config, rows)

    def train_made(self, config: RunConfig, batches) -> Any:
        return MadePart(config, [_row(b.step, 1.0, tokens=b.num_tokens) for b in batches])


def _row(step: int, step_s: float, *, tokens: float, sampled: float = 0.0, rollouts: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "time": step_s * (step + 1),
        "rollout/sampled_tokens": sampled,
        "rollout/trained_tokens": sampled,
        "rollout/finished": rollouts,
        "train/tokens": tokens,
        "train/step_s": tokens / 1000,
        "reward/trained": 0.5,
        "age/mean": 1.0,
        "packing/fill": 0.98,
        "wire/bytes_per_token": 9.0,
        "orchestrator/loop_lag_p99_ms": 7.0,
        "publish/stopped_s": 0.1,
        "publish/pause_s": 0.04,
        "publish/load_s": 0.05,
        "publish/resume_s": 0.01,
    }


DRIFT = (900.0, 1100.0)


def _alone(config: RunConfig, part: Pass, speed: float) -> Alone:
    speed = speed if config.log.name.startswith("ratio") else 1000.0
    replies = (part.end - part.first) * config.algo.group_size
    return Alone(
        in_flight=part.in_flight,
        num_replies=replies,
        sampled_tokens=100 * replies,
        wall_s=100 * replies / 1000 + 2,
        saturated_tokens_per_s=speed,
        decode_step_s=0.05,
    )


@pytest.fixture
def bench(tmp_path: Path) -> MadeBench:
    return MadeBench(load(loop.RECIPE).config, tmp_path)


def test_all_numbers_of_a_full_bench(bench: MadeBench, capsys: pytest.CaptureFixture):
    numbers = loop.measure(bench, loop.FULL)
    assert list(numbers["ratios"]) == ["1", "0.5", "2"]
    for ratio, of in numbers["ratios"].items():
        slower = max(1.0, 1 / of["generate_over_train"])
        assert of["m1_pipeline_efficiency"] == pytest.approx(1 / 1.25), ratio
        assert of["m2_engine_utilisation"] == pytest.approx(1 / 1.25 / slower), ratio
        assert of["m3_stall_decode_steps"] == pytest.approx(2.0)
        assert of["engine_drift"] == pytest.approx(1100 / 900)
    assert numbers["m4_overhead_wall"] == pytest.approx(0.1)
    assert numbers["p99_loop_lag_ms"] == 7.0
    generate_s, train_s = numbers["generate_alone_s"], numbers["train_alone_s"]
    in_turns_s, slower_s = generate_s + 2 + train_s, max(generate_s, train_s)
    assert numbers["async_bound_under_load"] == pytest.approx(in_turns_s / slower_s)
    assert numbers["async_bound"] == pytest.approx((in_turns_s - 0.25 * train_s) / slower_s)
    assert numbers["m5_async_gain_over_bound"] == pytest.approx(1 / 1.25 * in_turns_s / (in_turns_s - 0.25 * train_s))
    tell(numbers, as_json=True)
    assert json.loads(capsys.readouterr().out)["ratios"]["2"]["packing_fill"] == pytest.approx(0.98)


def test_longer_prompts_make_training_take_longer(bench: MadeBench):
    """A law's mean of 78 tokens at 1000 a second and 1 ms: 82 tokens of prompt and reply for ratio 1, 156 for 0.5."""
    numbers = loop.measure(bench, loop.FULL)["ratios"]
    lengths = {ratio: of["prompt_tokens"] for ratio, of in numbers.items()}
    mean = loop.law_of(bench.base).mean
    assert lengths == {"1": loop.SHORTEST_PROMPT, "0.5": pytest.approx(mean, abs=4), "2": loop.SHORTEST_PROMPT}


def test_variants_differ_in_what_they_must_alone(bench: MadeBench):
    loop.measure(bench, loop.FULL)
    by_name = {config.log.name: config for config in bench.configs}
    assert list(by_name) == ["overhead", "ratio-1", "ratio-0.5", "ratio-2", "synchronous"]
    one, synchronous = by_name["ratio-1"], by_name["synchronous"]
    same = {"algo": {"max_age": 8}, "train": {"steps": loop.FULL.steps}, "log": {"name": "ratio-1"}}
    assert Bench(synchronous, bench.outputs).variant("ratio-1", **{k: same[k] for k in ("algo", "train")}) == one
    assert synchronous.algo.max_age == 0
    assert by_name["overhead"].engine.max_in_flight == 256
    assert by_name["overhead"].algo.rollouts_per_step == 384


def test_a_quick_bench_measures_one_ratio(bench: MadeBench):
    numbers = loop.measure(bench, loop.QUICK)
    assert list(numbers["ratios"]) == ["1"]
    assert numbers["m5_async_gain_over_bound"] is None
    assert numbers["ratios"]["1"]["prompt_tokens"] == 40


def test_replies_of_another_environment_have_no_law(bench: MadeBench):
    other = load(loop.RECIPE, ['env.mix=[{id="reverse-text"}]']).config
    with pytest.raises(UserError, match="no law of lengths"):
        loop.measure(MadeBench(other, bench.outputs), loop.QUICK)


def test_in_flight_against_waiting(bench: MadeBench, capsys: pytest.CaptureFixture):
    """All three runs take the same time here: no speed-up, where draining would cost 2 s of 15.6."""
    compared = inflight.measure(bench).numbers
    assert [config.sync.wait for config in bench.configs] == [False, True, False]
    assert [config.sync.kv for config in bench.configs] == ["keep", "keep", "recompute"]
    assert compared["lost_by_draining_s"] == pytest.approx(2.0)
    assert (compared["speed_up"], compared["recompute_over_keep"]) == (pytest.approx(1.0), pytest.approx(1.0))
    generate_s, train_s = compared["generate_alone_s"], compared["train_alone_s"]
    assert compared["speed_up_bound"] == pytest.approx(max(train_s, generate_s + 2) / max(train_s, generate_s))
    inflight.tell_inflight(compared, as_json=False)
    assert "waiting" in capsys.readouterr().out


def test_a_finished_part_is_read_again_and_one_with_other_values_refused(bench: MadeBench):
    config = bench.variant("ratio-1")
    write_config(RunDir(config.run_dir), config)
    finished = now_running(1, 0.0)
    write_status(RunDir(config.run_dir), msgspec.structs.replace(finished, state=State.FINISHED))
    real = Bench(bench.base, bench.outputs)
    assert real.loop(config).run.path == bench.outputs / "ratio-1"  # nothing is started
    with pytest.raises(UserError, match="other values"):
        real.loop(bench.variant("ratio-1", train={"steps": 99}))
