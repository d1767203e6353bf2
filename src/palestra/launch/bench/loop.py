"""`palestra bench loop`: the loop against its parts alone. What each number means: docs/bench.md.

overhead: bare client, then the same rollouts by the loop, 256 in flight        -> M4, event-loop lag
calibrate: the trainer alone on made batches                                    -> prompt lengths for the ratios
ratio-R: bare client, then the loop; its batches by the trainer alone, and the bare client again
                                                                                -> M1, M2, M3, idle shares
synchronous: bare client, then generate, train, publish, one after the other, at ratio 1; its batches by the trainer
             alone, nothing beside any of them                                  -> M5
"""

import math
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palestra.config import RunConfig, load
from palestra.core.errors import UserError
from palestra.env.load import make_environment
from palestra.launch.bench import readings
from palestra.launch.bench.bare import Alone
from palestra.launch.bench.calibrate import SHORTEST_PROMPT, made_batches, prompt_for
from palestra.launch.bench.environment import ForcedLengths
from palestra.launch.bench.lead import Pass
from palestra.launch.bench.lengths import LengthLaw
from palestra.launch.bench.parts import Bench, Part, trainer_cores
from palestra.launch.bench.readings import Reading
from palestra.launch.bench.report import say, tell
from palestra.launch.machine import this_machine

RECIPE = Path(__file__).with_name("loop.toml")
IN_FLIGHT = 256  # of the overhead
_SKIP, _LEAVE = 2, 2  # steps at the ends of a run that are not judged
_TEMPLATE_TOKENS = 4  # around a prompt


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    ratios: tuple[float, ...]
    steps: int
    sync_steps: int  # 0: M5 is not measured
    overhead_steps: int
    alone_steps: int
    calibrates: bool = True  # otherwise prompts are as long as the recipe says


FULL = Effort(ratios=(1.0, 0.5, 2.0), steps=8, sync_steps=4, overhead_steps=2, alone_steps=3)
QUICK = Effort(ratios=(1.0,), steps=6, sync_steps=0, overhead_steps=1, alone_steps=3, calibrates=False)


@dataclass(frozen=True)
class AtRatio:
    """What was measured at one ratio of generating to training."""

    reading: Reading
    alone: Alone  # the mean of before and after
    engine_drift: float  # after / before
    train_s: float
    ledger_closure: float
    cpu_by_others: float | None

    @property
    def generate_s(self) -> float:
        return readings.generate_alone_s(self.reading, self.alone)

    @property
    def numbers(self) -> dict[str, Any]:
        reading, step_s = self.reading, self.reading.window.step_s
        efficiency = readings.pipeline_efficiency(train_s=self.train_s, generate_s=self.generate_s, step_s=step_s)
        return {
            "generate_over_train": self.generate_s / self.train_s,
            "m1_pipeline_efficiency": efficiency,
            "trainer_idle": reading.trainer_idle,
            "m2_engine_utilisation": readings.engine_utilisation(reading, self.alone),
            "m3_stall_decode_steps": readings.stall_decode_steps(reading, self.alone),
            "m3_share_of_step": reading.stall_s / step_s,
            "packing_fill": reading.packing_fill,
            "wire_bytes_per_token": reading.wire_bytes_per_token,
            "ledger_closure": self.ledger_closure,
            "step_s": step_s,
            "train_alone_s": self.train_s,
            "generate_alone_s": self.generate_s,
            "engine_alone_tokens_per_s": self.alone.saturated_tokens_per_s,
            "engine_drift": self.engine_drift,
            "engine_tokens_per_s": reading.sampled_tokens_per_s,
            "decode_step_s": self.alone.decode_step_s,
            "stall_parts_s": reading.stall_parts_s,
            "mean_age": reading.mean_age,
            "reward": reading.reward,
            "loop_lag_p99_ms": reading.loop_lag_p99_ms,
            "cpu_by_others": self.cpu_by_others,
            "ledger": reading.shares,
        }


