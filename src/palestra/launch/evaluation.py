"""`palestra eval`: environments measured with an endpoint, or with a checkpoint that is served here."""

import asyncio
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from palestra import __version__
from palestra.algo.scores import Estimate, difference
from palestra.config import RunConfig, read_resolved
from palestra.config.load import load_tree
from palestra.config.schema import Engine
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.env.check import gold_script
from palestra.env.environment import Environment
from palestra.env.load import code_of, find_environment, installed, make_environment
from palestra.env.play import score
from palestra.env.sandbox import Sandboxes, require_backend
from palestra.env.tasklist import TaskList
from palestra.launch import run, start
from palestra.launch.live import duration
from palestra.launch.machine import this_machine
from palestra.launch.model_path import max_positions, require_model
from palestra.launch.outcome import Interrupted
from palestra.launch.plan import make_plan, require_fit
from palestra.launch.run import require_keys, require_pythons
from palestra.wire.results import read_results
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_summary

OUTPUTS = Path("outputs") / "evals"
METADATA = "metadata.json"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the command line asks for. Of `checkpoint` and `base_url` with `model` one is given."""

    environments: list[str]
    seats: dict[str, dict[str, Any]]
    model: str | None
    base_url: str | None
    key_env: str | None
    checkpoint: Path | None
    num_tasks: int
    rollouts_per_task: int
    temperature: float | None
    max_tokens: int
    split: str
    args: dict[str, Any]
    concurrency: int
    seed: int
    output: Path | None
    sandbox: str | None
    overrides: list[str]


def evaluate(wish: Wish, *, as_json: bool) -> RunDir:
    """Errors: UserError, before anything starts; else as `palestra run`."""
    config = config_of(wish)
    _require_parts(config, model_field="--checkpoint")
    _carry_out(config, resume=False)
    run_dir = RunDir(config.run_dir)
    show(run_dir, as_json=as_json)
    return run_dir


def resume(directory: Path, wish: Wish, given: Collection[str], *, as_json: bool) -> RunDir:
    """Go on behind the rollouts that results.jsonl has. `given` are the fields of `wish` that the command line names.

    Errors: UserError, if there is no evaluation, or what is asked would make it another one.
    """
    run_dir = RunDir(directory)
    if not run_dir.config.exists():
        raise UserError(f"{directory} has no evaluation to resume; give the directory that `palestra eval` wrote to")
    config = read_resolved(run_dir.config)
    if not config.is_eval:
        raise UserError(f"{directory} is a training run; go on with it by `palestra run RECIPE --resume`")
    tree = config.model_dump(mode="json")
    tree["log"] |= {"name": run_dir.path.resolve().name, "outputs": str(run_dir.path.resolve().parent)}
    config = load_tree(tree, []).config
    _require_held(config, wish, given)
    config = load_tree(tree, [*_at_once(config, wish, given), *wish.overrides]).config
    _require_parts(config, model_field="model.path")
    _carry_out(config, resume=True)
    show(run_dir, as_json=as_json)
    return run_dir


def _require_held(config: RunConfig, wish: Wish, given: Collection[str]) -> None:
    """Errors: UserError, if a field of `wish` is given that is another one in the evaluation."""
    held, asked = _held(config), _asked(wish)
    for field in (field for field in asked if field in given):
        if differing := [value for value in held[field] if value != asked[field]]:
            raise UserError(
                f"--resume goes on with what {config.run_dir} holds: {field.replace('_', ' ')} {_told(differing[0])}, "
                f"and {_told(asked[field])} is asked; leave it out, or begin a new evaluation"
            )


def _held(config: RunConfig) -> dict[str, list[Any]]:
    """By the field of a `Wish`; where each set has its own, those of all."""
    sets, endpoint = config.eval.sets, config.eval.endpoint
    of_sets = ("num_tasks", "rollouts_per_task", "temperature", "split", "args")
    places = [{name: (seat.url, seat.model) for name, seat in entry.seats.items()} for entry in sets]
    return {
        "environments": [sorted(entry.id for entry in sets)],
        "model": [None if endpoint is None else config.model.path],
        "base_url": [endpoint and endpoint.url],
        "key_env": [endpoint and endpoint.key_env],
        "checkpoint": [config.model.path if endpoint is None else None],
        **{field: [getattr(entry, field) for entry in sets] for field in of_sets},
        "seats": places,
        "max_tokens": [config.sampling.max_tokens],
        "seed": [config.train.seed],
        "output": [str(config.run_dir.resolve())],
        "sandbox": [config.env.sandbox],
    }


def _asked(wish: Wish) -> dict[str, Any]:
    """As `_held` has it; without what changes no result."""
    asked = {field: value for field, value in vars(wish).items() if field not in ("concurrency", "overrides")}
    return asked | {
        "environments": sorted({_named(id)["id"] for id in wish.environments}),
        "checkpoint": wish.checkpoint and _absolute(wish.checkpoint),
        "seats": {name: (seat["url"], seat["model"]) for name, seat in wish.seats.items()},
        "output": wish.output and str(wish.output.resolve()),
    }


def _at_once(config: RunConfig, wish: Wish, given: Collection[str]) -> list[str]:
    """The overrides that `--concurrency` means."""
    places = ["engine", *(["eval.endpoint"] if config.eval.endpoint else [])]
    return [f"{place}.max_in_flight={wish.concurrency}" for place in places if "concurrency" in given]


def _told(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else json.dumps(value)


def _require_parts(config: RunConfig, *, model_field: str) -> None:
    """Errors: UserError, if the model or an environment is not there."""
    if config.eval.endpoint is None:
        require_model(config.model.path, field=model_field)
    for entry in config.eval.sets:
        if entry.python is None:
            find_environment(entry.id)
    require_pythons(config)
    require_keys(config)
    require_backend(config.env.sandbox)


def config_of(wish: Wish) -> RunConfig:
    """Errors: UserError naming the option that is missing, or wrong."""
    if not wish.environments:
        raise UserError("name at least one environment; `palestra env list` shows what is installed")
    if (wish.checkpoint is None) == (wish.base_url is None):
        raise UserError("give either --checkpoint DIR, or --base-url URL with --model NAME")
    if wish.base_url is not None and wish.model is None:
        raise UserError("--base-url needs --model: the model's name at that endpoint")
    outputs, name = _place(wish)
    temperature = wish.temperature
    if temperature is None:
        temperature = 0.0 if wish.rollouts_per_task == 1 else 1.0
    common = {
        "split": wish.split,
        "num_tasks": wish.num_tasks,
        "rollouts_per_task": wish.rollouts_per_task,
        "temperature": temperature,
        "args": wish.args,
        "seats": wish.seats,
    }
    tree: dict[str, Any] = {
        "log": {"name": name, "outputs": str(outputs)},
        "model": {"path": wish.model if wish.checkpoint is None else _absolute(wish.checkpoint)},
        "sampling": {"max_tokens": wish.max_tokens},
        "train": {"seed": wish.seed},
        "engine": {"max_in_flight": wish.concurrency, **context_of(wish.checkpoint)},
        "env": {"sandbox": wish.sandbox},
        "eval": {"sets": [{**_named(id), **common} for id in dict.fromkeys(wish.environments)]},
    }
    if wish.base_url is not None:
        endpoint = {"url": wish.base_url, "key_env": wish.key_env, "max_in_flight": wish.concurrency}
        tree["eval"]["endpoint"] = {key: value for key, value in endpoint.items() if value is not None}
    return load_tree(tree, wish.overrides).config


def context_of(checkpoint: Path | None) -> dict[str, int]:
    """Of a model whose context is shorter than an engine's default."""
    positions = None if checkpoint is None else max_positions(checkpoint)
    return {} if positions is None else {"max_model_len": min(positions, Engine().max_model_len)}


