"""Recipes: read for training, and shown with where each value came from."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from palestra.config import RunConfig, load
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
    json.dump(RunConfig.model_json_schema(), sys.stdout, indent=2)
    print()
