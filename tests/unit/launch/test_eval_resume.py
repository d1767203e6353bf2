"""`palestra eval ... --resume DIR`: the command as it was is accepted, what would be another evaluation is refused."""

import shlex
from pathlib import Path

import pytest

from palestra.config import RunConfig
from palestra.launch import evaluation, start
from palestra.launch.cli import _parse, _wish, main
from palestra.wire.rundir import RunDir

ENDPOINT = "--base-url http://127.0.0.1:1/v1 --model m"
COMMAND = f"""eval reverse-text tool-calc {ENDPOINT} -n 7 -r 2 --temperature 0.5 --max-tokens 64 --split train
--args '{{"digits": [1, 2]}}' --seat user=http://127.0.0.1:2/v1,guest --concurrency 4 --seed 3 --sandbox unsafe"""


@pytest.fixture
def going_on(monkeypatch) -> list[RunConfig]:
    """Configs of evaluations that would go on: none does."""
    seen: list[RunConfig] = []

    def carry_out(config: RunConfig, *, resume: bool) -> None:
        assert resume
        start.begin(config, resume=True)
        seen.append(config)

    monkeypatch.setattr(evaluation, "_carry_out", carry_out)
    monkeypatch.setattr(evaluation, "show", lambda run_dir, *, as_json: None)
    return seen


def held(directory: Path, command: str) -> str:
    """An evaluation that this command began; what resumes it."""
    config = evaluation.config_of(_wish(_parse([*shlex.split(command), "--output", str(directory)])))
    start.write_config(RunDir(directory), config)
    return f"--resume {directory}"


@pytest.mark.parametrize("more", ["", "--concurrency 64", "-n 7", "--output {}"])
def test_the_command_as_it_was_goes_on(tmp_path, going_on, more):
    resumed = held(tmp_path / "out", COMMAND)
    assert main(shlex.split(f"{COMMAND} {resumed} {more.format(tmp_path / 'out')}")) == 0
    [config] = going_on
    at_once = 64 if "64" in more else 4
    assert config.eval.endpoint is not None
    assert (config.engine.max_in_flight, config.eval.endpoint.max_in_flight) == (at_once, at_once)


@pytest.mark.parametrize("checkpoint", ["model", "./model"])
def test_more_at_once_of_a_checkpoint_too_and_from_another_directory(tmp_path, monkeypatch, going_on, checkpoint):
    monkeypatch.setattr(evaluation, "require_model", lambda path, *, field: None)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    resumed = held(tmp_path / "out", "eval reverse-text --checkpoint model")
    assert main(shlex.split(f"eval reverse-text --checkpoint {checkpoint} --concurrency 64 {resumed}")) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(shlex.split(f"eval {resumed} engine.max_in_flight=8")) == 0
    assert [config.engine.max_in_flight for config in going_on] == [64, 8]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("reverse-text", "environments reverse-text, tool-calc, and reverse-text is asked"),
        ("reverse-text tool-calc arithmetic", "and arithmetic, reverse-text, tool-calc is asked"),
        ("-n 8", "num tasks 7, and 8 is asked"),
        ("-r 4", "rollouts per task 2, and 4 is asked"),
        ("--temperature 1", "temperature 0.5, and 1.0 is asked"),
        ("--max-tokens 65", "max tokens 64, and 65 is asked"),
        ("--split test", 'split "train", and "test" is asked'),
        ("--args '{}'", 'args {"digits": [1, 2]}, and {} is asked'),
        ("--seat user=http://127.0.0.1:2/v1,other", '"other"'),
        ("--seed 4", "seed 3, and 4 is asked"),
        ("--sandbox docker", 'sandbox "unsafe", and "docker" is asked'),
        ("--model n", 'model "m", and "n" is asked'),
        ("--base-url http://127.0.0.1:9/v1", '"http://127.0.0.1:9/v1" is asked'),
        ("--key-env KEY", 'key env null, and "KEY" is asked'),
        ("--checkpoint model", "checkpoint null, and "),
        ("--output elsewhere", "elsewhere"),
        ("sampling.max_tokens=65", "sampling.max_tokens: 64 in the run, 65 now"),
    ],
)
def test_another_evaluation_is_refused_with_what_is_held_and_what_is_asked(tmp_path, going_on, capsys, more, words):
    resumed = held(tmp_path / "out", COMMAND)
    assert main(shlex.split(f"eval {more} {resumed}")) == 2
    said = capsys.readouterr().err
    assert words in said
    assert str(tmp_path / "out") in said
    assert going_on == []
