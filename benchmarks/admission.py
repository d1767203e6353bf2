"""Admission against fixed limits, on a real engine whose cache is small.

    python benchmarks/admission.py --outputs outputs/admission [--limits 16 32 64 128 256] [section.field=value ...]

The same rollouts by the bare client with ever so many in flight, then by the loop, which finds its own limit; nothing
trains meanwhile. Lengths are those of `palestra bench loop`, and the cache has room for some 60 of them at once.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from palestra.config import load
from palestra.launch.bench import readings
from palestra.launch.bench.lead import Pass
from palestra.launch.bench.loop import RECIPE
from palestra.launch.bench.parts import Bench, Part

_STEPS, _GROUPS, _BLOCKS = 2, 192, 256  # 1,536 rollouts a step; blocks of 32 tokens


def measure(outputs: Path, limits: list[int], overrides: list[str]) -> Part:
    bench = Bench(load(RECIPE, overrides).config, outputs)
    config = bench.variant(
        "admission",
        algo={"max_age": 0, "groups_per_step": _GROUPS},
        train={"steps": _STEPS},
        engine={"max_in_flight": max(limits), "args": {"num-gpu-blocks-override": _BLOCKS}},
    )
    return bench.loop(config, alone=[Pass(limit, 0, _GROUPS) for limit in limits])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--limits", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    arguments = parser.parse_intermixed_args()
    part = measure(arguments.outputs, arguments.limits, arguments.overrides)
    table = Table("rollouts in flight", "seconds", "tokens/s, slots full", "preemptions", box=None)
    for alone in part.alone:
        speed = f"{alone.saturated_tokens_per_s:.0f}"
        table.add_row(f"{alone.in_flight}, fixed", f"{alone.wall_s:.1f}", speed, str(alone.preemptions))
    rows = readings.trained(part.rows)
    for step, wall_s in enumerate(readings.generate_walls_s(part.spans)):
        row = rows[step]
        table.add_row(f"admission, step {step}", f"{wall_s:.1f}", "", f"{row.get('engine/preemptions', 0):.0f}")
        print({name: value for name, value in row.items() if name.startswith("engine/")})
    Console().print(table)


if __name__ == "__main__":
    main()
