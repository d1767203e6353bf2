"""The images of this machine: read-only directories, named by what is in them, that all sandboxes share.

One is built beside its place and renamed there: it is whole or not there. Two processes that build the same at once
both do, and the second throws its own away. Whoever uses one holds a shared lock on its directory until its process
ends; what is built or removed is locked alone. `asked` remembers by which name an image was built for a request whose
answer may change, such as `pip:requests`.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from palestra.core.errors import UserError

_ABOUT = "about.json"
_TRIES = 8
_held: dict[Path, int] = {}  # by directory, until this process ends


@dataclass(frozen=True)
class Image:
    """`directory` is what programs see. `environment` is what its maker wants set."""

    directory: Path
    environment: dict[str, str] = field(default_factory=dict)


Fill = Callable[[Path], dict[str, str]]
"""Fills an empty directory; returns the environment that belongs to it."""


def default_place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "palestra" / "images"


class Cache:
    """At `place`. Errors of all: UserError, if that cannot be written."""

    def __init__(self, place: Path | None = None):
        self.place = place or default_place()
        try:
            self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"no images can be kept in {self.place}: {error}; set XDG_CACHE_HOME") from error

    def built(self, name: str, fill: Fill) -> Image:
        """The image of that name, which `fill` makes if it is not there yet. Errors: those of `fill`, too."""
        for _ in range(_TRIES):
            found = self.find(name)
            if found is not None:
                return found
            with self.building() as work:
                top = work / "root"
                top.mkdir(mode=0o755)
                self.keep(work, name, fill(top))
        raise UserError(f"image {name} is removed from {self.place} as often as it is built; what prunes it?")

    def find(self, name: str) -> Image | None:
        """From now on it is in use."""
        directory = self.place / name
        if directory not in _held:
            fd = _locked(directory, fcntl.LOCK_SH)
            if fd is None:
                return None
            _held[directory] = fd
        os.utime(directory)
        try:
            about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            os.close(_held.pop(directory))
            return None
        return Image(directory / "root", dict(about["environment"]))

    @contextmanager
    def building(self) -> Iterator[Path]:
        """An empty directory beside the images, gone afterwards unless it was kept."""
        self.sweep()
        work, fd = self._temporary()
        try:
            yield work
        except OSError as error:
            raise UserError(f"no image can be built in {self.place}: {error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.close(fd)

    def _temporary(self) -> tuple[Path, int]:
        while True:
            work = Path(tempfile.mkdtemp(prefix=".building-", dir=self.place))
            fd = _locked(work, fcntl.LOCK_EX)
            if fd is not None:  # else somebody has swept it meanwhile
                return work, fd

    def keep(self, work: Path, name: str, environment: dict[str, str]) -> None:
        """`work`, whose `root` is filled, becomes the image, unless there is one of that name."""
        about = {"environment": environment, "num_bytes": held_bytes(work)}
        (work / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        try:
            os.rename(work, self.place / name)
        except OSError:
            if not (self.place / name).is_dir():
                raise

    # --- requests whose answer may change

    def asked(self, request: str) -> Image | None:
        """What was built for it before, if it is still there."""
        try:
            name = self._note(request).read_text(encoding="utf-8")
        except OSError:
            return None
        return self.find(name) if name and "/" not in name else None

    def remember(self, request: str, name: str) -> None:
        note = self._note(request)
        beside = note.with_suffix(f".{os.getpid()}")
        beside.write_text(name, encoding="utf-8")
        os.replace(beside, note)

    def _note(self, request: str) -> Path:
        return self.place / f"asked-{hashed(request)}"

    # --- what is not needed any more

    def prune(self, max_bytes: int) -> list[str]:
        """The names of images that were removed, so that at most `max_bytes` are left: those that were not used for
        longest first, and none that a process uses.
        """
        self.sweep()
        images = [d for d in self.place.iterdir() if d.is_dir() and not d.name.startswith(".")]
        sizes = {directory: _size(directory) for directory in images}
        removed, total = [], sum(sizes.values())
        for directory in sorted(images, key=_last_used):
            if total <= max_bytes:
                break
            if self._removed(directory):
                removed.append(directory.name)
                total -= sizes[directory]
        for note in self.place.glob("asked-*"):
            if not (self.place / (note.read_text(encoding="utf-8") or "-")).is_dir():
                note.unlink(missing_ok=True)
        return removed

    def sweep(self) -> None:
        """What processes that were killed left half built, or half removed."""
        for directory in self.place.glob(".*-*"):
            self._removed(directory)

    def _removed(self, directory: Path) -> bool:
        fd = _locked(directory, fcntl.LOCK_EX)
        if fd is None:
            return False
        try:
            doomed = directory
            if not directory.name.startswith("."):
                doomed = self.place / f".doomed-{directory.name}-{os.getpid()}"
                os.rename(directory, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            return True
        except OSError:
            return False
        finally:
            os.close(fd)


def _locked(directory: Path, kind: int) -> int | None:
    """Its descriptor, locked; None if it is not there, or somebody holds it otherwise."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.lstat(directory)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _last_used(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0


def _size(directory: Path) -> int:
    try:
        return int(json.loads((directory / _ABOUT).read_text(encoding="utf-8"))["num_bytes"])
    except (OSError, ValueError, KeyError):
        return 0


def held_bytes(top: Path) -> int:
    """On the disk, below a directory; a file with several names is counted once."""
    seen, total = set[tuple[int, int]](), 0
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            about = os.lstat(os.path.join(directory, name))
            if stat.S_ISDIR(about.st_mode) or (about.st_dev, about.st_ino) not in seen:
                seen.add((about.st_dev, about.st_ino))
                total += about.st_blocks * 512
    return total


def hashed(*parts: str) -> str:
    """A name for what these say."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
