"""What a curriculum begins with: an evaluation's results, a JSON line per rollout or per task."""

from pathlib import Path

import msgspec
from msgspec import Struct

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.orchestrate.curriculum import Result, result_of


class _Task(Struct, frozen=True):
    key: str


class _Line(Struct, frozen=True):
    """A rollout as `results.jsonl` and `rollouts/eval-*.jsonl` have it, or {"key", "rewards"}: the part that counts."""

    key: str = ""
    rewards: list[float] | dict[str, float] = []
    task: _Task | None = None
    ending: Ending | None = None
    reward: float = 0.0


_decode = msgspec.json.Decoder(_Line).decode


def read_seeds(path: Path, solved_at: float | None) -> dict[str, Result]:
    """Results by task key; invalid rollouts are not counted. Errors: UserError naming the line."""
    rewards: dict[str, list[float]] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    key, of_line = _read_line(line, path, number)
                    rewards.setdefault(key, []).extend(of_line)
    except OSError as error:
        raise UserError(f"env.curriculum.seed_from={path} cannot be read: {error.strerror}; give a file") from error
    seeds = {key: result_of(values, solved_at) for key, values in rewards.items() if values}
    if not seeds:
        raise UserError(f"env.curriculum.seed_from={path} has no rewards; give results.jsonl of an evaluation")
    return seeds


def _read_line(line: bytes, path: Path, number: int) -> tuple[str, list[float]]:
    try:
        read = _decode(line)
    except msgspec.DecodeError as error:
        raise UserError(f"{path}:{number} is no line of results: {error}".replace("`", "")) from error
    if read.task is not None and read.ending is not None and read.task.key:
        return read.task.key, [] if read.ending == Ending.INVALID else [read.reward]
    if read.key and isinstance(read.rewards, list):
        return read.key, read.rewards
    raise UserError(
        f"{path}:{number} is neither a rollout of an evaluation (task.key, ending, reward) nor "
        '{"key": ..., "rewards": [...]}; env.curriculum.seed_from takes a line per rollout or per task'
    )
