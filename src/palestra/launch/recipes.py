"""Recipes: read for training, and shown with where each value came from."""

import difflib
import json
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from palestra.config import RunConfig, explain, load
from palestra.config.load import flatten
from palestra.config.schema import Env, Eval
from palestra.core.errors import UserError


def for_training(path: Path, overrides: list[str], *, is_supervised: bool) -> RunConfig:
    """`is_supervised` leaves environments and evaluations out. Errors: UserError, also where no data is left."""
    config = load(path, overrides).config
    if config.is_eval:
        raise UserError(f"{path} has nothing to train on: give env.mix or data.sources; `palestra eval` measures alone")
    if not is_supervised:
        return config
    if not config.data.sources:
        raise UserError(f"{path} has no data.sources to train on; add one, or use `palestra run` for its environments")
    return config.model_copy(update={"env": Env.model_validate({}), "eval": Eval.model_validate({})})


def show(path: Path, overrides: list[str], *, with_sources: bool, as_json: bool) -> None:
    loaded = load(path, overrides)
    rows = [(key, value, loaded.source(key)) for key, value in flatten(loaded.config)]
    if as_json:
        tree = loaded.config.model_dump(mode="json")
        sources = {key: source for key, _, source in rows}
        json.dump({"config": tree, "sources": sources} if with_sources else tree, sys.stdout, indent=2)
        print()
        return
    table = Table("key", "value", *(["source"] if with_sources else []), box=None, pad_edge=False)
    for key, value, source in rows:
        cells = [key, Text(json.dumps(value, default=str)), *([source] if with_sources else [])]
        table.add_row(*cells, style="dim" if source == "default" else "")
    Console(soft_wrap=True).print(table)


def show_schema() -> None:
    json.dump(explain.described(), sys.stdout, indent=2)
    print()


def explain_settings(names: list[str], *, as_markdown: bool, as_json: bool) -> None:
    """Those whose path begins with one of `names`, all without any. Errors: UserError for a name of nothing."""
    wanted = tuple(name.strip("[]") for name in names) or ("",)
    for name in wanted:
        if not any(_is_in(setting.path, name) for setting in explain.settings()):
            close = difflib.get_close_matches(name, [setting.path for setting in explain.settings()], n=1)
            raise UserError(f"no setting is called {name!r}" + (f"; did you mean {close[0]}?" if close else ""))
    found = [s for s in explain.settings() if any(_is_in(s.path, name) for name in wanted)]
    if as_json:
        json.dump([asdict(setting) for setting in found], sys.stdout, indent=2)
        print()
    elif as_markdown:
        print(as_page(found))
    else:
        _print_settings(found)


def _is_in(path: str, name: str) -> bool:
    return not name or path == name or path.startswith(f"{name}.")


def _print_settings(found: list[explain.Setting]) -> None:
    console, about = Console(highlight=False), explain.sections()
    for section, members in groupby(found, key=lambda setting: setting.section):
        console.print(f"\n[bold]{escape(f'[{section}]')}[/bold]  {escape(about[section])}")
        table = Table("setting", "default", "values", "meaning", box=None, pad_edge=False)
        for one in members:
            table.add_row(one.name, Text(one.default or "must be given"), Text(one.values), Text(one.meaning))
        console.print(table)


def as_page(found: list[explain.Setting]) -> str:
    """docs/settings.md."""
    lines, about = [_HEAD], explain.sections()
    for section, members in groupby(found, key=lambda setting: setting.section):
        lines += [
            "",
            f"## `[{section}]`",
            "",
            about[section],
            "",
            "| setting | default | values | meaning |",
            "|---|---|---|---|",
        ]
        for one in members:
            cells = [f"`{one.name}`", f"`{one.default}`" if one.default else "must be given", one.values, one.meaning]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


_HEAD = """# Settings

Every setting of a recipe, as `palestra config explain --markdown` prints it. `palestra config explain train.muon` tells
of some, and `palestra config show RECIPE --sources` what they are in a recipe, and where each was set. On the command
line: `palestra run RECIPE train.steps=20`. A recipe may begin with `base = "other.toml"`: what it does not say is as it
is there."""
