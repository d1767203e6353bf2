"""Rows of supervised data, wherever they lie: JSONL, Parquet, a Hugging Face data set on disk or on the hub."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.config.schema import SftSource
from palestra.core.errors import UserError

_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # what `save_to_disk` leaves behind


@dataclass(frozen=True)
class RawRow:
    """One row and where it came from: `file:line`, or `file` and the row's number."""

    origin: str
    fields: dict[str, Any]


def read_rows(source: SftSource) -> Iterator[RawRow]:
    """All rows once, in their order. Errors: UserError naming file and line."""
    if source.file is None:
        yield from _read_dataset(source)
    elif source.file.suffix == ".parquet":
        yield from _read_parquet(source.file)
    else:
        yield from _read_jsonl(source.file)


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    try:
        file = path.open("rb")  # what is no UTF-8 is told with its line
    except OSError as error:
        raise UserError(f"data.sources: {path} cannot be read: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise UserError(f"{path}:{number}: a row is an object with `messages`, or `prompt` and `completion`")
            yield RawRow(f"{path}:{number}", fields)


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}, row {number}", fields)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data.sources: {path} cannot be read: {error}") from error


def _read_dataset(source: SftSource) -> Iterator[RawRow]:
    import datasets

    path = Path(source.path)
    try:
        if path.is_dir() and any((path / name).exists() for name in _SAVED):
            loaded: Any = datasets.load_from_disk(source.path)
            dataset = loaded[source.split] if isinstance(loaded, dict) else loaded
        else:
            dataset = datasets.load_dataset(source.path, split=source.split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"data.sources: {source.path} (split {source.split!r}) cannot be loaded: {error}; give a .jsonl or "
            ".parquet file, a directory made by save_to_disk, or a data set's name on the hub"
        ) from error
    for number, fields in enumerate(dataset, start=1):
        yield RawRow(f"{source.path} ({source.split}), row {number}", dict(fields))


def endless(source: SftSource, *, shuffle_rows: int, seed: int) -> Iterator[RawRow]:
    """The rows again and again, each epoch in another order. Errors: UserError for a source without rows."""
    epoch = 0
    while True:
        num = 0
        for row in _shuffled(read_rows(source), shuffle_rows, random.Random(f"{seed}/{source.path}/{epoch}")):
            num += 1
            yield row
        if not num:
            raise UserError(f"data.sources: {source.path} (split {source.split!r}) has no rows")
        epoch += 1


def _shuffled(rows: Iterator[RawRow], size: int, rng: random.Random) -> Iterator[RawRow]:
    """Through a buffer of `size` rows; 0 keeps the order."""
    if not size:
        yield from rows
        return
    buffer: list[RawRow] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        index = rng.randrange(size)
        buffer[index], row = row, buffer[index]
        yield row
    rng.shuffle(buffer)
    yield from buffer
