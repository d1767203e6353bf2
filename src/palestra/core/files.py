"""Files that are there as a whole or not at all."""

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
