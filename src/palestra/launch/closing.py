"""What `palestra run` prints at the end: before and after, from summary.json."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from palestra.launch.live import duration
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_summary

_ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("reward_before", "reward before", "{:.3f}"),
    ("reward_after", "reward after", "{:.3f}"),
    ("steps", "steps", "{:.0f}"),
    ("publishes", "publishes, each proved", "{:.0f}"),
    ("publish_max_abs_logprob_gap", "largest trainer-engine gap", "{:.1e}"),
    ("publish_share", "bytes sent, of the weights' own", "{:.1%}"),
    ("max_versions_in_a_rollout", "policy versions in a rollout, at most", "{:.0f}"),
    ("mean_age", "mean age", "{:.2f}"),
    ("predicted_mean_age", "mean age, foretold at dispatch", "{:.2f}"),
    ("trainer_idle", "trainer idle", "{:.1%}"),
    ("sample_tokens_per_s", "sampled tokens/s", "{:,.0f}"),
)


def show(run: RunDir, *, as_json: bool) -> None:
    """The table on stderr, or the summary on stdout."""
    summary = read_summary(run) or {}
    if as_json:
        json.dump(summary, sys.stdout, indent=2)
        print()
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(table_of(summary))
    for warning in summary.get("warnings", []):
        console.print(f"warning at step {warning['step']}: {warning['text']}")
    if run.export.exists():
        console.print(f"weights: {run.export}")
    console.print(f"where the time went: palestra runs show {run.path}")


def table_of(summary: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, text, form in _ROWS:
        if isinstance(summary.get(key), int | float):
            table.add_row(text, form.format(summary[key]), style="bold" if key.startswith("reward") else "")
    if summary.get("restarts"):
        table.add_row("processes started again", str(len(summary["restarts"])))
    if isinstance(summary.get("wall_s"), int | float):
        table.add_row("wall time", duration(summary["wall_s"]))
    return table
