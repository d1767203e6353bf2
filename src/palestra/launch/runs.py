"""`palestra runs ls` and `palestra runs show`: what the directories of runs tell."""

import difflib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import UserError
from palestra.launch import ledger_view
from palestra.launch.closing import table_of
from palestra.launch.live import describe, duration
from palestra.wire import accounts
from palestra.wire.rundir import RunDir, read_manifests, require_run
from palestra.wire.runlog import Restarted, as_rows, read_ledger, read_metrics, read_restarts, read_summary
from palestra.wire.status import Status, read_status

OUTPUTS = Path("outputs")
_SHOWN_METRICS = (
    "reward/trained",
    "age/mean",
    "age/predicted",
    "rollout/in_flight",
    "engine/limit",
    "engine/kv_use",
    "engine/preemptions",
    "publish/bytes",
    "publish/full_bytes",
    "rollout/tokens_per_s",
    "rollout/invalid",
    "train/rl/loss",
    "train/ce/loss",
    "train/rl/entropy",
    "train/grad_norm",
    "train/lr",
)


def find(text: str) -> RunDir:
    """A run by its directory, or by its name in outputs/. Errors: UserError with similar names."""
    for path in (Path(text), OUTPUTS / text):
        if RunDir(path).config.exists():
            return RunDir(path)
    if Path(text).is_dir():
        return require_run(text)
    known = [run.name for run in all_in(OUTPUTS)]
    close = difflib.get_close_matches(text, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known in {OUTPUTS}/: {', '.join(known) or 'none'}"
    raise UserError(f"there is no run {text!r}; {hint}")


def all_in(outputs: Path) -> list[RunDir]:
    return [RunDir(path.parent) for path in sorted(outputs.glob("*/config.json"))]


def show_all(outputs: Path, *, as_json: bool) -> None:
    """Errors: UserError, if there is no such directory."""
    if not outputs.is_dir():
        raise UserError(f"{outputs} is not a directory; runs write to log.outputs, by default {OUTPUTS}/")
    rows = [_row(run) for run in all_in(outputs)]
    if as_json:
        _print_json(rows)
        return
    table = Table("run", "state", "steps", "reward", "started", "took", box=None, pad_edge=False)
    for row in rows:
        started = datetime.fromtimestamp(row["started_at"]).strftime("%Y-%m-%d %H:%M") if row["started_at"] else "-"
        took = duration(row["wall_s"]) if row["wall_s"] else "-"
        reward = "-" if row["reward"] is None else f"{row['reward']:.3f}"
        table.add_row(row["name"], row["state"], str(row["steps"]), reward, started, took)
    Console().print(table)


def _row(run: RunDir) -> dict[str, Any]:
    status, metrics = read_status(run), last_metrics(run)
    ended_at = status.ended_at if status else 0.0
    return {
        "name": run.name,
        "state": status.state if status else "never started",
        "steps": metrics["step"] + 1 if metrics else 0,
        "reward": next((value for key, value in metrics.items() if key == "reward/trained"), None),
        "started_at": status.started_at if status else 0.0,
        "wall_s": ended_at - status.started_at if status and ended_at else 0.0,
    }


def last_metrics(run: RunDir) -> dict[str, Any]:
    """The row of the latest step, warm-up apart; empty before the first one."""
    rows = [row for row in read_metrics(run) if "phase" not in row]
    return max(rows, key=lambda row: (row["step"], row["time"]), default={})


def show_one(run: RunDir, *, as_json: bool) -> None:
    config, status, metrics = read_resolved(run.config), read_status(run), last_metrics(run)
    entries = read_ledger(run)
    account, words = accounts.account(entries), accounts.bottleneck(entries, is_rl=config.is_rl)
    if as_json:
        _print_json(
            {
                **_row(run),
                "status": msgspec.to_builtins(status) if status else None,
                "config": config.model_dump(mode="json"),
                "summary": read_summary(run),
                "restarts": as_rows(read_restarts(run)),
                "metrics": metrics,
                "checkpoints": [manifest.version for manifest in read_manifests(run)],
                "ledger": [accounts.as_dict(process) for process in account],
                "bottleneck": words,
            }
        )
        return
    console = Console(highlight=False)
    console.print(f"[bold]{run.name}[/]  {_state(status)}\n{_highlights(config)}", soft_wrap=True)
    if metrics:
        numbers = {key: metrics[key] for key in _SHOWN_METRICS if key in metrics}
        console.print(f"step {metrics['step']}: {describe(numbers)}", soft_wrap=True)
    if (summary := read_summary(run)) is not None:
        console.print(table_of(summary))
    for line in restart_lines(read_restarts(run)):
        console.print(line, soft_wrap=True)
    if account:
        console.print(ledger_view.table(account))
    console.print(f"\n{words}", soft_wrap=True)


def restart_lines(restarts: list[Restarted]) -> list[str]:
    """`env-0 was started again once, gone 1.5 s in all; the last time: killed by SIGKILL`: a line for each process."""
    lines = []
    for name in sorted({restarted.process for restarted in restarts}):
        mine = [restarted for restarted in restarts if restarted.process == name]
        gone_s = sum(restarted.gone_s or 0.0 for restarted in mine)
        times = "once" if len(mine) == 1 else f"{len(mine)} times"
        lines.append(f"{name} was started again {times}, gone {gone_s:.1f} s in all; the last time: {mine[-1].why}")
    return lines


def _state(status: Status | None) -> str:
    if status is None:
        return "never started"
    error = f": {status.error.splitlines()[0]}" if status.error else ""
    return f"{status.state} (attempt {status.attempt}){error}"


def _highlights(config: RunConfig) -> str:
    model = config.model.path or (config.model.build.architecture if config.model.build else "")
    if not config.is_rl:
        sources = ", ".join(source.path for source in config.data.sources)
        return f"{model}, supervised on {sources}, {config.train.steps} steps, lr {config.train.lr:g}"
    algo = config.algo
    mix = ", ".join(source.label for source in config.env.mix)
    return (
        f"{model} on {mix}, {config.train.steps} steps of {algo.groups_per_step} groups x {algo.group_size} rollouts, "
        f"loss {algo.loss}, lr {config.train.lr:g}, {config.engine.replicas} engines, {config.train.num_ranks} ranks"
    )


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, default=str)
    print()
