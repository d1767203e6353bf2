"""The journal: events in the order they were applied, in segments; a checkpoint's snapshot starts a new segment.

State after a kill = newest complete checkpoint's snapshot + every event in its segment and later ones.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from palestra.core.files import write_atomically
from palestra.orchestrate.state import Event, LoopState
from palestra.wire.framelog import FrameLog, read_frames

_encode = msgspec.msgpack.Encoder().encode
_decode_event = msgspec.msgpack.Decoder(Event).decode


class Snapshot(Struct, frozen=True, kw_only=True):
    """A state, and the first segment of the journal that is not in it."""

    state: LoopState
    segment: int


_decode_snapshot = msgspec.msgpack.Decoder(Snapshot).decode


class Journal:
    """Owns the state: an event is on its way to the disk before it is applied."""

    def __init__(self, directory: Path, state: LoopState, segment: int):
        self.directory, self.state, self.segment = directory, state, segment
        self._log = FrameLog(_segment_path(directory, segment))

    def record(self, event: Event) -> None:
        """Errors: whatever applying it raises; then it is not in the journal, which can still be recovered."""
        began = self._log.append(_encode(event))
        try:
            self.state.apply(event)
        except BaseException:
            self._log.truncate(began)
            raise

    def snapshot(self, path: Path) -> Path:
        """Write the state to `path` and begin a new segment."""
        self._log.close()
        self.segment += 1
        self._log = FrameLog(_segment_path(self.directory, self.segment))
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_atomically(path, _encode(Snapshot(state=self.state, segment=self.segment)))

    def close(self) -> None:
        self._log.close()


def recover(directory: Path, snapshot: Path | None) -> Journal:
    """The journal as the last attempt left it; `snapshot` is the chosen checkpoint's, None for the run's start."""
    if snapshot is None:
        state, segment = LoopState(), 0
    else:
        known = _decode_snapshot(snapshot.read_bytes())
        state, segment = known.state, known.segment
    for event in events(directory, since=segment):
        state.apply(event)
    return Journal(directory, state, max([segment, *_segments(directory)]))


def events(directory: Path, *, since: int = 0) -> Iterator[Event]:
    """In the order they were applied, from segment `since` on."""
    for number in _segments(directory):
        if number >= since:
            for frame in read_frames(_segment_path(directory, number)):
                yield _decode_event(frame)


def _segments(directory: Path) -> list[int]:
    return sorted(int(path.stem) for path in directory.glob("*.frames"))


def _segment_path(directory: Path, segment: int) -> Path:
    return directory / f"{segment:06d}.frames"
