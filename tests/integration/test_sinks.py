"""A real run whose metrics are told elsewhere: a place that fails stops nothing, and has all when it works again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.wire.rundir import RunDir
from palestra.wire.runlog import read_metrics
from tests.unit.launch.test_sinks import of_tensorboard, of_wandb

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

RECIPE = """
[log]
name = "mine"
outputs = "{outputs}"
to = ["tensorboard", "wandb"]

[model]
dtype = "float32"

[model.build]
architecture = "Qwen3ForCausalLM"
alphabet = "abcdefghij"

[model.build.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
tie_word_embeddings = true

[data]
sources = [{{ path = "{rows}" }}]
max_tokens = 64

[train]
samples_per_step = 4
max_pack_tokens = 128
checkpoint_every = 2
"""


def sft(recipe: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "palestra.launch.cli", "sft", str(recipe), *words]
    environment = {**os.environ, "WANDB_MODE": "offline", "HOME": str(recipe.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=130, env=environment)


def test_a_run_goes_on_without_a_place_and_a_resumed_one_tells_it_everything(tmp_path: Path):
    rows, recipe, run = tmp_path / "rows.jsonl", tmp_path / "tiny.toml", RunDir(tmp_path / "mine")
    rows.write_text("".join(json.dumps({"prompt": "abc", "completion": "cba"}) + "\n" for _ in range(64)))
    recipe.write_text(RECIPE.format(outputs=tmp_path, rows=rows))
    run.path.mkdir()
    (run.path / "tensorboard").write_text("in the way")
    first = sft(recipe, "train.steps=3")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("tensorboard is not told of metrics any more") == 1
    assert "wandb is not told" not in first.stderr
    (run.path / "tensorboard").unlink()
    second = sft(recipe, "train.steps=5", "--resume")
    assert second.returncode == 0, second.stderr
    assert "is not told" not in second.stderr
    losses = {row["step"]: round(row["train/ce/loss"], 4) for row in read_metrics(run) if "train/ce/loss" in row}
    assert sorted(losses) == [0, 1, 2, 3, 4]
    for found in (of_tensorboard(run), of_wandb(run)):
        told = {step: values for (name, step), values in found.items() if name == "train/ce/loss"}
        assert {step: [round(value, 4) for value in values] for step, values in told.items()} == {
            step: [loss] for step, loss in losses.items()
        }


def test_a_library_that_is_not_there_is_named_before_anything_starts(tmp_path: Path):
    """The planted fault: a Python in which it cannot be found."""
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "tiny.toml"
    rows.write_text('{"prompt": "abc", "completion": "cba"}\n')
    recipe.write_text(RECIPE.format(outputs=tmp_path, rows=rows))
    code = (
        "import importlib.util as u, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'wandb' else real(name, *rest)\n"
        "from palestra.launch.cli import main\n"
        f"sys.exit(main(['sft', {str(recipe)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert 'pip install "palestra[wandb]"' in done.stderr
    assert not (tmp_path / "mine").exists()
