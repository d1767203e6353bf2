"""What a file of rollouts says, as columns: one row per rollout, some 60 bytes, with where in the file it stands.

Legend: R rollouts of one file, in the order of its lines.

A part is immutable. It is made from the whole lines of one file; a last line without its end is waited for.
"""

import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from palestra.core.records import Ending, Span

ENDINGS = tuple(ending.value for ending in Ending)
COLUMNS: dict[str, str] = {
    "offset": "<i8",
    "size": "<u4",
    "rollout_id": "<i8",
    "task": "<u8",  # `task_code` of its key
    "reward": "<f8",
    "wall_s": "<f8",
    "tokens": "<i4",
    "version": "<i4",  # the oldest that sampled a token of it; -1: nothing in it was sampled
    "turns": "<i4",
    "environment": "<u2",
    "error": "<u2",
    "ending": "|u1",
}
_MOST_ERRORS = 4000  # different ones of one part; what is beyond shares the last
_ERROR_CHARS = 120
_EDGE_BYTES = 4096
_CHUNK_BYTES = 8 << 20


class _Task(Struct):
    key: str = ""


class _Sample(Struct):
    spans: tuple[Span, ...] = ()


class _Seat(Struct):
    samples: tuple[_Sample, ...] = ()


class _Row(Struct):
    """The fields of a RolloutRecord that are columns; the others are skipped, not parsed."""

    rollout_id: int
    environment: str
    task: _Task
    ending: str
    reward: float = 0.0
    seats: tuple[_Seat, ...] = ()
    num_turns: int = 0
    num_tokens: int = 0
    error: str = ""
    wall_s: float = 0.0


_decode = msgspec.json.Decoder(_Row).decode


class Source(Struct, frozen=True, kw_only=True):
    """A file of rollouts as it was read: its first `num_bytes`, whole lines, and what tells it from others."""

    name: str  # without .jsonl
    size: int
    mtime_ns: int
    num_bytes: int
    edges: int  # checksum of the first and the last of these bytes


class Header(Struct, frozen=True, kw_only=True):
    source: Source
    num_rows: int
    environments: tuple[str, ...]
    errors: tuple[str, ...]  # the first is "": none
    num_unreadable: int = 0  # lines that are no rollout


class Held(NamedTuple):
    """Where in a mapped file a part is."""

    data: mmap.mmap
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Part:
    """One file's columns, each [R]: in memory, or in a file that the kernel brings in where it is looked at."""

    header: Header
    columns: dict[str, np.ndarray]
    held: Held | None = None
    cache: dict[Any, Any] = field(default_factory=dict)  # what was computed from the columns

    @property
    def name(self) -> str:
        return self.header.source.name

    @property
    def num_rows(self) -> int:
        return self.header.num_rows

    @property
    def is_training(self) -> bool:
        return self.name.startswith("step-")

    @property
    def step(self) -> int:
        """Of training: the step that took the rollouts; of an evaluation: the version that was measured."""
        return place(self.name)[0]

    def relax(self) -> None:
        """Give back the memory of what was looked at: a look at every part of a long run must not gather them all."""
        if self.held is not None:
            begin = self.held.begin // mmap.PAGESIZE * mmap.PAGESIZE
            self.held.data.madvise(mmap.MADV_DONTNEED, begin, self.held.end - begin)

    def code(self, names: str, text: str) -> int | None:
        """Which number stands for `text` in the column; None: no row has it."""
        known: tuple[str, ...] = getattr(self.header, names)
        return known.index(text) if text in known else None


def place(name: str) -> tuple[int, bool, str]:
    """Where a file stands among those of its run: by version, evaluations before the step that follows."""
    digits = name.rpartition("-")[2].removeprefix("v")
    return int(digits) if digits.isdigit() else 0, name.startswith("step-"), name


def task_code(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def edges_of(path: Path, num_bytes: int) -> int:
    """A checksum that changes where a file was written anew instead of going on."""
    with path.open("rb") as file:
        first = file.read(min(_EDGE_BYTES, num_bytes))
        file.seek(max(num_bytes - _EDGE_BYTES, 0))
        return zlib.crc32(file.read(min(_EDGE_BYTES, num_bytes)), zlib.crc32(first))


def goes_on(path: Path, known: Part | None, size: int) -> bool:
    """Whether the file is what the part was made of, and more."""
    if known is None or size < known.header.source.num_bytes:
        return False
    return edges_of(path, known.header.source.num_bytes) == known.header.source.edges


def read_part(path: Path, known: Part | None = None) -> Part:
    """Of the lines that are whole now. Those that `known` has are not read again. Errors: OSError."""
    stat = path.stat()
    rows = _Rows(known if goes_on(path, known, stat.st_size) else None)
    for line in _lines(path, rows.end):
        rows.add(line)
    source = Source(
        name=path.name.removesuffix(".jsonl"),
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        num_bytes=rows.end,
        edges=edges_of(path, rows.end),
    )
    return rows.part(source)


def _lines(path: Path, begin: int) -> Iterator[bytes]:
    """Whole ones, with their ends."""
    with path.open("rb") as file:
        file.seek(begin)
        rest = b""
        while chunk := file.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line + b"\n"


class _Rows:
    """Gathers rows behind those of a part."""

    def __init__(self, known: Part | None):
        self._known = known
        self.end = known.header.source.num_bytes if known else 0
        self._environments = list(known.header.environments) if known else []
        self._errors = list(known.header.errors) if known else [""]
        self._num_unreadable = known.header.num_unreadable if known else 0
        self._rows: list[tuple] = []
        self._codes: dict[str, int] = {}

    def add(self, line: bytes) -> None:
        begin, self.end = self.end, self.end + len(line)
        try:
            row = _decode(line)
        except msgspec.DecodeError:
            self._num_unreadable += bool(line.strip())
            return
        versions = [span.version for seat in row.seats for sample in seat.samples for span in sample.spans]
        key = row.task.key
        if (code := self._codes.get(key)) is None:
            code = self._codes[key] = task_code(key)
        self._rows.append(
            (
                begin,
                len(line),
                row.rollout_id,
                code,
                row.reward,
                row.wall_s,
                row.num_tokens,
                min(versions, default=-1),
                row.num_turns,
                _number(self._environments, row.environment),
                self._error(row.error) if row.error else 0,
                ENDINGS.index(row.ending) if row.ending in ENDINGS else len(ENDINGS),
            )
        )

    def _error(self, text: str) -> int:
        short = first_line(text)
        return _number(self._errors, short if len(self._errors) < _MOST_ERRORS or short in self._errors else "others")

    def part(self, source: Source) -> Part:
        listed = list(zip(*self._rows, strict=True)) or [()] * len(COLUMNS)
        columns = {
            name: np.array(values, np.dtype(dtype))
            for (name, dtype), values in zip(COLUMNS.items(), listed, strict=True)
        }
        if self._known:
            columns = {name: np.concatenate([self._known.columns[name], column]) for name, column in columns.items()}
        header = Header(
            source=source,
            num_rows=len(columns["offset"]),
            environments=tuple(self._environments),
            errors=tuple(self._errors),
            num_unreadable=self._num_unreadable,
        )
        return Part(header, columns)


def first_line(error: str) -> str:
    """What an error is called in lists: its first line, not too long; never empty."""
    return (error.strip().splitlines() or ["?"])[0][:_ERROR_CHARS]


def _number(known: list[str], text: str) -> int:
    if text not in known:
        known.append(text)
    return known.index(text)
