"""`palestra simulate`: what a recipe would do, from curves that were measured or are given."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from palestra.config import RunConfig, load
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.orchestrate.simulate.curves import Curves, read_curves
from palestra.orchestrate.simulate.loop import simulate
from palestra.orchestrate.simulate.measure import curves_from
from palestra.orchestrate.simulate.outcome import Outcome
from palestra.orchestrate.simulate.rules import Rules, rules_of
from palestra.orchestrate.simulate.search import Split, best, search
from palestra.wire.rundir import RunDir

_SKIP = 10  # steps until the loop has found its rhythm


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the command line asks for. `steps` are counted from when the loop has found its rhythm."""

    recipe: Path
    overrides: list[str]
    run: RunDir | None = None
    curves: Path | None = None
    save: Path | None = None
    gpus: int | None = None
    steps: int = 20
    seed: int = 0


def show(wish: Wish, *, as_json: bool) -> None:
    """Errors: UserError."""
    config = load(wish.recipe, wish.overrides).config
    if not config.is_rl:
        raise UserError(f"{wish.recipe} has no env.mix: there is no loop to simulate")
    curves = _curves(wish)
    if wish.save is not None:
        write_atomically(wish.save, curves.model_dump_json(indent=2).encode())
    if wish.gpus is not None:
        _show_splits(search_for(wish, config, curves), curves, as_json=as_json)
    else:
        _show_variants(variants(wish, config, curves), curves, as_json=as_json)


def _curves(wish: Wish) -> Curves:
    if (wish.run is None) == (wish.curves is None):
        raise UserError("give exactly one of --from RUN, a finished run to measure, and --curves FILE")
    if wish.run is not None:
        return curves_from(wish.run)
    assert wish.curves is not None
    return read_curves(wish.curves)


def variants(wish: Wish, config: RunConfig, curves: Curves) -> dict[str, Outcome]:
    """The recipe, and the same one without what makes the loop asynchronous."""
    rules = _rules(wish, config)
    in_turns = replace(rules, max_outstanding=config.algo.rollouts_per_step, publish_every=1)
    ways = {
        "as the recipe says": rules,
        "updates wait for rollouts": replace(rules, updates="drain"),
        "batch by batch": replace(rules, updates="batches"),
        "generate and train in turns": in_turns,
    }
    return {name: simulate(way, curves, seed=wish.seed, skip=_SKIP, steps=wish.steps) for name, way in ways.items()}


def search_for(wish: Wish, config: RunConfig, curves: Curves) -> list[Split]:
    assert wish.gpus is not None
    return search(_rules(wish, config), curves, gpus=wish.gpus, seed=wish.seed, skip=_SKIP, steps=wish.steps)


def _rules(wish: Wish, config: RunConfig) -> Rules:
    """Enough steps that what counts is far from both ends."""
    ahead = max(-(-config.algo.max_outstanding // config.algo.rollouts_per_step), config.sync.every)
    return replace(rules_of(config), steps=_SKIP + 1 + wish.steps + ahead)


# --- tables

_COLUMNS: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
    ("step", lambda o: f"{o.step_s:,.3g} s" if o.step_s < 100 else f"{o.step_s:,.0f} s"),
    ("trainer\nidle", lambda o: f"{o.trainer_idle:.0%}"),
    ("engines\nidle", lambda o: f"{o.engine_idle:.0%}"),
    ("in\nflight", lambda o: f"{o.mean_in_flight:,.0f}"),
    ("tokens/s", lambda o: f"{o.tokens_per_s:,.0f}"),
    ("mean\nage", lambda o: f"{o.mean_age:.2f}"),
    ("p95", lambda o: f"{o.p95_age:.0f}"),
    ("too\nold", lambda o: f"{o.too_old:.1%}"),
)


def _show_variants(found: dict[str, Outcome], curves: Curves, *, as_json: bool) -> None:
    recipe, _, batches, _ = found.values()
    factor = batches.step_s / recipe.step_s
    if as_json:
        outcomes = {name: asdict(outcome) for name, outcome in found.items()}
        _print_json({"curves": curves.source, "variants": outcomes, "in_flight_factor": factor})
        return
    table = _table(("",), [((name,), outcome) for name, outcome in found.items()])
    words = f"Without in-flight updates, batch by batch, a step takes {factor:.2f} times as long."
    _print(table, f"{words}\nCurves: {curves.source}.")


def _show_splits(splits: list[Split], curves: Curves, *, as_json: bool) -> None:
    found = best(splits)
    if as_json:
        _print_json({"curves": curves.source, "splits": [asdict(split) for split in splits], "best": asdict(found)})
        return
    rows = [((str(split.trainer_gpus), str(split.engines)), split.outcome) for split in splits]
    words = f"Best: {found.trainer_gpus} GPUs train, {found.engines} engines of {curves.engine.gpus} sample"
    words += ", in turns on the same ones." if found.is_shared else "."
    _print(_table(("trainer\nGPUs", "engines"), rows, splits.index(found)), f"{words}\nCurves: {curves.source}.")


def _table(heads: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], Outcome]], bold: int | None = None) -> Table:
    table = Table(*heads, *(name for name, _ in _COLUMNS), box=None, pad_edge=False)
    for column in table.columns[len(heads) :]:
        column.justify = "right"
    for place, (names, outcome) in enumerate(rows):
        cells = [form(outcome) for _, form in _COLUMNS]
        table.add_row(*names, *cells, style="bold" if place == bold else "")
    return table


def _print(table: Table, words: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"\n{words}")


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()
