"""The command line in process: exit codes, what goes to stdout and what to stderr, how soon it answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palestra.core.errors import InfrastructureError, UserError
from palestra.launch.cli import main
from palestra.launch.outcome import Interrupted, exit_code

RECIPE = """
[log]
name = "demo"
[model.build]
architecture = "Qwen3ForCausalLM"
alphabet = "abc"
config = { hidden_size = 64, num_hidden_layers = 2, num_attention_heads = 4 }
[[env.mix]]
id = "reverse-text"
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "demo.toml"
    path.write_text(RECIPE)
    return path


def test_help_answers_at_once():
    best_s = min(_cpu_seconds([sys.executable, "-m", "palestra.launch.cli", "--help"]) for _ in range(3))
    assert best_s < 0.5


def _cpu_seconds(argv: list[str]) -> float:
    """Which a busy machine does not add to."""
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def test_help_imports_nothing_that_is_slow():
    script = "import sys, palestra.launch.cli as c; c.main(['--help']); print(*sys.modules, file=sys.stderr)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr.split()
    assert not {"pydantic", "numpy", "zmq", "rich", "httpx", "torch"} & set(modules)


def test_dry_run_prints_the_plan_as_json_on_stdout(recipe: Path, capsys: pytest.CaptureFixture):
    assert main(["run", str(recipe), "engine.replicas=2", "--dry-run", "--json", "env.workers=2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    names = [process["name"] for process in plan["processes"]]
    assert names == ["model", "engine-0", "engine-1", "orchestrator", "env-0", "env-1", "trainer"]
    assert not Path("outputs").exists()


def test_dry_run_prints_a_table(recipe: Path, capsys: pytest.CaptureFixture):
    assert main(["run", str(recipe), "--dry-run"]) == 0
    assert "orchestrator  lead" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trian.steps=3"], ["trian", "did you mean 'train'?"]),
        (["train.steps=0"], ["train.steps=0", "greater than 0"]),
        (["train.steps"], ["'train.steps' is not section.field=value"]),
        (["model.build=1"], ["model.build=1"]),
        (["sampling.top_p=0.9"], ["top_p=1"]),
        (["env.mix=[]"], ["nothing to train on", "data.sources"]),
        (["engine.kv_cache_gib=100000"], ["needs about", "engine.kv_cache_gib"]),
    ],
)
def test_a_wrong_config_is_refused_with_code_2_before_anything_exists(
    recipe: Path, capsys: pytest.CaptureFixture, overrides: list[str], words: list[str]
):
    assert main(["run", str(recipe), *overrides]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(word in said.err for word in words)
    assert "Traceback" not in said.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere", "is not a directory"),
        ("models/smollm2", "palestra fetch smollm2"),
        (".", "has no config.json"),
        ("org/never-downloaded", "HF_HUB_OFFLINE"),
    ],
)
def test_a_missing_model_is_named_with_its_fix(
    recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str, words: str
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(recipe.parent / "cache"))
    recipe.write_text(f'[log]\nname = "demo"\n[model]\npath = "{path}"\n[[env.mix]]\nid = "x"\n')
    assert main(["run", str(recipe)]) == 2
    assert words in capsys.readouterr().err


def test_unknown_recipe_and_run(recipe: Path, capsys: pytest.CaptureFixture):
    assert main(["run", "nowhere.toml"]) == 2
    assert main(["runs", "show", "nowhere"]) == 2
    assert main(["runs", "ls", "nowhere"]) == 2
    assert main(["replay", "nowhere"]) == 2
    assert main(["sft", str(recipe)]) == 2
    assert "data.sources" in capsys.readouterr().err


def test_wrong_arguments_are_code_2_and_no_command_too():
    assert main(["nonsense"]) == 2
    assert main([]) == 2
    assert main(["run", "a.toml", "--nonsense"]) == 2


def test_sft_leaves_environments_out(recipe: Path, capsys: pytest.CaptureFixture):
    recipe.write_text(RECIPE + '[[data.sources]]\npath = "x.jsonl"\n')
    Path("x.jsonl").write_text("{}\n")
    assert main(["sft", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(p["name"], p["role"]) for p in plan["processes"]] == [("model", "prepare"), ("trainer", "lead")]


def test_config_show_says_where_a_value_came_from(recipe: Path, capsys: pytest.CaptureFixture):
    assert main(["config", "show", str(recipe), "--sources", "train.steps=7", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["train"]["steps"] == 7
    assert shown["sources"]["train.steps"] == "override train.steps=7"
    assert shown["sources"]["log.name"] == str(recipe)
    assert shown["sources"]["train.lr"] == "default"


def test_config_show_and_schema(recipe: Path, capsys: pytest.CaptureFixture):
    assert main(["config", "show", str(recipe)]) == 0
    assert "log.name" in capsys.readouterr().out
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("take another"), 2, "error: take another"),
        (InfrastructureError("disk"), 1, "error: disk"),
        (ZeroDivisionError("oops"), 1, "Traceback"),
        (Interrupted("go on with: x"), 130, "interrupted; go on with: x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_kind_of_end_has_its_code(capsys: pytest.CaptureFixture, error: BaseException, code: int, words: str):
    def command() -> None:
        raise error

    assert exit_code(command) == code
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert ("Traceback" in said.err) == isinstance(error, ZeroDivisionError)


SEATS = """
[env.mix.seats.user]
url = "http://127.0.0.1:1/v1"
model = "m"
key_env = "PLANTED_USER_KEY"
[[eval.sets]]
id = "doc-search"
args = { judge = { url = "http://127.0.0.1:1/v1", model = "m", key_env = "PLANTED_JUDGE_KEY" } }
"""


def test_a_key_that_is_missing_is_named_with_its_field_before_anything_starts(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    recipe.write_text(RECIPE + SEATS)
    for options in ([], ["--dry-run"]):
        assert main(["run", str(recipe), *options]) == 2
        assert "env.mix.0.seats.user.key_env=PLANTED_USER_KEY: the environment has no such" in capsys.readouterr().err
    monkeypatch.setenv("PLANTED_USER_KEY", "secret")
    monkeypatch.setenv("PLANTED_JUDGE_KEY", " ")
    assert main(["run", str(recipe), "--dry-run"]) == 2
    assert "eval.sets.0.args.judge.key_env=PLANTED_JUDGE_KEY" in capsys.readouterr().err
    monkeypatch.setenv("PLANTED_JUDGE_KEY", "secret")
    assert main(["run", str(recipe), "--dry-run"]) == 0
    assert not Path("outputs").exists()


def test_a_key_of_what_is_measured_is_missed_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "reverse-text", "--base-url", "http://127.0.0.1:1/v1", "--model", "m", "--key-env", "PLANTED_KEY"]
    assert main(words) == 2
    assert "eval.endpoint.key_env=PLANTED_KEY: the environment has no such variable" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_demonstrations_that_are_not_there_are_told_before_anything_starts(recipe: Path, capsys: pytest.CaptureFixture):
    words = ["run", str(recipe), "--dry-run", 'data.sources=[{path="gold.jsonl"}]']
    assert main(words) == 0  # nothing reads them
    assert main([*words, "data.warmup.steps=5"]) == 2
    assert "data.sources: there is no file gold.jsonl, counted from" in capsys.readouterr().err
    Path("gold.jsonl").write_text("{}\n")
    assert main([*words, "data.warmup.steps=5"]) == 0
