"""What a bench says: each number beside its aim, where the time went, and JSON for machines."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from palestra.launch.memory import GIB


@dataclass(frozen=True)
class Aim:
    """What a number should be. `ratios` are those at which it is judged: where its side is the bottleneck."""

    text: str
    is_met: Callable[[float], bool]
    ratios: tuple[str, ...] = ("0.5", "1", "2")


def at_least(bound: float, *ratios: str) -> Aim:
    return Aim(f">= {bound:g}", lambda value: value >= bound, ratios or ("0.5", "1", "2"))


def at_most(bound: float, *ratios: str) -> Aim:
    return Aim(f"<= {bound:g}", lambda value: value <= bound, ratios or ("0.5", "1", "2"))


AIMS = {
    "m1_pipeline_efficiency": at_least(0.95, "1"),
    "trainer_idle": at_most(0.04, "0.5"),
    "m2_engine_utilisation": at_least(0.93, "2"),
    "m4_overhead_wall": at_most(0.05),
    "p99_loop_lag_ms": at_most(10),
    "m5_async_gain_over_bound": at_least(0.90),
    "speed_up_over_bound": at_least(0.90),
    "packing_fill": at_least(0.97),
    "ledger_closure": at_most(0.01),
    "cpu_by_others": at_most(0.05),
    "cpu_ms_per_rollout": at_most(2),
    "wall_s_32_single_turn": at_most(0.25),
    "crowd_in_flight": at_least(10_000),
    "crowd_p99_loop_lag_ms": at_most(10),
    "first_byte_x": at_most(0.15),
    "full_result_x": at_most(0.5),
    "warm_true_x": at_most(0.15),
    "throughput_x": at_least(1.5),
    "http_throughput_x": at_least(1.0),
    "preloaded_x": at_least(8),
    "idle_mb_each": at_most(3),
    "idle_create_ms_each": at_most(10),
    "queue_failures": at_most(0),
    "queue_p99_over_p50": at_most(10),
    "throughput_over_transformers": at_least(1.0),
    "memory_over_transformers": at_most(1.0),
}
_ORDER = (
    "generate_over_train",
    "m1_pipeline_efficiency",
    "trainer_idle",
    "m2_engine_utilisation",
    "m3_stall_decode_steps",
    "m3_share_of_step",
    "packing_fill",
    "wire_bytes_per_token",
    "ledger_closure",
    "mean_age",
    "step_s",
    "engine_drift",
    "cpu_by_others",
)
_OF_ALL = ("m4_overhead_wall", "p99_loop_lag_ms", "m5_async_gain_over_bound")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tell(numbers: dict[str, Any], *, as_json: bool) -> None:
    """JSON, or tables, on stdout; with JSON the tables go to stderr."""
    _print(tables(numbers), numbers, as_json=as_json)


def _print(shown: Sequence[Table], numbers: dict[str, Any], *, as_json: bool) -> None:
    console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False, soft_wrap=True)
    for table in shown:
        console.print(table, "")
    if as_json:
        json.dump(numbers, sys.stdout, indent=2)
        print()


def tell_inflight(numbers: dict[str, Any], *, as_json: bool) -> None:
    """As `tell`, of updates in flight."""
    table = Table("number", "value", "aim", "", box=None, pad_edge=False)
    for key in ("speed_up", "speed_up_bound", "speed_up_over_bound", "recompute_over_keep", "lost_by_draining_s"):
        judged = verdict(key, numbers[key], "1")
        table.add_row(key, f"{numbers[key]:.3g}", AIMS[key].text if judged else "", judged)
    runs = Table("run", "seconds a step", "reward", "mean age", "stands still, ms", box=None, pad_edge=False)
    for name, of in numbers["runs"].items():
        stall_ms = 1000 * sum(of["stall_parts_s"].values())
        runs.add_row(name, f"{of['step_s']:.2f}", f"{of['reward']:.3f}", f"{of['mean_age']:.2f}", f"{stall_ms:.0f}")
    _print([table, runs], numbers, as_json=as_json)


def tell_numbers(numbers: dict[str, Any], *, as_json: bool) -> None:
    """As `tell`, of numbers that are one row each."""
    table = Table("number", "value", "aim", "", box=None, pad_edge=False)
    for key, value in numbers.items():
        if key != "machine":
            judged = verdict(key, value, "1")
            table.add_row(key, _text(key, value), AIMS[key].text if judged else "", judged)
    _print([table], numbers, as_json=as_json)


def _text(key: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value / GIB:.3g} GiB" if key.endswith("_bytes") else f"{value:.3g}"


def tables(numbers: dict[str, Any]) -> list[Table]:
    return [_numbers_table(numbers), _stall_table(numbers), _ledger_table(numbers)]


def verdict(key: str, value: float | None, ratio: str) -> str:
    """Met, missed, or "" where the number has no aim there."""
    aim = AIMS.get(key)
    if aim is None or not isinstance(value, float | int) or ratio not in aim.ratios:
        return ""
    return "met" if aim.is_met(value) else "missed"


def _numbers_table(numbers: dict[str, Any]) -> Table:
    table = Table("number", "ratio", "value", "aim", "", box=None, pad_edge=False)
    for key in _ORDER:
        for ratio, of in numbers["ratios"].items():
            _add(table, key, ratio, of.get(key))
    for key in _OF_ALL:
        _add(table, key, "1", numbers.get(key))
    return table


def _add(table: Table, key: str, ratio: str, value: float | None) -> None:
    judged = verdict(key, value, ratio)
    style = {"met": "green", "missed": "red"}.get(judged, "")
    shown = "not measured" if value is None else f"{value:.4g}"
    table.add_row(key, ratio, shown, AIMS[key].text if judged else "", judged, style=style)


def _stall_table(numbers: dict[str, Any]) -> Table:
    table = Table("an engine stands still per update", "ratio", "ms", "decode steps", box=None, pad_edge=False)
    for ratio, of in numbers["ratios"].items():
        for part, seconds in of["stall_parts_s"].items():
            table.add_row(part, ratio, f"{1000 * seconds:.0f}", f"{seconds / of['decode_step_s']:.2f}")
    return table


def _ledger_table(numbers: dict[str, Any]) -> Table:
    """The largest causes of each process, within the steps that are judged."""
    table = Table("ledger", "ratio", "cause", "share", box=None, pad_edge=False)
    for ratio, of in numbers["ratios"].items():
        for process, causes in of["ledger"].items():
            for cause, share in sorted(causes.items(), key=lambda part: -part[1])[:4]:
                table.add_row(process, ratio, cause, f"{share:.1%}")
    return table
