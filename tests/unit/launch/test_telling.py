"""A directory of an evaluation as what is pushed of it."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from palestra.core.errors import UserError
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.launch.evaluation import Wish, config_of
from palestra.launch.telling import told_by


def evaluation(place: Path, *, num: int = 4, overrides: tuple[str, ...] = (), **changes: Any) -> Path:
    known = {
        "environments": ["reverse-text"],
        "seats": {},
        "model": "m",
        "base_url": "http://me:secret@host/v1?key=secret",
        "key_env": "THE_KEY",
        "checkpoint": None,
        "num_tasks": 2,
        "rollouts_per_task": 2,
        "temperature": 0.5,
        "max_tokens": 99,
        "split": "test",
        "args": {"max_letters": 4},
        "concurrency": 7,
        "seed": 5,
        "output": place,
        "sandbox": None,
        "overrides": list(overrides),
    }
    config = config_of(Wish(**(known | changes)))
    place.mkdir()
    (place / "config.json").write_text(config.model_dump_json())
    told = {"palestra": "0.1.0", "environments": {"reverse-text": {"version": "0.1.0"}}}
    (place / "metadata.json").write_text(json.dumps(told))
    lines = [
        RolloutRecord(rollout_id=n, environment="reverse-text", task=Task(key=str(n // 2)), ending=Ending.OK)
        for n in range(num)
    ]
    (place / "results.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return place


def test_all_that_it_takes_to_play_it_again_is_told_and_no_secret(tmp_path: Path):
    (one,) = told_by(evaluation(tmp_path / "out"))
    told = one.told
    assert (told.environment, told.environment_version, told.palestra) == ("reverse-text", "0.1.0", "0.1.0")
    assert (told.model, told.served, told.endpoint) == ("m", "endpoint", "http://host/v1")
    assert (told.num_tasks, told.rollouts_per_task, told.temperature, told.max_tokens) == (2, 2, 0.5, 99)
    assert (told.seed, told.split, told.args, told.overrides) == (5, "test", {"max_letters": 4}, ())
    assert "secret" not in told.model_dump_json()
    assert "THE_KEY" not in told.model_dump_json()
    assert len(one.records) == 4


def test_what_was_set_otherwise_is_in_the_command_or_said_in_words(tmp_path: Path):
    words = ("env.retries=5", "env.workers=3", "sandbox.memory_mb=64", "eval.sets.0.top_p=0.9")
    (one,) = told_by(evaluation(tmp_path / "out", overrides=words))
    assert set(one.told.overrides) == {"env.retries=5", "sandbox.memory_mb=64", "eval.sets.0.top_p=0.9"}
    assert one.told.missing == ("The command leaves out env.workers=3.",)


def test_a_model_in_a_directory_goes_by_its_name(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    changes = {"model": None, "base_url": None, "key_env": None, "checkpoint": tmp_path / "mine"}
    (one,) = told_by(evaluation(tmp_path / "out", overrides=("engine.max_model_len=512",), **changes))
    assert (one.told.model, one.told.served, one.told.endpoint) == ("mine", "checkpoint", "")
    assert one.told.overrides == ("engine.max_model_len=512",)
    assert "was a directory" in one.told.missing[0]
    assert str(tmp_path) not in one.told.model_dump_json()


def test_what_is_not_finished_is_not_pushed(tmp_path: Path):
    with pytest.raises(UserError, match="has 3 of 4 rollouts of reverse-text; finish it first"):
        list(told_by(evaluation(tmp_path / "out", num=3)))
    with pytest.raises(UserError, match=r"has no results\.jsonl"):
        list(told_by(tmp_path))
