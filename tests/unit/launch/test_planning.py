"""`palestra plan`: the report's recipes on the report's machines, and a model measured here."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from palestra.config import RunConfig, load
from palestra.config.schema import Lora, Train
from palestra.core.errors import UserError
from palestra.launch import planning
from palestra.launch.bench import trainer as bench
from palestra.launch.bench.shapes import SHAPES
from palestra.launch.budget import Work, budget_of
from palestra.launch.cli import main
from palestra.launch.hardware import hardware_of
from palestra.model.anatomy import Anatomy
from palestra.model.dissect import dissect
from palestra.train.speed import build

ROOT = Path(__file__).parents[3]
REPORT = ROOT / "recipes/intellect-3"


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """Of the report's model, in a process of its own as the command does it."""
    wish = planning.Wish(recipe=REPORT / "rl.toml", overrides=[])
    model, origin = planning._model_of(load(wish.recipe).config.model, wish)
    assert origin == str(REPORT / "GLM-4.5-Air.config.json")
    with planning._in_directory(model) as readable:
        return planning.dissected(readable)


@pytest.fixture
def without_torch(monkeypatch, anatomy):
    monkeypatch.setattr(planning, "dissected", lambda model: anatomy)


def planned(name: str, *overrides: str) -> planning.Planned:
    return planning.plan(planning.Wish(recipe=REPORT / name, overrides=list(overrides), mean_tokens=24_000))


@pytest.mark.slow
@pytest.mark.usefixtures("without_torch")
def test_the_report_fits_on_its_machines_and_the_plan_says_what_would_not():
    rl = planned("rl.toml")
    assert (rl.num_nodes, rl.budget.fits) == (16, True)
    would_not = [change.settings for change in rl.changes if not change.budget.fits]
    assert {"recompute": "none"} in would_not
    assert {"shard": 16, "replicate": 8} in would_not
    for stage in ("sft-1.toml", "sft-2.toml"):
        assert (planned(stage).num_nodes, planned(stage).budget.fits) == (64, True)


@pytest.mark.usefixtures("without_torch")
def test_what_does_not_fit_is_said_with_what_would_help(capsys):
    arguments = ["plan", str(REPORT / "rl.toml"), "train.recompute=none", "train.offload_activations=false"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "enough would be train.recompute=full" in said
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["layout"]["nodes"] == 16
    full = next(change for change in told["changes"] if change["settings"] == {"recompute": "full"})
    assert full["frees_bytes"] == told["device_bytes"] - full["device_bytes"] > 0


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["train.shard=24", "train.expert_parallel=24"],
            "the model's 128 experts; set it to 8, which divides the 24 ranks",
        ),
        (["train.shard=1", "train.context_parallel=64"], "the model's 96 attention heads.* set it to 48 or 96"),
    ],
)
def test_a_layout_that_does_not_divide_a_model_of_the_hub_is_refused(overrides, says):
    """Its config.json lies beside the recipe."""
    with pytest.raises(UserError, match=says):
        planned("rl.toml", *overrides)
    planned("rl.toml", "train.shard=32", "train.expert_parallel=32")


@pytest.mark.usefixtures("without_torch")
def test_copies_for_an_engine_on_the_same_gpu_are_planned(anatomy):
    one = [f"{name}=1" for name in ("train.shard", "train.replicate", "engine.replicas", "engine.tensor_parallel")]
    for settings, itemsize in ((["sync.kind=ipc"], 2), (["sync.kind=ipc", "engine.dtype=float32"], 4)):
        told = dict(planned("rl.toml", *one, *settings).budget.parts)
        assert told["copies for engines"] == 2 * itemsize * anatomy.parameters
    assert "copies for engines" not in dict(planned("rl.toml", *one).budget.parts)


@pytest.mark.usefixtures("without_torch")
def test_unknown_hardware_is_refused():
    with pytest.raises(UserError, match="A100, H100, H200, B200, cpu"):
        planning.plan(planning.Wish(recipe=REPORT / "rl.toml", overrides=[], gpu="Z80"))


def test_a_config_that_is_not_there_or_no_json_is_the_users_mistake():
    for file, says in ((Path("nowhere"), "--config nowhere"), (REPORT / "rl.toml", r"rl\.toml is not JSON")):
        with pytest.raises(UserError, match=says):
            planning.plan(planning.Wish(recipe=REPORT / "rl.toml", overrides=[], model_config=file))


# --- against what is measured


def planned_bytes(anatomy: Anatomy, tokens: int, **settings) -> int:
    """Without what a process has before its model."""
    train = Train(max_pack_tokens=tokens, **settings)
    device = hardware_of("cpu", cpu_memory_bytes=1 << 40, threads=1, ranks=1)
    budget = budget_of(train, anatomy, device, Work(tokens=2 * tokens, document_tokens=tokens))
    return budget.device_bytes - device.reserved_bytes


@pytest.mark.slow
def test_planned_bytes_are_those_of_a_trainer_here(monkeypatch):
    """Of 42 M parameters, over two packs and two steps: by then everything is there that ever is."""
    tokens = 128
    monkeypatch.setattr(bench, "build", lambda fields, directory, threads: build(fields, directory))
    wish = bench.Wish(model="small", tokens=tokens, documents=2, packs=2, steps=1, overrides=["model.dtype=float32"])
    measured = bench.measure(wish)["peak_bytes"]
    anatomy = dissect(AutoConfig.for_model(**SHAPES["small"]), torch.float32)
    assert planned_bytes(anatomy, tokens) == pytest.approx(measured, rel=0.1)
    assert planned_bytes(anatomy, tokens, optimizer="muon") != pytest.approx(measured, rel=0.1)  # 4 bytes less of each


@pytest.mark.slow
def test_planned_bytes_of_adapters_are_those_of_a_trainer_here(monkeypatch):
    """Most of it is frozen weights and activations, which grow with the tokens."""
    tokens, rank = 128, 64
    monkeypatch.setattr(bench, "build", lambda fields, directory, threads: build(fields, directory))
    overrides = ["model.dtype=float32", f"model.lora.rank={rank}"]
    wish = bench.Wish(model="small", tokens=tokens, documents=2, packs=2, steps=1, overrides=overrides)
    measured = bench.measure(wish)["peak_bytes"]
    config = AutoConfig.for_model(**SHAPES["small"])
    anatomy = dissect(config, torch.float32, Lora(rank=rank))
    print(measured, planned_bytes(anatomy, tokens), planned_bytes(dissect(config, torch.float32), tokens))
    assert planned_bytes(anatomy, tokens) == pytest.approx(measured, rel=0.1)
    assert planned_bytes(dissect(config, torch.float32), tokens) > 1.5 * measured  # the control: all of it trained


def test_a_recipe_is_planned_as_it_is(anatomy):
    assert isinstance(load(REPORT / "rl.toml").config, RunConfig)
    assert anatomy.architecture == "Glm4MoeForCausalLM"
