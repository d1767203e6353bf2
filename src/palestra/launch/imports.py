"""`palestra eval import`: evaluations of the `verifiers` library as ours, to be shown and compared.

A row there has `prompt` and `completion` (chat messages), `reward`, the answers of its reward functions as columns,
and times in milliseconds; a directory has `metadata.json` beside `results.jsonl`.
"""

import json
import math
from pathlib import Path
from typing import Any

from palestra.algo.scores import scores
from palestra.core.errors import UserError
from palestra.core.files import write_atomically
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.wire.results import ResultsFile
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import RunLog

_NO_METRICS = {"id", "example_id", "reward", "generation_ms", "scoring_ms", "total_ms", "num_turns"}


def import_all(directories: list[Path], to: Path) -> RunDir:
    """Their rollouts in one evaluation of ours; a set for each environment.

    Errors: UserError, if a directory has no results, a line of them cannot be read, or `to` is there already.
    """
    if to.exists():
        raise UserError(f"{to} exists; give another directory")
    by_set: dict[str, list[RolloutRecord]] = {}
    sources: dict[str, Any] = {}
    for directory in directories:
        metadata = _metadata(directory)
        name = str(metadata.get("env_id") or metadata.get("env") or directory.resolve().parent.name.partition("--")[0])
        known = by_set.setdefault(name, [])
        known += [_record(row, name, len(known) + number) for number, row in enumerate(_rows(directory))]
        sources.setdefault(name, []).append({"directory": str(directory), **metadata})
    sets = {name: _scored(name, records) for name, records in by_set.items()}
    run = RunDir(to)
    results, log = ResultsFile(run), RunLog(run)
    for records in by_set.values():
        results.append(records)
    model = next((str(one["model"]) for of_set in sources.values() for one in of_set if "model" in one), "")
    log.summary({"name": run.name, "model": model, "endpoint": None, "sets": sets, "wall_s": 0.0})
    write_atomically(to / "metadata.json", json.dumps({"imported": sources}, indent=2, default=str).encode() + b"\n")
    for owned in (results, log):
        owned.close()
    return run


def _scored(name: str, records: list[RolloutRecord]) -> dict[str, Any]:
    try:
        return scores(records)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _metadata(directory: Path) -> dict[str, Any]:
    path = directory / "metadata.json"
    if not (directory / "results.jsonl").exists():
        raise UserError(f"{directory} has no results.jsonl; give a directory such as outputs/evals/NAME--MODEL/ID")
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error


def _rows(directory: Path) -> list[dict[str, Any]]:
    path, rows = directory / "results.jsonl", []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["prompt"], row["completion"], row["reward"] = row["prompt"], row["completion"], float(row["reward"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number} is no row with prompt, completion and reward: {error!r}") from error
        rows.append(row)
    return rows


def _record(row: dict[str, Any], name: str, number: int) -> RolloutRecord:
    """A rollout that said nothing at all was never played, whatever reward it was given: it is invalid here."""
    prompt, completion = _messages(row["prompt"], "user"), _messages(row["completion"], "assistant")
    error = row.get("error") or ("" if completion else "no completion was recorded")
    error = error or ("" if math.isfinite(row["reward"]) else f"its reward is {row['reward']}")
    key = row.get("example_id", row.get("id", number))
    numbers = {name: value for name, value in row.items() if _is_number(value) and name not in _NO_METRICS}
    nested = {name: value for name, value in (row.get("metrics") or {}).items() if _is_number(value)}
    task = Task(key=str(key), prompt=prompt, answer=row.get("answer"), info={"verifiers": row.get("info") or {}})
    return RolloutRecord(
        rollout_id=number,
        environment=name,
        task=task,
        ending=Ending.INVALID if error else Ending.TRUNCATED if row.get("is_truncated") else Ending.OK,
        reward=0.0 if error else row["reward"],
        rewards={} if error else {"reward": row["reward"]},
        metrics={name: float(value) for name, value in (numbers | nested).items()},
        messages=[*prompt, *completion],
        num_turns=sum(message.get("role") == "assistant" for message in completion),
        num_tokens=int((row.get("token_usage") or {}).get("output_tokens", 0)),
        num_prompt_tokens=int((row.get("token_usage") or {}).get("input_tokens", 0)),
        error=str(error)[:2000],
        wall_s=float(row.get("total_ms") or 0.0) / 1000,
    )


def _messages(given: Any, role: str) -> list[dict[str, Any]]:
    """Text of a completion model is one message."""
    if isinstance(given, str):
        return [{"role": role, "content": given}] if given else []
    return [message for message in given or () if isinstance(message, dict)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
