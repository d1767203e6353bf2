"""Files that are there as a whole or not at all, and files that grow by whole pieces."""

import errno
import os
from pathlib import Path

from palestra.core.errors import InfrastructureError


def write_atomically(path: Path, data: bytes) -> Path:
    """Write beside `path`, flush to disk, rename: readers see the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InfrastructureError(
            f"could not write {path} ({len(data)} bytes): {error}; free space and resume"
        ) from error
    return path


class AppendFile:
    """Grows by whole pieces; each is with the operating system when `append` returns, so it survives `kill -9`."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)

    def append(self, piece: bytes) -> int:
        """All of it or nothing: what comes later must not stand behind a torn piece. Returns where it begins.
        Errors: InfrastructureError, if the disk is full or fails."""
        begin = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(piece) != len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(begin)
            raise InfrastructureError(
                f"could not append to {self.path} ({len(piece)} bytes): {error.strerror}; free space and resume"
            ) from error
        return begin

    def truncate(self, end: int) -> None:
        """Take back what was appended from `end` on."""
        self._file.truncate(end)

    def close(self) -> None:
        self._file.close()