def show(overrides: Sequence[str], *, quick: bool, outputs: Path | None, as_json: bool) -> None:
    """Errors: UserError; whatever ends a run."""
    base = load(RECIPE, list(overrides)).config
    with outputs_directory(outputs) as directory:
        tell(measure(Bench(base, directory), QUICK if quick else FULL), as_json=as_json)


@contextmanager
def outputs_directory(outputs: Path | None) -> Iterator[Path]:
    if outputs is not None:
        yield outputs
        return
    with tempfile.TemporaryDirectory(prefix="palestra-bench-") as directory:
        yield Path(directory)


def measure(bench: Bench, effort: Effort) -> dict[str, Any]:
    """All numbers, ready for JSON. Those of ratio 1 stand on top."""
    machine = state_of_machine()
    cost = _overhead(bench, effort)
    prompts = _prompts(bench, effort, cost.alone[-1])
    measured = {ratio: _at_ratio(bench, effort, ratio, prompts[ratio]) for ratio in effort.ratios}
    numbers = {f"{ratio:g}": of.numbers | {"prompt_tokens": prompts[ratio]} for ratio, of in measured.items()}
    return {
        **numbers["1"],
        "m4_overhead_wall": readings.overhead(
            ours_s=readings.generate_walls_s(cost.spans), bare_s=[alone.wall_s for alone in cost.alone[:-1]]
        ),
        "p99_loop_lag_ms": max(row["orchestrator/loop_lag_p99_ms"] for row in readings.trained(cost.rows).values()),
        **_gain(bench, effort, measured[1.0], prompts[1.0]),
        "ledger_closure": max(of["ledger_closure"] for of in numbers.values()),
        "ratios": numbers,
        "machine": machine | {"load_at_end": os.getloadavg()[0]},
    }


def _overhead(bench: Bench, effort: Effort) -> Part:
    """The same rollouts by the bare client and by the loop. Nothing generates while it trains."""
    say("palestra bench: the loop's own cost")
    base, groups = bench.base, math.ceil(1.5 * IN_FLIGHT / bench.base.algo.group_size)
    config = with_prompts(
        bench,
        "overhead",
        environment_of(base).prompt_tokens,
        algo={"max_age": 0, "groups_per_step": groups},
        train={"steps": effort.overhead_steps},
        engine={"max_in_flight": IN_FLIGHT},
    )
    same = [Pass(IN_FLIGHT, step * groups, (step + 1) * groups) for step in range(effort.overhead_steps)]
    return bench.loop(config, alone=[*same, first_step_alone(base)])


def first_step_alone(config: RunConfig) -> Pass:
    """The first step's rollouts, at the loop's own concurrency, beside what stands for the trainer."""
    in_flight = config.engine.max_in_flight * config.engine.replicas
    return Pass(in_flight, 0, config.algo.groups_per_step, trainer_cores(config))


def _prompts(bench: Bench, effort: Effort, alone: Alone) -> dict[float, int]:
    """The prompt length for each ratio."""
    if not effort.calibrates:
        return dict.fromkeys(effort.ratios, environment_of(bench.base).prompt_tokens)
    say("palestra bench: the trainer alone, at two lengths of prompts")
    base, law = bench.base, law_of(bench.base)
    lengths = [SHORTEST_PROMPT, 2 * law.median]
    config = with_prompts(bench, "calibrate", max(lengths))
    tried = [lengths[1], *lengths, *lengths]  # the first one sets things up
    batches = made_batches(config, tried, law=law)
    rows = readings.trained(bench.train_made(config, batches).rows)
    prompts = {
        ratio: prompt_for(
            ratio,
            generate_s=float(batches[0].rl_weight.sum()) / alone.saturated_tokens_per_s,
            rollouts=base.algo.rollouts_per_step,
            prompts=tried[1:],
            train_s=[rows[step]["train/step_s"] for step in range(1, len(tried))],
        )
        for ratio in effort.ratios
    }
    say(f"palestra bench: prompt tokens by ratio: {prompts}")
    return prompts


