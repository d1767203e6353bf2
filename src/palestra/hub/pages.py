"""The pages: what each is asked, what it answers. HTML and the JSON twin show the same answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct
from pydantic import BaseModel

from palestra.core.errors import PalestraError
from palestra.hub import answers, curves, queries, search
from palestra.hub.columns import Part
from palestra.hub.library import Library, OpenRun
from palestra.hub.reading import record_at, row_of, tokens_of
from palestra.hub.tasks import history
from palestra.wire.accounts import bottleneck

_MOST_MOVES = 50
_MOST_SIBLINGS = 64
_MOST_COMPARED = 8
_POOLS = ("easy", "normal", "hard", "retired")
_IDLE_KEYS = ("log.name", "log.outputs")  # differ between any two runs


class NotFoundError(PalestraError):
    """An address that leads nowhere."""


@dataclass(frozen=True)
class Page:
    """`view` gets the library, the parts of the path and the query; it runs in a thread."""

    path: str
    title: str
    query: type[BaseModel]
    answer: type[Struct]
    view: Callable[[Library, dict[str, str], Any], Struct]
    template: str = ""  # empty: JSON alone
    needs_index: bool = False


def runs(library: Library, _path: dict[str, str], _query: queries.Nothing) -> answers.Runs:
    return answers.Runs(outputs=str(library.outputs), runs=library.rows())


def run(library: Library, path: dict[str, str], _query: queries.Nothing) -> answers.Run:
    of = library.open(path["run"])
    metrics = of.metrics
    newest = {name: value for name, value in curves.latest(metrics).items() if isinstance(value, int | float)}
    moves = of.moves
    warnings = [row for row in metrics if row.get("phase") == "warning"]
    return answers.Run(
        row=library.row(of.id, of.run),
        config=of.config,
        summary=of.summary,
        latest=newest,
        evals=_evals(metrics),
        warnings=[{key: row.get(key) for key in ("step", "rule", "text")} for row in warnings],
        restarts=[msgspec.convert(row, answers.Restart) for row in of.restarts if "process" in row],
        pools=_pools(newest),
        moves=[_move(row) for row in moves[-_MOST_MOVES:][::-1]],
        ledger=ledger(library, path, queries.Nothing()),
        indexed=of.indexed,
    )


def _evals(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"name": name.removeprefix("eval/").removesuffix("/reward"), "version": row["step"], "reward": value}
        for row in metrics
        if str(row.get("phase", "")).startswith("eval")
        for name, value in row.items()
        if name.startswith("eval/") and name.endswith("/reward")
    ]


def _pools(newest: dict[str, float | int]) -> list[answers.Pool]:
    found = []
    for name, value in newest.items():
        room, _, rest = name.partition("/")
        source, _, stat = rest.rpartition("/")
        pool = stat.removesuffix("_tasks")
        if room == "curriculum" and stat.endswith("_tasks") and pool in _POOLS:
            rate = newest.get(f"curriculum/{source}/{pool}_rate")
            found.append(answers.Pool(source=source, pool=pool, num_tasks=value, rate=rate))
    return sorted(found, key=lambda one: (one.source, _POOLS.index(one.pool)))


def _move(row: dict[str, Any]) -> answers.Move:
    return answers.Move(
        step=int(row.get("step", 0)),
        source=str(row.get("source", "")),
        key=str(row.get("key", "")),
        before=str(row.get("from", "")),
        after=str(row.get("to", "")),
        rate=float(row.get("rate", 0.0)),
        num_rollouts=int(row.get("rollouts", 0)),
    )


def run_curves(library: Library, path: dict[str, str], query: queries.Curves) -> answers.Curves:
    of = library.open(path["run"])
    return _curves(of, query.names, query.points)


def _curves(of: OpenRun, names: str, points: int) -> answers.Curves:
    rows = of.metrics
    known = curves.names_of(rows)
    wanted = [name for name in names.split(",") if name] or [
        *curves.OVERVIEW,
        *(name for name in known if name.startswith("eval/") and name.endswith("/reward")),
        *(name for name in known if name.startswith("curriculum/") and name.endswith("_tasks")),
    ]
    found = [curves.curve(rows, name, points) for name in wanted]
    return answers.Curves(run=of.id, curves=[one for one in found if one.steps], known=known, num_rows=len(rows))


def marks(library: Library, path: dict[str, str], _query: queries.Nothing) -> answers.Marks:
    of = library.open(path["run"])
    return answers.Marks(run=of.id, marks=curves.marks(of.metrics, of.spans, of.restarts))


def ledger(library: Library, path: dict[str, str], _query: queries.Nothing) -> answers.Ledger:
    of = library.open(path["run"])
    entries, kind = of.ledger, of.kind
    words = bottleneck(entries, is_rl=kind == "rl") if kind in ("rl", "sft") else ""
    return answers.Ledger(run=of.id, bands=curves.bands(entries), bottleneck=words)


def rollouts(library: Library, path: dict[str, str], query: queries.Rollouts) -> answers.Rollouts:
    of = library.open(path["run"])
    parts = of.index.parts
    page = search.rollouts(
        parts, query, of.group_size, sort=query.sort, limit=query.limit, after=query.after, before=query.before
    )
    return answers.Rollouts(
        run=of.id,
        rollouts=_rows(of, page.rows),
        num_matching=page.num_matching,
        num_before=page.num_before,
        after=page.after,
        before=page.before,
        indexed=of.indexed,
        **search.facets(parts),
    )


def _rows(of: OpenRun, rows: list[search.Row]) -> list[answers.RolloutRow]:
    return [row_of(record_at(of.run, one.part, one.line), one.part, one.line, of.group_size) for one in rows]


def groups(library: Library, path: dict[str, str], query: queries.Groups) -> answers.Groups:
    of = library.open(path["run"])
    parts = of.index.parts
    page = search.groups(parts, query, of.group_size)
    rows = []
    for one in page.rows:
        record = record_at(of.run, one.first.part, one.first.line)
        rows.append(
            answers.GroupRow(
                group=one.number,
                step=one.first.part.step,
                environment=record.environment,
                task=record.task.key,
                num_rollouts=one.count,
                mean_reward=one.mean,
                min_reward=one.low,
                max_reward=one.high,
            )
        )
    return answers.Groups(
        run=of.id,
        groups=rows,
        num_matching=page.num_matching,
        num_before=page.num_before,
        after=page.after,
        before=page.before,
        environments=search.facets(parts)["environments"],
        indexed=of.indexed,
    )


def rollout(library: Library, path: dict[str, str], query: queries.Rollout) -> answers.Rollout:
    return rollout_of(library.open(path["run"]), path["file"], path["line"], query)


def rollout_of(of: OpenRun, file: str, number: str, query: queries.Rollout) -> answers.Rollout:
    """Line `number` of a file of rollouts. Errors: NotFoundError."""
    found, line = _line(of, file, number)
    record = record_at(of.run, found, line)
    row = row_of(record, found, line, of.group_size)
    return answers.Rollout(
        run=of.id,
        row=row,
        task=msgspec.to_builtins(record.task),
        rewards=record.rewards,
        metrics=record.metrics,
        seats=[
            {"name": seat.name, "rewards": seat.rewards, "samples": len(seat.samples), "credits": seat.credits}
            for seat in record.seats
        ],
        messages=record.messages,
        tools=record.tools,
        engine_s=record.engine_s,
        ended_at=record.ended_at or None,
        versions=list(record.versions),
        tokens=tokens_of(of.run, found, record, query.sample, query.first, of.model),
        siblings=_siblings(of, found, row),
    )


def _line(of: OpenRun, name: str, line: str) -> tuple[Part, int]:
    """Errors: NotFoundError. A name is looked up among those of the index, never made a path."""
    found = next((one for one in of.index.parts if one.name == name), None)
    if found is None or not line.isdigit() or int(line) >= found.num_rows:
        raise NotFoundError(f"run {of.id} has no rollout {line[:20]} in {name[:100]}; it may have been written anew")
    return found, int(line)


def _siblings(of: OpenRun, found: Part, row: answers.RolloutRow) -> list[answers.RolloutRow]:
    """Of a group in training, wherever they trained; in an evaluation, of the same task in the same file."""
    if row.group is not None:
        where = queries.Where(group=row.group, kind="training")
        parts = of.index.parts
    else:
        where = queries.Where(task=row.task, environment=row.environment)
        parts = (found,)
    page = search.rollouts(parts, where, of.group_size, sort="oldest", limit=_MOST_SIBLINGS)
    return _rows(of, page.rows)


def task(library: Library, path: dict[str, str], query: queries.OfTask) -> answers.TaskHistory:
    return history(library.open(path["run"]), query)


def compare(library: Library, _path: dict[str, str], query: queries.Compare) -> answers.Comparison:
    opened = [library.open(run_id) for run_id in dict.fromkeys(filter(None, query.runs.split(",")))][:_MOST_COMPARED]
    return answers.Comparison(
        runs=[library.row(of.id, of.run) for of in opened],
        curves=[_curves(of, query.names, query.points) for of in opened],
        differences=_differences([of.config for of in opened]),
    )


def _differences(configs: list[dict[str, Any]]) -> list[answers.Difference]:
    flat = [dict(_leaves(config, "")) for config in configs]
    keys = sorted({key for one in flat for key in one} - set(_IDLE_KEYS))
    found = [answers.Difference(key=key, values=[one.get(key) for one in flat]) for key in keys]
    return [one for one in found if any(value != one.values[0] for value in one.values)]


def _leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    """Dotted keys; a list is one value, a list of sections is gone into."""
    if isinstance(tree, list) and any(isinstance(one, dict) for one in tree):
        tree = {str(i): one for i, one in enumerate(tree)}
    if not isinstance(tree, dict) or not tree:
        return [(prefix, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


PAGES = (
    Page("/runs", "Runs", queries.Nothing, answers.Runs, runs, "runs.html"),
    Page("/compare", "Runs compared", queries.Compare, answers.Comparison, compare, "compare.html"),
    Page("/runs/{run}", "One run", queries.Nothing, answers.Run, run, "run.html"),
    Page("/runs/{run}/curves", "Metrics of a run", queries.Curves, answers.Curves, run_curves, "curves.html"),
    Page("/runs/{run}/marks", "What happened in a run", queries.Nothing, answers.Marks, marks, "marks.html"),
    Page("/runs/{run}/ledger", "Where the time went", queries.Nothing, answers.Ledger, ledger, "ledger.html"),
    Page("/runs/{run}/groups", "Groups", queries.Groups, answers.Groups, groups, "groups.html", True),
    Page("/runs/{run}/rollouts", "Rollouts", queries.Rollouts, answers.Rollouts, rollouts, "rollouts.html", True),
    Page(
        "/runs/{run}/rollouts/{file}/{line}",
        "One rollout",
        queries.Rollout,
        answers.Rollout,
        rollout,
        "rollout.html",
        True,
    ),
    Page("/runs/{run}/task", "One task over versions", queries.OfTask, answers.TaskHistory, task, "task.html", True),
)
