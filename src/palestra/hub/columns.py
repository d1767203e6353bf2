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
_ENDING_CODES = {text: code for code, text in enumerate(ENDINGS)}
_MOST_ERRORS = 4000  # different ones of one part; what is beyond shares the last
_ERROR_CHARS = 120
_EDGE_BYTES = 4096
_CHUNK_BYTES = 8 << 20


class _Task(Struct, gc=False):
    key: str = ""


class _Sample(Struct, gc=False):
    spans: tuple[Span, ...] = ()


class _Seat(Struct, gc=False):
    samples: tuple[_Sample, ...] = ()


class _Row(Struct, gc=False):
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


_decoder = msgspec.json.Decoder(_Row)


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
    for block in _blocks(path, rows.end):
        rows.add(block)
    source = Source(
        name=path.name.removesuffix(".jsonl"),
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        num_bytes=rows.end,
        edges=edges_of(path, rows.end),
    )
    return rows.part(source)


def _blocks(path: Path, begin: int) -> Iterator[bytes]:
    """Whole lines with their ends, as many at once as a chunk has."""
    with path.open("rb") as file:
        file.seek(begin)
        pieces: list[bytes] = []  # of a line whose end was not read yet
        while chunk := file.read(_CHUNK_BYTES):
            end = chunk.rfind(b"\n") + 1
            if end:
                yield b"".join([*pieces, chunk[:end]])
                pieces = []
            pieces.append(chunk[end:])


def _decode(block: bytes, begins: np.ndarray, ends: np.ndarray) -> list[_Row | None]:
    """One row a line, None for a line that is no rollout. All at once where that tells the same, else line by line."""
    if _has_a_rollout_a_line(block, begins, ends):
        try:
            rows = _decoder.decode_lines(block)
            if len(rows) == len(ends):
                return list(rows)
        except msgspec.DecodeError:
            pass  # a line is no rollout
    return [_decode_line(block[begin:end]) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]


def _has_a_rollout_a_line(block: bytes, begins: np.ndarray, ends: np.ndarray) -> bool:
    """Where all of it is rollouts, and as many as lines. Each line begins and ends with a brace: a rollout over two
    lines would have a brace, the end of the line and a brace inside, which is no JSON."""
    data = np.frombuffer(block, np.uint8)
    return bool((data[begins] == ord("{")).all() and (data[ends - 2] == ord("}")).all())


def _decode_line(line: bytes) -> _Row | None:
    try:
        return _decoder.decode(line)
    except msgspec.DecodeError:
        return None


class _Rows:
    """Gathers rows behind those of a part, a block of lines after the other."""

    def __init__(self, known: Part | None):
        self._known = known
        self.end = known.header.source.num_bytes if known else 0
        self._environments = _Names(known.header.environments if known else ())
        self._errors = _Names(known.header.errors if known else ("",))
        self._num_unreadable = known.header.num_unreadable if known else 0
        self._columns: list[dict[str, np.ndarray]] = [known.columns] if known else []
        self._codes: dict[str, int] = {}

    def add(self, block: bytes) -> None:
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
        begins = np.concatenate([[0], ends[:-1]])
        found = _decode(block, begins, ends)
        is_row = np.array([row is not None for row in found])
        if not is_row.all():
            bad = [block[begins[i] : ends[i]] for i in np.flatnonzero(~is_row)]
            self._num_unreadable += sum(bool(line.strip()) for line in bad)
        values = self._values([row for row in found if row is not None])
        values |= {"offset": self.end + begins[is_row], "size": (ends - begins)[is_row]}
        self._columns.append({name: np.array(values[name], np.dtype(dtype)) for name, dtype in COLUMNS.items()})
        self.end += len(block)

    def _values(self, rows: list[_Row]) -> dict[str, Any]:
        """What the rollouts themselves say."""
        return {
            "rollout_id": [row.rollout_id for row in rows],
            "task": [self._code(row.task.key) for row in rows],
            "reward": [row.reward for row in rows],
            "wall_s": [row.wall_s for row in rows],
            "tokens": [row.num_tokens for row in rows],
            "version": [_oldest(row.seats) for row in rows],
            "turns": [row.num_turns for row in rows],
            "environment": [self._environments.number(row.environment) for row in rows],
            "error": [self._error(row.error) if row.error else 0 for row in rows],
            "ending": [_ENDING_CODES.get(row.ending, len(ENDINGS)) for row in rows],
        }

    def _code(self, key: str) -> int:
        if (code := self._codes.get(key)) is None:
            code = self._codes[key] = task_code(key)
        return code

    def _error(self, text: str) -> int:
        short = first_line(text)
        return self._errors.number(short if len(self._errors) < _MOST_ERRORS or short in self._errors else "others")

    def part(self, source: Source) -> Part:
        empty = {name: np.zeros(0, np.dtype(dtype)) for name, dtype in COLUMNS.items()}
        columns = {name: np.concatenate([empty[name], *(one[name] for one in self._columns)]) for name in COLUMNS}
        header = Header(
            source=source,
            num_rows=len(columns["offset"]),
            environments=tuple(self._environments),
            errors=tuple(self._errors),
            num_unreadable=self._num_unreadable,
        )
        return Part(header, columns)


class _Names(dict[str, int]):
    """Texts by the number that stands for them in a column."""

    def __init__(self, known: tuple[str, ...]):
        super().__init__((text, number) for number, text in enumerate(known))

    def number(self, text: str) -> int:
        return self.setdefault(text, len(self))


def _oldest(seats: tuple[_Seat, ...]) -> int:
    return min([span.version for seat in seats for sample in seat.samples for span in sample.spans], default=-1)


def first_line(error: str) -> str:
    """What an error is called in lists: its first line, not too long; never empty."""
    return (error.strip().splitlines() or ["?"])[0][:_ERROR_CHARS]