def _absolute(path: Path) -> str:
    """As it is found from any directory; the name of a model on a hub as it is."""
    return str(path.resolve()) if path.exists() else str(path)


def _named(id: str) -> dict[str, str]:
    """An environment in a file is found from any directory, and called as it was named."""
    file, separator, name = id.rpartition(":")
    return {"id": f"{Path(file).resolve()}:{name}", "name": id} if separator and file.endswith(".py") else {"id": id}


def _place(wish: Wish) -> tuple[Path, str]:
    if wish.output is not None:
        return wish.output.parent, wish.output.name
    words = [*wish.environments[:3], Path(str(wish.checkpoint or wish.model)).name, time.strftime("%Y%m%d-%H%M%S")]
    return OUTPUTS, re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-")


def _carry_out(config: RunConfig, *, resume: bool) -> None:
    machine = this_machine()
    plan = make_plan(config, machine)
    require_fit(plan, machine)
    run_dir = RunDir(config.run_dir)
    if not resume and run_dir.config.exists():
        raise UserError(f"{run_dir.path} holds an evaluation; go on with it by --resume, or give another --output")
    origin = start.begin(config, resume=resume)
    metadata = metadata_of(config)
    if resume:
        _require_same_versions(run_dir, metadata)
    else:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir.path / METADATA, json.dumps(metadata, indent=2, default=str).encode() + b"\n")
    try:
        run.carry_out(config, plan, origin)
    except Interrupted:
        raise Interrupted(f"go on with the same command and --resume {run_dir.path}") from None


