"""The index of a run's rollouts: a part per file, kept beside the run in `view.index` and brought up to the files.

The file is an append-only sequence of frames (length, checksum, header, columns); of two frames of one source the later
one counts. It is a cache: what is torn is cut off and made again, and without the right to write it is kept in memory
alone. Viewers take turns by a lock on the file; one that finds it taken writes nothing. The run never touches it.
"""

import fcntl
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.hub.columns import COLUMNS, Header, Held, Part, place, read_part
from palestra.wire.rundir import RunDir

NAME = "view.index"
_MAGIC = b"palestra-view-1\n"
_HEAD = 16  # payload's length, its checksum, the header's length with and without what pads it
_GROWTH = 1.25  # a part that goes on growing is written again when it is so much larger
_SLACK_BYTES = 1 << 20
_MAP_BYTES = 16 << 20  # of frames that were written: then their parts are read from the file instead of held


class Progress(Struct, frozen=True, kw_only=True):
    """Bytes of rollouts that are in the index, and those that there are."""

    done_bytes: int
    total_bytes: int

    @property
    def share(self) -> float:
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0


class RunIndex:
    """The parts of one run. `update` may be called from any thread; `parts` is always whole."""

    def __init__(self, run: RunDir):
        self._run, self._path = run, run.path / NAME
        self._lock = threading.Lock()
        self._by_name: dict[str, Part] = {}
        self._written: dict[str, int] = {}  # rows of each part that the file has
        self._end = 0  # of the frames that were read
        self._inode = 0
        self._fresh: list[tuple[int, int]] = []  # frames that were written, and whose parts are held in memory
        self.parts: tuple[Part, ...] = ()
        self.generation = 0  # rises with every change
        self.progress = Progress(done_bytes=0, total_bytes=1)  # nobody has looked yet

    def update(self, *, should_stop: threading.Event | None = None) -> bool:
        """Bring it up to the files; returns whether anything changed. One thread at a time does it, others wait."""
        with self._lock:  # held only while files are read, which ends
            return self._update(should_stop or threading.Event())

    def _update(self, should_stop: threading.Event) -> bool:
        before = self.generation
        sources = self._sources()
        self._forget({path.name.removesuffix(".jsonl") for path, _ in sources})
        if self._stale(sources):
            with self._locked() as file:
                self._read_frames(file)
                self._bring_up(sources, file, should_stop)
        self._note_progress(sources)
        return self.generation != before

    def _sources(self) -> list[tuple[Path, os.stat_result]]:
        """Files of rollouts, the latest first: what a run does now is what people look at."""
        found = []
        for path in [*self._run.rollouts.glob("*.jsonl"), self._run.results]:
            try:
                found.append((path, path.stat()))
            except OSError:  # it went away
                continue
        return sorted(found, key=lambda pair: place(pair[0].stem), reverse=True)

    def _stale(self, sources: list[tuple[Path, os.stat_result]]) -> list[tuple[Path, os.stat_result]]:
        return [(path, stat) for path, stat in sources if not _is_of(self._by_name.get(path.stem), stat)]

    def _bring_up(self, sources: list[tuple[Path, os.stat_result]], file: int | None, stop: threading.Event) -> None:
        for path, _ in self._stale(sources):
            if stop.is_set():
                return
            try:
                part = read_part(path, self._by_name.get(path.stem))
            except OSError:  # it went away; the next update forgets it
                continue
            self._take(part)
            self._note_progress(sources)
            if file is not None and part.num_rows > _GROWTH * self._written.get(part.name, -1):
                try:
                    self._append(file, part)
                except OSError:  # a full disk: the index stays in memory
                    os.ftruncate(file, self._end)
                    file = None

    def _take(self, *parts: Part) -> None:
        self._by_name |= {part.name: part for part in parts}
        self.parts = tuple(sorted(self._by_name.values(), key=lambda part: place(part.name)))
        self.generation += 1

    def _forget(self, kept: set[str]) -> None:
        if gone := self._by_name.keys() - kept:
            self._by_name = {name: part for name, part in self._by_name.items() if name not in gone}
            self._take()

    def _note_progress(self, sources: list[tuple[Path, os.stat_result]]) -> None:
        done = sum(part.header.source.size for part in self._by_name.values())
        self.progress = Progress(done_bytes=done, total_bytes=max(sum(stat.st_size for _, stat in sources), done))

    # --- the file

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The file, ours alone; None where it cannot be written, or another viewer is at it."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield None
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            yield None
            return
        try:
            yield file
        except OSError:  # a full disk: the index stays in memory
            os.ftruncate(file, self._end)
        finally:
            os.close(file)

    def _read_frames(self, file: int | None) -> None:
        """What the file has and we have not; its torn end is cut off."""
        if file is None:
            return
        stat = os.fstat(file)
        if stat.st_ino != self._inode:
            self._inode, self._end, self._written, self._fresh = stat.st_ino, 0, {}, []
        if stat.st_size < len(_MAGIC) or os.pread(file, len(_MAGIC), 0) != _MAGIC:
            os.ftruncate(file, 0)
            os.pwrite(file, _MAGIC, 0)
            self._end, self._written, self._fresh = len(_MAGIC), {}, []
            return
        self._end = max(self._end, len(_MAGIC))
        frames = list(_checked(file, self._end, stat.st_size))
        if frames:
            found = self._map(file, frames)
            self._written |= {part.name: part.num_rows for part in found}
            self._end = frames[-1][1]
        if self._end < stat.st_size:
            os.ftruncate(file, self._end)
        self._compact(file)

    def _append(self, file: int, part: Part) -> None:
        frame = _frame(part)
        if os.pwrite(file, frame, self._end) != len(frame):
            raise OSError("the disk is full")
        self._fresh.append((self._end, self._end + len(frame)))
        self._end += len(frame)
        self._written[part.name] = part.num_rows
        if self._end - self._fresh[0][0] >= _MAP_BYTES:
            self._map(file, self._fresh)
            self._fresh = []

    def _map(self, file: int, frames: list[tuple[int, int]]) -> list[Part]:
        """Take the parts of these frames, of one source the last."""
        found = _mapped(file, frames)
        self._take(*{part.name: part for part in found}.values())
        return found

    def _compact(self, file: int) -> None:
        """Half of it or more is of parts that were written again: keep the others."""
        row_bytes = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())
        if self._end > 4 * row_bytes * sum(self._written.values()) + _SLACK_BYTES:
            frames = [_frame(self._by_name[name]) for name in self._written if name in self._by_name]
            try:
                write_atomically(self._path, _MAGIC + b"".join(frames))
            except InfrastructureError:  # a full disk: it stays as long as it is
                pass


