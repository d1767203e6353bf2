"""What is pushed: a zip of `evaluation.json` and `rollouts.jsonl`, and its reading, which trusts nothing of it.

Whoever reads it knows before it begins how much it may become: sizes, lines and their number are bounded, and what
the archive says of itself (sizes, counts, names) is compared with what is there.
"""

import errno
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
from pydantic import ValidationError

from palestra.algo.scores import task_means
from palestra.algo.standing import Standing, standing
from palestra.core.errors import UserError
from palestra.core.records import Ending, RolloutRecord, Task
from palestra.hub.evals.told import Evaluation

SETTINGS, ROLLOUTS = "evaluation.json", "rollouts.jsonl"
_DATE = (1980, 1, 1, 0, 0, 0)  # the same content is the same archive
_CHUNK = 1 << 20
_MAX_NUMBER = 1e12  # so that sums of squares are numbers, too
_MAX_KEY = 4000  # characters
_BROKEN = (  # what zipfile raises at files that are no whole archives
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, ValueError),
)
_decode = msgspec.json.Decoder(RolloutRecord).decode


@dataclass(frozen=True)
class Limits:
    archive_bytes: int = 512 << 20
    settings_bytes: int = 256 << 10
    rollouts_bytes: int = 4 << 30
    line_bytes: int = 64 << 20
    rollouts: int = 200_000


DEFAULT = Limits()


@dataclass(frozen=True)
class Checked:
    """An archive that was read to its end. `digest` is of its content: whoever pushes it twice pushes one."""

    told: Evaluation
    standing: Standing
    digest: str
    task_means: dict[str, float]  # of rollouts with a reward
    num_bytes: int  # unpacked


def pack(told: Evaluation, records: Iterable[RolloutRecord], to: Path) -> None:
    """Write an archive; its bytes follow from what it holds alone. Records are in the order of their numbers."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(_entry(SETTINGS), told.model_dump_json().encode() + b"\n")
        with file.open(_entry(ROLLOUTS), "w", force_zip64=True) as lines:
            for record in sorted(records, key=lambda record: record.rollout_id):
                lines.write(msgspec.json.encode(record) + b"\n")


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return entry


def check(path: Path, *, to: Path | None = None, limits: Limits = DEFAULT) -> Checked:
    """Read an archive; its rollouts are written to the file `to`, unpacked, where that is given.

    Errors: UserError that says what of it cannot be, and where.
    """
    if path.stat().st_size > limits.archive_bytes:
        raise UserError(f"the archive is larger than {limits.archive_bytes:,} bytes")
    try:
        with zipfile.ZipFile(path) as file:
            _require_entries(file, limits)
            digest = hashlib.sha256()
            settings = _bounded(file, SETTINGS, limits.settings_bytes)
            digest.update(len(settings).to_bytes(8, "little") + settings)
            told = _told(settings)
            with file.open(ROLLOUTS) as lines:
                return _counted(told, _lines(lines, limits), digest, to)
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        raise UserError(f"this is no archive of an evaluation: {error}") from None


def _require_entries(file: zipfile.ZipFile, limits: Limits) -> None:
    """Errors: UserError for other files, or files that say they are too large."""
    names = sorted(entry.filename for entry in file.infolist())
    if names != sorted((SETTINGS, ROLLOUTS)):
        raise UserError(f"an archive holds {SETTINGS} and {ROLLOUTS}, not {', '.join(names)[:300]}")
    for name, most in ((SETTINGS, limits.settings_bytes), (ROLLOUTS, limits.rollouts_bytes)):
        if file.getinfo(name).file_size > most:
            raise UserError(f"{name} is larger than {most:,} bytes")
        if file.getinfo(name).compress_type not in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
            raise UserError(f"{name} is compressed in a way that is not read here; use deflate")


def _bounded(file: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Whatever the archive says of its size."""
    with file.open(name) as entry:
        found = entry.read(most + 1)
    if len(found) > most:
        raise UserError(f"{name} is larger than {most:,} bytes")
    return found


def _told(settings: bytes) -> Evaluation:
    try:
        return Evaluation.model_validate_json(settings)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise UserError(f"{SETTINGS}: {found}"[:2000]) from None


def _lines(file: IO[bytes], limits: Limits) -> Iterator[bytes]:
    """Errors: UserError for one that is too long, or too much of them."""
    total = 0
    for number in range(limits.rollouts + 1):
        line = file.readline(limits.line_bytes + 1)
        if not line:
            return
        total += len(line)
        if len(line) > limits.line_bytes:
            raise UserError(f"{ROLLOUTS}:{number + 1} is longer than {limits.line_bytes:,} bytes")
        if total > limits.rollouts_bytes:
            raise UserError(f"{ROLLOUTS} is larger than {limits.rollouts_bytes:,} bytes")
        yield line
    raise UserError(f"{ROLLOUTS} has more than {limits.rollouts:,} rollouts")