def _require_same_versions(run_dir: RunDir, now: dict[str, Any]) -> None:
    """Errors: UserError, if rollouts of two versions of an environment would be mixed."""
    file = run_dir.path / METADATA
    before = json.loads(file.read_text())["environments"] if file.exists() else {}
    for name, told in now["environments"].items():
        if name in before and before[name]["version"] not in (None, told["version"]):
            raise UserError(
                f"{run_dir.path} has rollouts of {name} {before[name]['version']}, and it is {told['version']} now; "
                "go back to that version, or begin a new evaluation"
            )


def metadata_of(config: RunConfig) -> dict[str, Any]:
    """What is measured, with which versions."""
    return {
        "palestra": __version__,
        "model": config.model_dir,
        "endpoint": config.eval.endpoint and config.eval.endpoint.url,
        "environments": {
            entry.label: {"id": entry.id, "version": _version(entry.id), "args": entry.args, "split": entry.split}
            for entry in config.eval.sets
        },
    }


def _version(id: str) -> str | None:
    """Of the package that offers the environment; of a single file, of its content."""
    file, _, _ = id.rpartition(":")
    if file.endswith(".py"):
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    entry = installed().get(id)
    try:
        return entry.dist.version if entry is not None and entry.dist is not None else None
    except metadata.PackageNotFoundError:
        return None


# --- traces


def require_free(to: Path) -> None:
    """Errors: UserError, if there is a file already."""
    if to.exists():
        raise UserError(f"{to} exists; give another file")


def keep_good(run_dir: RunDir, to: Path, min_reward: float) -> None:
    """Write the conversations that earned enough as supervised rows. Errors: UserError, if none did."""
    rows = [row for records in _records(run_dir.path).values() for row in _rows(records, min_reward)]
    if not rows:
        raise UserError(f"no rollout earned {min_reward:g}; lower --min-reward, or look into {run_dir.results}")
    _write_rows(rows, to, min_reward)


def write_gold(wish: Wish, to: Path, min_reward: float) -> None:
    """Write the conversations of agents that know the answer, without a model.

    Errors: UserError, if an environment's tasks have no gold, or none earns enough.
    """
    if not wish.environments:
        raise UserError("name at least one environment; `palestra env list` shows what is installed")
    if wish.overrides:
        raise UserError(f"--gold asks no model: {wish.overrides[0]} would change nothing; leave it out")
    rows: list[dict[str, Any]] = []
    for id in dict.fromkeys(wish.environments):
        make = partial(make_environment, id, split=wish.split, args=wish.args)
        with code_of(id, "cannot list its tasks"):
            tasks = _tasks_of_epochs(lambda epoch, make=make: make(seed=wish.seed + epoch), wish.num_tasks)
        if not (known := [task for task in tasks if task.gold is not None]):
            raise UserError(f"{id}: none of its {len(tasks)} tasks of the split {wish.split!r} has a gold to play")
        records = asyncio.run(_played_by_gold(make(seed=wish.seed), known, wish.sandbox))
        named = [msgspec.structs.replace(record, environment=id) for record in records]
        if not (found := _rows(named, min_reward)):
            why = next((f"; {one.error.splitlines()[0]}" for one in records if one.ending == Ending.INVALID), "")
            raise UserError(f"{id}: none of its first {len(tasks)} tasks has a gold that earns {min_reward:g}{why}")
        if len(found) < len(tasks):
            print(f"{id}: {len(tasks) - len(found)} of {len(tasks)} tasks have none that does", file=sys.stderr)
        rows += found
    _write_rows(rows, to, min_reward)


