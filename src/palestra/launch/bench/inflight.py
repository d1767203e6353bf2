"""`palestra bench inflight`: updates in flight against waiting for rollouts to end; `sync.kv` keep against recompute.

The same recipe, seeds and lengths three times, with prompts so short that the engines are the bottleneck. Waiting costs
them at each publish what they could have sampled while ever fewer rollouts ran: the bare client's wall for a step's
rollouts, less the tokens at the saturated rate.

    bound of the speed-up = max(train, generate + lost) / max(train, generate)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.config import load
from palestra.launch.bench import readings
from palestra.launch.bench.bare import Alone
from palestra.launch.bench.calibrate import SHORTEST_PROMPT
from palestra.launch.bench.loop import RECIPE, first_step_alone, outputs_directory, state_of_machine, with_prompts
from palestra.launch.bench.parts import Bench, Part
from palestra.launch.bench.readings import Reading
from palestra.launch.bench.report import say, tell_inflight

STEPS, _SKIP, _LEAVE, _ALONE_STEPS = 9, 2, 2, 3
VARIANTS = {
    "in-flight": {"wait": False, "kv": "keep"},
    "waiting": {"wait": True, "kv": "keep"},
    "recompute": {"wait": False, "kv": "recompute"},
}


@dataclass(frozen=True)
class Compared:
    """What the three runs and their parts alone say."""

    runs: dict[str, Reading]
    alone: Alone
    train_s: float

    @property
    def numbers(self) -> dict[str, Any]:
        step_s = {name: reading.window.step_s for name, reading in self.runs.items()}
        generate_s = readings.generate_alone_s(self.runs["in-flight"], self.alone)
        lost_s = readings.lost_by_draining_s(self.alone)
        bound = readings.waiting_bound(generate_s=generate_s, lost_s=lost_s, train_s=self.train_s)
        speed_up = step_s["waiting"] / step_s["in-flight"]
        return {
            "speed_up": speed_up,
            "speed_up_bound": bound,
            "speed_up_over_bound": speed_up / bound,
            "recompute_over_keep": step_s["recompute"] / step_s["in-flight"],
            "generate_alone_s": generate_s,
            "train_alone_s": self.train_s,
            "lost_by_draining_s": lost_s,
            "decode_step_s": self.alone.decode_step_s,
            "runs": {name: _of(reading) for name, reading in self.runs.items()},
        }


def _of(reading: Reading) -> dict[str, Any]:
    return {
        "step_s": reading.window.step_s,
        "reward": reading.reward,
        "mean_age": reading.mean_age,
        "stall_parts_s": reading.stall_parts_s,
        "ledger": reading.shares,
    }


def show(overrides: Sequence[str], *, outputs: Path | None, as_json: bool) -> None:
    """Errors: UserError; whatever ends a run."""
    base = load(RECIPE, list(overrides)).config
    machine = state_of_machine()
    with outputs_directory(outputs) as directory:
        tell_inflight(measure(Bench(base, directory)).numbers | {"machine": machine}, as_json=as_json)


def measure(bench: Bench) -> Compared:
    parts: dict[str, Part] = {}
    for name, sync in VARIANTS.items():
        say(f"palestra bench: {name}")
        config = with_prompts(bench, name, SHORTEST_PROMPT, sync=sync, train={"steps": STEPS})
        parts[name] = bench.loop(config, alone=[first_step_alone(config)] if name == "in-flight" else [])
    read = {name: _read(part) for name, part in parts.items()}
    replayed = bench.train_alone(parts["in-flight"], steps=_ALONE_STEPS)
    return Compared(
        runs=read,
        alone=parts["in-flight"].alone[0],
        train_s=read["in-flight"].tokens_per_step * readings.train_s_per_token(replayed.rows),
    )


def _read(part: Part) -> Reading:
    within = readings.window(part.rows, skip=_SKIP, leave=_LEAVE)
    return readings.read(part.rows, part.entries, rollouts_per_step=part.config.algo.rollouts_per_step, within=within)
