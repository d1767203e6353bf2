"""`palestra env`: a new package works as it is; a report tells machines and people the same."""

import asyncio
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from palestra.config import load
from palestra.core.errors import UserError
from palestra.env.load import make_environment
from palestra.env.play import score
from palestra.launch import env
from palestra.launch.cli import _parse, _wish, main
from palestra.launch.evaluation import config_of

pytestmark = pytest.mark.slow

FAULTY = Path(__file__).parents[1] / "env" / "faulty.py"


def check(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "palestra.launch.cli", "env", "check", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=directory, timeout=120)


def test_a_new_package_is_green_and_so_is_its_test(tmp_path, capsys):
    env.new("word-game", tmp_path / "word_game", install=False)
    source = tmp_path / "word_game" / "src"
    assert "palestra env check word-game" in capsys.readouterr().out
    checked = check(tmp_path, f"{source}/palestra_word_game/__init__.py:WordGame", "--json")
    [report] = json.loads(checked.stdout)
    assert (checked.returncode, report["failed"], report["skipped"]) == (0, 0, 0), report
    assert report["passed"] == len(report["cases"]) > 10
    assert load(tmp_path / "word_game" / "recipe.toml").config.env.mix[0].id == "word-game"
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "word_game")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        timeout=120,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "3 passed" in tested.stdout
    formed = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", str(tmp_path / "word_game")]
    assert subprocess.run(formed, timeout=60).returncode == 0


def test_a_new_package_is_installed_and_what_pip_says_is_told(tmp_path, monkeypatch, capsys):
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-2:] == ["-e", str(tmp_path / "word_game")]
        return subprocess.CompletedProcess(command, code, "", "no disk\n")

    monkeypatch.setattr(env.subprocess, "run", pip)
    code = 0
    env.new("word-game", tmp_path / "word_game", install=True)
    assert "pip install" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "word_game")
    code = 1
    with pytest.raises(UserError, match="is written, but pip could not install it: no disk"):
        env.new("word-game", tmp_path / "word_game", install=True)


def test_a_faulty_environment_ends_the_command_with_2_and_says_what_is_wrong(tmp_path):
    checked = check(tmp_path, f"{FAULTY}:WrongGold", "-n", "3")
    assert checked.returncode == 2
    assert "13 passed, 1 failed, 0 skipped" in checked.stdout
    assert "gold scores 1" in checked.stdout
    assert "scores 0.5" in checked.stdout


def test_an_environment_that_cannot_list_its_tasks_is_told_so(tmp_path):
    checked = check(tmp_path, f"{FAULTY}:Unlistable")
    assert checked.returncode == 2
    assert "cannot list its tasks: ValueError: the second task is missing" in " ".join(checked.stdout.split())
    assert "bug" not in checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("name", "words"), [("Wordle", "no name of an environment"), ("reverse-text", "installed already")]
)
def test_a_name_that_cannot_be_is_refused(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        env.new(name, tmp_path / "new", install=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["task", "random", "iterator", "environment", "rollout", "reward", "xml", "none", "true", "exception"]
)
def test_a_name_that_means_something_already_makes_a_package_that_works(tmp_path, name):
    env.new(name, tmp_path / "new", install=False)
    [file] = (tmp_path / "new" / "src").glob("*/__init__.py")
    project = tomllib.loads((tmp_path / "new" / "pyproject.toml").read_text())
    place = project["project"]["entry-points"]["palestra.environments"][name]
    environment = make_environment(f"{file}:{place.rpartition(':')[2]}", split="train", seed=0, args={})
    task = next(iter(environment.tasks()))
    assert task.gold is not None
    assert asyncio.run(score(environment, task, [str(task.gold)])).reward == 1.0
    compile((tmp_path / "new" / "tests" / "test_environment.py").read_text(), "test_environment.py", "exec")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine exists"):
        env.new("word-game", tmp_path / "mine", install=False)


def test_an_unknown_environment_is_named_before_anything_is_checked(tmp_path):
    checked = check(tmp_path, "reverse-txt")
    assert checked.returncode == 2
    assert "did you mean 'reverse-text'" in checked.stderr
    assert check(tmp_path).returncode == 2


def test_programs_of_an_environment_run_where_the_command_line_says(tmp_path):
    words = (f"{FAULTY}:Programs", "-n", "2", "--json")
    for chosen in ((), ("--sandbox", "unsafe"), ("--sandbox", "process")):
        checked = check(tmp_path, *words, *chosen)
        [report] = json.loads(checked.stdout)
        assert (checked.returncode, report["failed"], report["skipped"]) == (0, 0, 0), report
    unknown = check(tmp_path, *words, "--sandbox", "unsfe")
    assert (unknown.returncode, "no sandbox 'unsfe'; there are local, " in unknown.stderr) == (2, True)


def test_known_answers_are_played_where_the_command_line_says(tmp_path):
    gold = [f"{FAULTY}:Programs", "--gold", "-n", "3", "--to", str(tmp_path / "rows.jsonl")]
    assert main(["generate", *gold, "--sandbox", "process", "sandbox.min_isolation=namespaces"]) == 2
    assert main(["generate", *gold, "--sandbox", "unsfe"]) == 2
    assert main(["generate", *gold, "--sandbox", "unsafe"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == ["echo 1", "echo 3", "echo 5"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("WrongGold", "none of its first 3 tasks has a gold that earns 1\n"),
        ("Unlistable", "Unlistable' cannot list its tasks: ValueError: the second task is missing\n"),
        ("NoGold", "none of its 3 tasks of the split 'train' has a gold to play\n"),
    ],
)
def test_why_no_known_answer_earned_anything_is_told(tmp_path, capsys, name, words):
    gold = [f"{FAULTY}:{name}", "--gold", "-n", "3", "--to", str(tmp_path / "rows.jsonl")]
    assert main(["generate", *gold]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_evaluation_has_the_sandbox_that_the_command_line_names():
    wish = _wish(_parse(["eval", "retail", "--base-url", "http://h/v1", "--model", "m", "--sandbox", "unsafe"]))
    assert config_of(wish).env.sandbox == "unsafe"