def _tasks_of_epochs(make: Callable[[int], Environment], num_tasks: int) -> list[Task]:
    """Of as many epochs as it takes; none, if an epoch has none."""
    listed, tasks = TaskList(make), []
    epoch, ended = 0, False
    while len(tasks) < num_tasks and not ended:
        found, _ = listed.take(epoch, 0, num_tasks - len(tasks))
        tasks, epoch, ended = [*tasks, *found], epoch + 1, not found
    return tasks


async def _played_by_gold(environment: Environment, tasks: list[Task], sandbox: str | None) -> list[RolloutRecord]:
    async with Sandboxes(sandbox):
        return [await score(environment, task, gold_script(environment, task)) for task in tasks]


def _write_rows(rows: list[dict[str, Any]], to: Path, min_reward: float) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    print(f"{len(rows)} conversations that earned {min_reward:g} or more: {to}", file=sys.stderr)


def _rows(records: list[RolloutRecord], min_reward: float) -> list[dict[str, Any]]:
    """As `data.sources` of a recipe reads them; the rest says where they are from."""
    good = [record for record in records if record.ending == Ending.OK and record.reward >= min_reward]
    return [
        {
            "messages": record.messages,
            **({"tools": record.tools} if record.tools else {}),
            "environment": record.environment,
            "key": record.task.key,
            "reward": record.reward,
        }
        for record in sorted(good, key=lambda record: record.rollout_id)
    ]


# --- what it says


def show(run_dir: RunDir, *, as_json: bool) -> None:
    """The table on stderr, or the summary on stdout."""
    summary = read_summary(run_dir) or {}
    if as_json:
        json.dump(summary, sys.stdout, indent=2)
        print()
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(table_of(summary["sets"]))
    for name, found in summary["sets"].items():
        if seats := ", ".join(f"{of} {mean:.3f}" for of, mean in found["metrics"].items() if "." in of):
            console.print(f"{name}: {seats}", markup=False)
        for cause, count in found["errors"].items():
            console.print(f"{name}: {count} invalid: {cause}", markup=False)
    console.print(f"{duration(summary['wall_s'])}; rollouts: {run_dir.results}")


def table_of(sets: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("environment", "reward", "95 %", "pass@k", "tasks", "rollouts", "tokens", "endings"):
        table.add_column(heading, justify="left" if heading in ("environment", "endings") else "right")
    for name, found in sets.items():
        reward = found["reward"]
        table.add_row(
            name,
            f"{reward['mean']:.3f}",
            _interval(reward["low"], reward["high"]),
            "  ".join(f"{k}: {share:.3f}" for k, share in found["pass_at"].items()),
            str(reward["num_tasks"]),
            str(reward["num_rollouts"]),
            f"{found['tokens']:.0f}",
            ", ".join(f"{count} {ending}" for ending, count in found["endings"].items()),
        )
    return table


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


# --- compare


def compare(one: Path, other: Path, *, as_json: bool) -> None:
    """Set by set, over the tasks that both have. Errors: UserError, if they share none."""
    before, after = _records(one), _records(other)
    shared = [name for name in before if name in after]
    if not shared:
        raise UserError(f"{one} has {', '.join(before)} and {other} has {', '.join(after)}: no environment is in both")
    found: dict[str, Estimate] = {}
    for name in shared:
        try:
            found[name] = difference(before[name], after[name])
        except ValueError as error:
            raise UserError(f"{name}: {error}; compare evaluations of the same tasks") from error
    if as_json:
        json.dump({name: msgspec.to_builtins(estimate) for name, estimate in found.items()}, sys.stdout, indent=2)
        print()
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("environment", "difference", "95 %", "tasks", "verdict"):
        table.add_column(heading, justify="left" if heading in ("environment", "verdict") else "right")
    for name, estimate in found.items():
        cells = [f"{estimate.mean:+.3f}", _interval(estimate.low, estimate.high), str(estimate.num_tasks)]
        table.add_row(name, *cells, _verdict(estimate))
    Console(highlight=False, soft_wrap=True).print(table)


def _verdict(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "one task tells nothing"
    return "better" if estimate.low > 0 else "worse" if estimate.high < 0 else "no difference is proved"


def _records(directory: Path) -> dict[str, list[RolloutRecord]]:
    run_dir = RunDir(directory)
    if not run_dir.results.exists():
        raise UserError(f"{directory} has no results.jsonl; give a directory that `palestra eval` wrote to")
    return {name: list(records.values()) for name, records in read_results(run_dir).items()}
