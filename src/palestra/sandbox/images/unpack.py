"""Archives that anybody may have written, unpacked into one directory and nowhere else.

A name is looked up as it would be with that directory as the root of the file system: links lead within it, and what a
link names absolutely begins at its top. Nothing is ever written through a link or into a file that is there already.
Owners are those who unpack; a file may be read by everybody, and run by everybody if by anybody; there are no devices,
pipes, sockets, and no set-user-ID bits.
"""

import os
import shutil
import stat
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from palestra.core.errors import UserError

_CHUNK = 2**20
_MOST_HEADER = 2**20
_MOST_LINKS, _MOST_DEPTH = 40, 256
_WHITEOUT, _OPAQUE, _AUFS = ".wh.", ".wh..wh..opq", ".wh..wh."


class Bytes(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Bounds:
    """Of all layers together. `most_bytes` counts the archives' own bytes too, as they are when decompressed."""

    most_bytes: int = 32 * 2**30
    most_entries: int = 2_000_000


class Forward:
    """What `tarfile` reads of a stream: onwards, in pieces of bounded size, and within bounds.

    Errors: UserError.
    """

    def __init__(self, source: Bytes, what: str, most_bytes: int):
        self._source, self._what, self._most, self._at = source, what, most_bytes, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._at:
            raise UserError(f"{self._what}: its entries lead backwards; make it anew")
        while self._at < offset and self.read(min(offset - self._at, _CHUNK)):
            pass
        return self._at

    def read(self, size: int = _CHUNK) -> bytes:
        if size < 0 or size > max(_MOST_HEADER, _CHUNK):
            raise UserError(f"{self._what}: a header of {size} bytes; at most {_MOST_HEADER} are read")
        pieces, left = [], size
        while left > 0 and (piece := self._source.read(left)):
            pieces.append(piece)
            left -= len(piece)
        self._at += size - left
        if self._at > self._most:
            raise UserError(f"{self._what}: more than {self._most} bytes when unpacked, as much as an image may have")
        return b"".join(pieces)


class Tree:
    """The directory `top`, which nobody else changes meanwhile. `what` names the image in errors, which are UserError.

    `follows_links`: a directory of an archive whose name is a link already stays that link, as for packages of a system
    whose /bin is a link; else it takes the link's place, as in layers.
    """

    def __init__(self, top: Path, what: str, *, bounds: Bounds | None = None, follows_links: bool = False):
        self._top, self._what, self._bounds = top, what, bounds or Bounds()
        self._follows_links = follows_links
        self._num_entries, self._num_bytes, self._num_written = 0, 0, 0
        self._added: set[str] = set()

    @property
    def num_bytes(self) -> int:
        """Of the archives that were unpacked so far."""
        return self._num_bytes

    def add(self, archive: Bytes, *, is_layer: bool = False) -> None:
        """A tar archive, over what is there. `is_layer`: its whiteouts take away what the layers before had.

        Errors: UserError, for one that is torn, too large, or leads out.
        """
        self._added = set()
        source = Forward(archive, self._what, self._bounds.most_bytes - self._num_bytes)
        try:
            with tarfile.TarFile(fileobj=source, mode="r") as tar:  # type: ignore[arg-type]
                while (entry := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - else all names of a large archive would be kept
                    self._count()
                    self._put(tar, entry, is_layer)
            while source.read():
                pass
        except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"{self._what}: the archive is torn, or none: {error}; make it anew") from error
        except OSError as error:
            raise UserError(f"{self._what}: cannot be unpacked: {error}") from error
        self._num_bytes += source.tell()

    def _count(self) -> None:
        self._num_entries += 1
        if self._num_entries > self._bounds.most_entries:
            raise UserError(f"{self._what}: more than {self._bounds.most_entries} files, as many as an image may have")

    def _put(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, is_layer: bool) -> None:
        parts = self._parts(entry.name)
        if not parts:
            return  # the top itself
        *above, name = parts
        if is_layer and name.startswith(_WHITEOUT):
            self._white_out(above, name)
            return
        if not (entry.isdir() or entry.issym() or entry.islnk() or entry.isreg()):
            return  # a device, a pipe
        place = os.path.join(self._directory(above), name)
        if entry.isdir():
            self._put_directory(place)
        else:
            self._take_away(place)
            if entry.issym():
                os.symlink(entry.linkname, place)
            elif entry.islnk():
                self._put_hard_link(entry, place)
            else:
                self._put_file(tar, entry, place)
        self._added.add(place)

    def _put_directory(self, place: str) -> None:
        if os.path.islink(place) and self._follows_links:
            if not os.path.isdir(resolved(self._top, Path(place).relative_to(self._top).parts, self._what)):
                raise UserError(f"{self._what}: {place} is a link to no directory, and should be one")
            return
        if os.path.islink(place) or not os.path.isdir(place):
            self._take_away(place)
            os.mkdir(place, 0o755)

    def _put_file(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, place: str) -> None:
        if entry.size > self._bounds.most_bytes:
            raise UserError(f"{self._what}: {entry.name} has {entry.size} bytes; at most {self._bounds.most_bytes}")
        self._num_written += entry.size  # of a sparse one far more than the archive has of it
        if self._num_written > self._bounds.most_bytes:
            raise UserError(f"{self._what}: more than {self._bounds.most_bytes} bytes when unpacked")
        content = tar.extractfile(entry)
        mode = 0o755 if entry.mode & 0o111 else 0o644
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            if content is not None:
                shutil.copyfileobj(content, file, _CHUNK // 4)
            os.fchmod(fd, mode)
        os.utime(place, (entry.mtime, entry.mtime), follow_symlinks=False)

    def _put_hard_link(self, entry: tarfile.TarInfo, place: str) -> None:
        *above, name = self._parts(entry.linkname) or [""]
        target = os.path.join(self._directory(above), name)
        if not name or not os.path.lexists(target) or not stat.S_ISREG(os.lstat(target).st_mode):
            raise UserError(f"{self._what}: {entry.name} is a link to {entry.linkname}, which is no file in it")
        os.link(target, place, follow_symlinks=False)

    # --- names

    def _parts(self, name: str) -> list[str]:
        """Errors: UserError, for a name that leads out."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\0" in name or len(parts) > _MOST_DEPTH:
            raise UserError(f"{self._what}: it has the name {name[:200]!r}, which leads out of the image")
        return parts

    def _directory(self, parts: list[str]) -> str:
        """Where a directory lies, made if it is not there."""
        place = resolved(self._top, tuple(parts), self._what)
        if not os.path.isdir(place):
            self._make(place)
        return place

    def _make(self, place: str) -> None:
        try:
            os.makedirs(place, 0o755, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self._what}: {place} is no directory, and has files below it") from None

    # --- what is taken away

    def _white_out(self, above: list[str], name: str) -> None:
        directory = resolved(self._top, tuple(above), self._what)
        if name == _OPAQUE:
            if os.path.isdir(directory):
                for other in os.listdir(directory):
                    self._clear(os.path.join(directory, other))
            return
        hidden = name.removeprefix(_WHITEOUT)
        if name.startswith(_AUFS):
            return  # how one file system keeps its accounts
        if hidden in ("", ".", ".."):
            raise UserError(f"{self._what}: it has the whiteout {name!r}, which names nothing")
        self._clear(os.path.join(directory, hidden))

    def _clear(self, place: str) -> bool:
        """What layers before put there; whether nothing is left."""
        if not os.path.lexists(place):
            return True
        is_own = place in self._added
        if os.path.islink(place) or not os.path.isdir(place):
            if not is_own:
                os.unlink(place)
            return not is_own
        gone = [self._clear(os.path.join(place, name)) for name in os.listdir(place)]
        if all(gone) and not is_own:
            os.rmdir(place)
            return True
        return False

    def _take_away(self, place: str) -> None:
        if os.path.isdir(place) and not os.path.islink(place):
            shutil.rmtree(place)
        elif os.path.lexists(place):
            os.unlink(place)


def resolved(top: Path, parts: tuple[str, ...], what: str) -> str:
    """Where a name leads with `top` for a root: all links followed, and none leads out. Errors: UserError, for circles.

    For directories that nobody changes meanwhile.
    """
    pending, done, num_links = list(reversed(parts)), list[str](), 0
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            done = done[:-1]
            continue
        place = os.path.join(top, *done, part)
        if not os.path.islink(place):
            done.append(part)
            continue
        num_links += 1
        if num_links > _MOST_LINKS:
            raise UserError(f"{what}: its links lead round in circles, at {place}")
        link = os.readlink(place)
        done = [] if link.startswith("/") else done
        pending += reversed(link.split("/"))
    return os.path.join(top, *done)