def _is_of(part: Part | None, stat: os.stat_result) -> bool:
    if part is None:
        return False
    return (part.header.source.size, part.header.source.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def _frame(part: Part) -> bytes:
    """A multiple of 8 bytes, so that columns of numbers are aligned."""
    header = msgspec.msgpack.encode(part.header)
    padded = _padded(header)
    payload = padded + b"".join(_padded(part.columns[name].tobytes()) for name in COLUMNS)
    numbers = (len(payload), zlib.crc32(payload), len(padded), len(header))
    return b"".join(number.to_bytes(4, "little") for number in numbers) + payload


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _checked(file: int, begin: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of every whole frame, up to the first that is not."""
    while begin + _HEAD <= size:
        head = os.pread(file, _HEAD, begin)
        length, checksum = (int.from_bytes(head[i : i + 4], "little") for i in (0, 4))
        end = begin + _HEAD + length
        if end > size or zlib.crc32(os.pread(file, length, begin + _HEAD)) != checksum:
            return
        yield begin, end
        begin = end


def _mapped(file: int, frames: list[tuple[int, int]]) -> list[Part]:
    """Columns are read from the file when they are asked for."""
    base = frames[0][0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    data = mmap.mmap(file, frames[-1][1] - base, access=mmap.ACCESS_READ, offset=base)
    parts = []
    for begin, end in ((begin - base, end - base) for begin, end in frames):
        start = begin + _HEAD
        padded, header_bytes = (int.from_bytes(data[begin + i : begin + i + 4], "little") for i in (8, 12))
        header = msgspec.msgpack.decode(data[start : start + header_bytes], type=Header)
        start += padded
        columns = {}
        for name, dtype in COLUMNS.items():
            columns[name] = np.frombuffer(data, dtype, header.num_rows, start)
            start += -(-columns[name].nbytes // 8) * 8
        parts.append(Part(header, columns, Held(data, begin, end)))
    return parts