def _counted(told: Evaluation, lines: Iterator[bytes], digest, to: Path | None) -> Checked:
    """Only what is counted of a rollout stays in memory."""
    light: list[RolloutRecord] = []
    keys: dict[int, str] = {}
    num_bytes = 0
    out = to.open("wb") if to is not None else None
    try:
        for number, line in enumerate(lines, start=1):
            record = _record(line, number, told)
            _require_place(record, number, told, keys)
            light.append(_light(record))
            digest.update(line)
            num_bytes += len(line)
            if out is not None:
                out.write(line if line.endswith(b"\n") else line + b"\n")
    finally:
        if out is not None:
            out.close()
    if len({record.rollout_id for record in light}) != len(light):
        raise UserError(f"{ROLLOUTS} has a rollout_id twice")
    _require_whole(light, told)
    try:
        found = standing(light)
    except ValueError as error:
        raise UserError(f"{ROLLOUTS}: {error}") from None
    return Checked(
        told=told, standing=found, digest=digest.hexdigest(), task_means=task_means(light), num_bytes=num_bytes
    )


def _record(line: bytes, number: int, told: Evaluation) -> RolloutRecord:
    """Errors: UserError for what is no rollout, or counts what cannot be counted."""
    try:
        record = _decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{ROLLOUTS}:{number} is no rollout: {str(error)[:300]}") from None
    numbers = (record.reward, *record.rewards.values(), *record.metrics.values(), record.wall_s, record.engine_s)
    if not all(abs(one) < _MAX_NUMBER for one in numbers):  # nor is any that is no number
        raise UserError(
            f"{ROLLOUTS}:{number}: its reward, or another number of it, is not finite, or beyond all bounds"
        )
    counts = (record.rollout_id, record.num_tokens, record.num_prompt_tokens, record.num_turns)
    if not all(0 <= count < 2**53 for count in counts):
        raise UserError(f"{ROLLOUTS}:{number}: a count of it is below 0, or beyond all bounds")
    if len(record.task.key) > _MAX_KEY:
        raise UserError(f"{ROLLOUTS}:{number}: the key of its task is longer than {_MAX_KEY} characters")
    if record.ending == Ending.INVALID and (record.reward or record.rewards):
        raise UserError(f"{ROLLOUTS}:{number} is invalid and has a reward: errors are never rewards")
    if record.environment != told.environment:
        raise UserError(
            f"{ROLLOUTS}:{number} is of {record.environment[:200]!r}, and the evaluation of {told.environment!r}"
        )
    return record


def _require_place(record: RolloutRecord, number: int, told: Evaluation, keys: dict[int, str]) -> None:
    """Rollout i is of task i // rollouts_per_task. Errors: UserError, where it is of another."""
    if told.imported or told.num_tasks is None or told.rollouts_per_task is None:
        return
    task = record.rollout_id // told.rollouts_per_task
    if task >= told.num_tasks:
        raise UserError(
            f"{ROLLOUTS}:{number}: rollout {record.rollout_id} is beyond {told.num_tasks} tasks x "
            f"{told.rollouts_per_task} rollouts"
        )
    if keys.setdefault(task, record.task.key) != record.task.key:
        raise UserError(f"{ROLLOUTS}:{number}: rollout {record.rollout_id} is of another task than those beside it")


def _require_whole(light: list[RolloutRecord], told: Evaluation) -> None:
    """Who leaves out what went badly measures nothing. Errors: UserError, where rollouts are missing."""
    if told.imported or told.num_tasks is None or told.rollouts_per_task is None:
        return
    wanted = told.num_tasks * told.rollouts_per_task
    if len(light) != wanted:
        raise UserError(
            f"{ROLLOUTS} has {len(light):,} rollouts, and {told.num_tasks} tasks x {told.rollouts_per_task} are "
            f"{wanted:,}; finish the evaluation by `palestra eval --resume DIR` first"
        )


def _light(record: RolloutRecord) -> RolloutRecord:
    return RolloutRecord(
        rollout_id=record.rollout_id,
        environment="",
        task=Task(key=record.task.key),
        ending=record.ending,
        reward=record.reward,
        num_turns=record.num_turns,
        num_tokens=record.num_tokens,
        num_prompt_tokens=record.num_prompt_tokens,
        error=record.error[:200],
    )
