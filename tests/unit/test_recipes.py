"""Every recipe is a valid config whose environments, data and sizes exist and fit together."""

import json
import shlex
import subprocess
import sys
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pytest

from palestra.config import RunConfig, load
from palestra.env.chat.tokenizer import load_tokenizer
from palestra.env.load import make_environment
from palestra.env.tasklist import as_sent
from palestra.model.build import write_tokenizer
from palestra.train.data import render
from palestra.train.rows import RawRow

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def config(request) -> RunConfig:
    return load(request.param).config


def test_every_environment_has_tasks(config):
    for source in (*config.env.mix, *config.eval.sets):
        environment = make_environment(source.id, split=source.split, seed=0, args=source.args)
        assert len([as_sent(task, i) for i, task in enumerate(islice(environment.tasks(), 16))]) == 16


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*/*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_recipes_for_machines_that_are_not_here_name_environments_that_are(path):
    config = load(path).config
    for source in (*config.env.mix, *config.eval.sets):
        environment = make_environment(source.id, split=source.split, seed=0, args=source.args)
        if source.id != "gsm8k":  # which is on the Hugging Face hub
            assert len(list(islice(environment.tasks(), 16))) == 16


def test_evaluations_are_held_out_and_the_first_one_is_greedy(config):
    assert config.eval.sets
    assert config.eval.sets[0].temperature == 0
    if config.log.name != "wordle":  # words that a small policy has never seen it cannot spell
        assert all(entry.split == "test" for entry in config.eval.sets)
    assert all(source.split == "train" for source in config.env.mix)


@pytest.fixture
def rows(config, tmp_path) -> dict[str, list[Any]]:
    """Of every source of the warm-up; what is not in the repository is made as the recipe's comments say."""
    found = {}
    for source in config.data.sources:
        path = ROOT / source.path
        if source.path.startswith("outputs/"):
            path = make_as_told(source.path, tmp_path / Path(source.path).name)
        found[source.path] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def make_as_told(path: str, to: Path) -> Path:
    told = [line.removeprefix("#   ") for recipe in RECIPES for line in recipe.read_text().splitlines()]
    command = next(shlex.split(line) for line in told if line.endswith(f" {path}"))
    command = [str(to) if word == path else word for word in command]
    subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], check=True, timeout=100)
    return to


@pytest.mark.slow
def test_a_new_models_vocabulary_has_what_it_reads_and_its_context_holds_it(config, rows, tmp_path):
    """Whole conversations of the warm-up, and the first words of every task."""
    if config.model.build is None:
        return
    write_tokenizer(config.model.build, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for known in rows.values():
        for number, row in enumerate(known[:500]):
            rendered = render(RawRow(f"row {number}", row), tokenizer)
            assert len(rendered.token_ids) <= min(config.engine.max_model_len, config.data.max_tokens)
            replies = [len(list(group)) for said, group in groupby(rendered.mask) if said]
            assert max(replies) <= config.sampling.max_tokens
    for source in (*config.env.mix, *config.eval.sets):
        environment = make_environment(source.id, split=source.split, seed=0, args=source.args)
        for task in islice(environment.tasks(), 500):
            tokenizer.encode(f"{environment.system or ''}{task.prompt}")
