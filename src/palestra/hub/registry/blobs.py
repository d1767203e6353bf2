"""Contents, found by their SHA-256. A small interface; a directory is one implementation of it."""

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import BinaryIO, Protocol

from palestra.core.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class MissingBlobError(UserError):
    """No content of this name."""


class Blobs(Protocol):
    """Thread-safe, and safe among processes: content never changes under its name.

    Errors of all: OSError, if the store fails. ValueError, for a name that is no SHA-256 in small hexadecimal digits.
    """

    def put(self, file: Path, sha256: str) -> None:
        """Keep the content of `file`, which is consumed or left. On return it is durable. Idempotent."""
        ...

    def open(self, sha256: str) -> BinaryIO:
        """To read and to seek in. Errors: MissingBlobError."""
        ...

    def exists(self, sha256: str) -> bool: ...

    def delete(self, sha256: str, *, before: float = inf) -> None:
        """Nothing happens if there is none, or if it was stored at `before` or later."""
        ...

    def names(self) -> Iterator[tuple[str, float]]:
        """Every SHA-256 kept, with the time it was stored: for sweeping what nobody names."""
        ...


@dataclass(frozen=True)
class Received:
    """A stream that was written to a file of its own."""

    file: Path
    size: int
    sha256: str


class TooLargeError(UserError):
    """A stream longer than its bound."""


class Directory:
    """`root/ab/abcd...`. What is put must be on the same file system: it is moved there."""

    def __init__(self, root: Path):
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def put(self, file: Path, sha256: str) -> None:
        place = self._place(sha256)
        if place.exists():
            os.utime(place)  # young again: no sweep takes it before it is named
            return
        if not place.parent.exists():
            place.parent.mkdir(exist_ok=True)
            _sync(self._root)
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.chmod(0o644)
        os.utime(file)
        file.replace(place)
        _sync(place.parent)

    def open(self, sha256: str) -> BinaryIO:
        try:
            return self._place(sha256).open("rb")
        except FileNotFoundError:
            raise MissingBlobError(f"there is no content {sha256}") from None

    def exists(self, sha256: str) -> bool:
        return self._place(sha256).exists()

    def delete(self, sha256: str, *, before: float = inf) -> None:
        place = self._place(sha256)
        try:
            if place.stat().st_mtime < before:
                place.unlink()
        except FileNotFoundError:
            pass  # gone already

    def names(self) -> Iterator[tuple[str, float]]:
        for folder in sorted(self._root.glob("[0-9a-f][0-9a-f]")):
            for file in folder.iterdir():
                if _SHA256.match(file.name):
                    try:
                        yield file.name, file.stat().st_mtime
                    except FileNotFoundError:  # deleted meanwhile
                        continue

    def _place(self, sha256: str) -> Path:
        if not _SHA256.match(sha256):
            raise ValueError(f"{sha256!r} is no SHA-256")
        return self._root / sha256[:2] / sha256


def _sync(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# --- what arrives


class Incoming:
    """A file that grows with what arrives, hashed on the way. After the block it is gone, if it was not put."""

    def __init__(self, directory: Path, max_bytes: int):
        self._max_bytes, self._hash, self.size = max_bytes, hashlib.sha256(), 0
        self._file = tempfile.NamedTemporaryFile(dir=directory, prefix="upload-", delete=False)  # noqa: SIM115

    def write(self, piece: bytes) -> None:
        """Errors: TooLargeError."""
        self.size += len(piece)
        if self.size > self._max_bytes:
            raise TooLargeError(f"more than {self._max_bytes} bytes, which is the most that is taken")
        self._hash.update(piece)
        self._file.write(piece)

    def received(self) -> Received:
        self._file.flush()
        return Received(Path(self._file.name), self.size, self._hash.hexdigest())

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


@contextmanager
def received(pieces: Iterable[bytes], directory: Path, max_bytes: int) -> Iterator[Received]:
    """Write a whole stream to a file for as long as the block lasts. Errors: TooLargeError."""
    with Incoming(directory, max_bytes) as incoming:
        for piece in pieces:
            incoming.write(piece)
        yield incoming.received()


def put_bytes(blobs: Blobs, content: bytes, directory: Path) -> str:
    """Its SHA-256; durable on return."""
    with received([content], directory, len(content)) as one:
        blobs.put(one.file, one.sha256)
        return one.sha256


def sweep(blobs: Blobs, named: Callable[[], set[str]], *, older_than_s: float) -> int:
    """Delete what nobody names and is old enough that no push is about to name it; how many.

    `named` is asked after the blobs were listed. Who puts a blob again makes it young, and looks for it once more when
    it is named.
    """
    limit = time.time() - older_than_s
    old = [sha256 for sha256, stored in blobs.names() if stored < limit]
    orphans = set(old) - named() if old else set()
    for sha256 in orphans:
        blobs.delete(sha256, before=limit)
    return len(orphans)


def sweep_incoming(directory: Path, *, older_than_s: float) -> int:
    """Delete what a process that was killed left half-written; how many."""
    limit, num = time.time() - older_than_s, 0
    for file in directory.iterdir():
        try:
            if file.is_file() and file.stat().st_mtime < limit:
                file.unlink(missing_ok=True)
                num += 1
        except FileNotFoundError:
            continue
    return num
