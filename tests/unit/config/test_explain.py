"""What settings mean: all are told, as they are, and the page in docs is the one that the command prints."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from palestra.config import RunConfig
from palestra.config.explain import Setting, described, sections, settings
from palestra.launch.cli import main

PAGE = Path(__file__).parents[3] / "docs/settings.md"
BY_PATH = {setting.path: setting for setting in settings()}


def leaves(section: Any, prefix: str = "") -> set[str]:
    """Of what a config without lists says, by the schema's own classes."""
    found = set()
    for name in type(section).model_fields:
        value = getattr(section, name)
        is_section = hasattr(value, "model_fields_set")
        found |= leaves(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}"}
    return found


def test_the_page_is_what_the_command_prints(capsys):
    assert main(["config", "explain", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "palestra config explain --markdown > docs/settings.md"


def test_every_setting_is_told_once_and_has_a_meaning():
    config = RunConfig.model_validate({"log": {"name": "run"}, "model": {"path": "somewhere"}, "eval": {"sets": []}})
    lists = {"data.sources", "env.mix", "eval.sets"}
    nothing = {"model.build", "model.lora", "algo.reference", "algo.teacher", "eval.endpoint"}  # sections that are None
    assert leaves(config) - lists - nothing <= BY_PATH.keys()
    assert len(BY_PATH) == len(list(settings()))
    assert [path for path, setting in BY_PATH.items() if not setting.meaning] == []
    assert all(sections()[setting.section] for setting in BY_PATH.values())


@pytest.mark.parametrize(
    "expected",
    [
        Setting("train", "betas", "2 numbers", "[0.9, 0.95]", "of AdamW"),
        Setting("log", "name", "text", "", "of the run: its directory within `outputs`"),
        Setting(
            "sync", "full_every", "integer ≥ 2", "16", "with difference: at least every so many publishes is whole"
        ),
        Setting("[env.mix]", "weight", "number > 0", "1.0", "share among the entries"),
        Setting("eval.endpoint", "key_env", "text", "none", "the name of the variable that holds the key"),
        Setting("env.mix.seats.NAME", "model", "text", "", "its name at that endpoint"),  # of a class above: the others
        Setting("env.mix.seats.NAME", "call_s", "number > 0", "600", "of one request"),
        Setting(
            "log",
            "to",
            'list of: "tensorboard", "wandb", "trackio"',
            "[]",
            'where metrics are told besides metrics.jsonl: "tensorboard", "wandb", "trackio"',
        ),
    ],
    ids=lambda setting: setting.path,
)
def test_what_is_told_by_hand(expected):
    assert BY_PATH[expected.path] == expected


def test_a_comment_on_the_line_before_counts_and_one_of_several_lines_is_whole():
    assert BY_PATH["sandbox.min_isolation"].meaning.startswith("None: namespaces")
    assert BY_PATH["train.balance.bias_rate"].meaning.endswith("(arXiv:2408.15664)")


def test_the_schema_is_the_models_own_but_for_descriptions():
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key != "description"}
        return [without(item) for item in value] if isinstance(value, list) else value

    assert without(described()) == without(RunConfig.model_json_schema())
    assert described() != RunConfig.model_json_schema()
    changed = copy.deepcopy(described())
    changed["$defs"]["Train"]["properties"]["lr"]["default"] = 1.0
    assert without(changed) != without(RunConfig.model_json_schema())


def test_some_are_told_and_a_slip_is_named(capsys):
    assert main(["config", "explain", "train.muon", "sync.kind", "--json"]) == 0
    told = [f"{one['section']}.{one['name']}" for one in json.loads(capsys.readouterr().out)]
    assert told == [
        *(f"train.muon.{name}" for name in ("momentum", "nesterov", "ns_steps", "scale", "lr_ratio")),
        "sync.kind",
    ]
    assert main(["config", "explain", "env.mix"]) == 0
    assert "share among the entries" in " ".join(capsys.readouterr().out.split())
    assert main(["config", "explain", "train.muno.scale"]) == 2
    assert "did you mean train.muon.scale" in capsys.readouterr().err
