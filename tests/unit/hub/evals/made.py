"""Evaluations for tests, and archives that are wrong in one way."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from palestra.core.records import Ending, RolloutRecord, Task
from palestra.hub.evals.archive import ROLLOUTS, SETTINGS, pack
from palestra.hub.evals.told import Evaluation


def told(**changes: Any) -> Evaluation:
    known = {
        "name": "first",
        "environment": "reverse-text",
        "environment_version": "0.1.0",
        "palestra": "0.1.0",
        "model": "backwards",
        "served": "endpoint",
        "endpoint": "http://127.0.0.1:8000/v1",
        "split": "test",
        "num_tasks": 3,
        "rollouts_per_task": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 64,
        "seed": 0,
    }
    return Evaluation.model_validate(known | changes)


def record(number: int, reward: float, *, rollouts_per_task: int = 2, **changes: Any) -> RolloutRecord:
    word = f"word{number // rollouts_per_task}"
    made = RolloutRecord(
        rollout_id=number,
        environment="reverse-text",
        task=Task(key=f"task {number // rollouts_per_task}", prompt=word, answer=word[::-1]),
        ending=Ending.OK,
        reward=reward,
        rewards={"reversed": reward},
        messages=[{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1] if reward else word}],
        num_turns=1,
        num_tokens=4,
        num_prompt_tokens=10,
    )
    return msgspec.structs.replace(made, **changes)


def records(rewards: str = "110100") -> list[RolloutRecord]:
    return [record(number, float(reward)) for number, reward in enumerate(rewards)]


def archive(to: Path, *, rewards: str = "110100", **changes: Any) -> Path:
    pack(told(**changes), records(rewards), to)
    return to


def spoiled(
    to: Path,
    *,
    settings: Callable[[dict], Any] = lambda settings: settings,
    lines: Callable[[list[dict]], Any] = lambda rows: rows,
    files: dict[str, bytes] | None = None,
) -> Path:
    """An archive with something changed in it by hand."""
    rows = lines([msgspec.to_builtins(one) for one in records()])
    text = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    said = settings(json.loads(told().model_dump_json()))
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in (files or {SETTINGS: json.dumps(said).encode(), ROLLOUTS: text}).items():
            file.writestr(name, data)
    return to