def _at_ratio(bench: Bench, effort: Effort, ratio: float, prompt_tokens: int) -> AtRatio:
    say(f"palestra bench: ratio {ratio:g}")
    config = with_prompts(bench, f"ratio-{ratio:g}", prompt_tokens, train={"steps": effort.steps})
    part = bench.loop(config, alone=[first_step_alone(config)])
    within = readings.window(part.rows, skip=_SKIP, leave=_LEAVE)
    reading = readings.read(part.rows, part.entries, rollouts_per_step=config.algo.rollouts_per_step, within=within)
    replayed = bench.train_alone(part, steps=effort.alone_steps)
    after = bench.engines_alone(part, first_step_alone(config))
    return AtRatio(
        reading=reading,
        alone=part.alone[0].with_another(after),
        engine_drift=after.saturated_tokens_per_s / part.alone[0].saturated_tokens_per_s,
        train_s=reading.tokens_per_step * readings.train_s_per_token(replayed.rows),
        ledger_closure=readings.closure(part.entries),
        cpu_by_others=part.cpu_by_others,
    )


def _gain(bench: Bench, effort: Effort, of: AtRatio, prompt_tokens: int) -> dict[str, Any]:
    """M5 and what it is made of."""
    if not effort.sync_steps:
        return {"m5_async_gain_over_bound": None}
    say("palestra bench: generate, train, publish, one after the other")
    config = with_prompts(bench, "synchronous", prompt_tokens, algo={"max_age": 0}, train={"steps": effort.sync_steps})
    part = bench.loop(config, alone=[replace(first_step_alone(config), cores=0)])
    within = readings.window(part.rows, skip=1, leave=0)
    gain = readings.async_gain(sync_step_s=within.step_s, async_step_s=of.reading.window.step_s)
    quiet = bench.train_alone(part, steps=effort.alone_steps, beside=False)
    quiet_s = part.alone[0].wall_s + of.reading.tokens_per_step * readings.train_s_per_token(quiet.rows)
    slower_s = max(of.generate_s, of.train_s)
    bound = readings.async_bound(in_turns_s=quiet_s, slower_s=slower_s)
    return {
        "m5_async_gain_over_bound": gain / bound,
        "async_gain": gain,
        "async_bound": bound,
        "async_bound_under_load": readings.async_bound(in_turns_s=of.alone.wall_s + of.train_s, slower_s=slower_s),
        "sync_step_s": within.step_s,
        "sync_reward": readings.trained(part.rows)[within.last]["reward/trained"],
    }


def with_prompts(bench: Bench, name: str, prompt_tokens: int, **sections: dict[str, Any]) -> RunConfig:
    """Room for the prompt and the longest reply, in the engine and in a pack."""
    reply_tokens = law_of(bench.base).longest
    longest = prompt_tokens + reply_tokens + _TEMPLATE_TOKENS
    room: dict[str, dict[str, Any]] = {
        "sampling": {"max_tokens": reply_tokens},
        "engine": {"max_model_len": longest},
        "train": {"max_pack_tokens": max(bench.base.train.max_pack_tokens, longest)},
    }
    merged = {section: room.get(section, {}) | sections.get(section, {}) for section in {**room, **sections}}
    return bench.variant(name, args={"prompt_tokens": prompt_tokens}, **merged)


def law_of(config: RunConfig) -> LengthLaw:
    """Errors: as `environment_of`."""
    return environment_of(config).law


def environment_of(config: RunConfig) -> ForcedLengths:
    """Errors: UserError, for an environment without a law of lengths."""
    source = config.env.mix[0]
    environment = make_environment(source.id, split=source.split, seed=0, args=source.args)
    if not isinstance(environment, ForcedLengths):
        raise UserError(f"env.mix[0].id={source.id} has no law of lengths; change the args of env.mix[0] alone")
    return environment


def state_of_machine() -> dict[str, Any]:
    machine = this_machine()
    return {
        "cpus": machine.cpus,
        "processor": _processor(),
        "memory_gib": round(machine.memory_bytes / 2**30, 1),
        "gpus": [gpu.name for gpu in machine.gpus],
        "load_at_start": os.getloadavg()[0],
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
