"""An append-only log of frames that survives a kill at any byte: length, checksum of length and payload, payload.

A torn last frame is cut off when the log is opened for writing and ignored when it is read.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

from palestra.core.errors import InfrastructureError

_HEAD = 8


class FrameLog:
    """Appends frames; each is handed to the operating system before `append` returns, so it survives `kill -9`."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._file.truncate(sum(_HEAD + len(frame) for frame in read_frames(path)))

    def append(self, payload: bytes) -> int:
        """All of the frame or nothing. Returns where it begins. Errors: InfrastructureError, if the disk is full or
        fails."""
        size = len(payload).to_bytes(4, "little")
        frame = size + _checksum(size, payload) + payload
        end = self._file.seek(0, 2)
        try:
            written = self._file.write(frame)
            problem = f"{written} of {len(frame)} bytes written"
        except OSError as error:
            written, problem = 0, str(error)
        if written != len(frame):
            self._file.truncate(end)  # whatever is appended later must not stand behind a torn frame
            raise InfrastructureError(f"could not append to {self.path}: {problem}; free space and resume")
        return end

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
