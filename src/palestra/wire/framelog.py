"""An append-only log of frames that survives a kill at any byte: length, checksum of length and payload, payload.

A torn last frame is cut off when the log is opened for writing and ignored when it is read.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

from palestra.core.files import AppendFile

_HEAD = 8


class FrameLog:
    """Appends frames, whole or not at all."""

    def __init__(self, path: Path):
        self._file = AppendFile(path)
        self._file.truncate(sum(_HEAD + len(frame) for frame in read_frames(path)))

    def append(self, payload: bytes) -> int:
        """Returns where the frame begins. Errors: InfrastructureError, if the disk is full or fails."""
        size = len(payload).to_bytes(4, "little")
        return self._file.append(size + _checksum(size, payload) + payload)

    def truncate(self, end: int) -> None:
        """Take back what was appended from `end` on."""
        self._file.truncate(end)

    def close(self) -> None:
        self._file.close()


def read_frames(path: Path) -> Iterator[bytes]:
    """Payloads in order, up to the first torn frame; nothing for a file that does not exist."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while len(head := file.read(_HEAD)) == _HEAD:
            size, checksum = head[:4], head[4:]
            payload = file.read(int.from_bytes(size, "little"))
            if len(payload) < int.from_bytes(size, "little") or _checksum(size, payload) != checksum:
                return
            yield payload


def _checksum(size: bytes, payload: bytes) -> bytes:
    return zlib.crc32(payload, zlib.crc32(size)).to_bytes(4, "little")
