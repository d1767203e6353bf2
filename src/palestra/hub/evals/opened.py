"""Rollouts of evaluations as files to read: unpacked beside the hub once, and found again by their content.

A cache: what it holds can be deleted at any time, and is made again from the blob.
"""

import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from palestra.hub.evals.archive import check
from palestra.hub.library import OpenRun
from palestra.hub.registry.blobs import Blobs
from palestra.wire.rundir import RunDir

_MOST_BYTES = 20 << 30  # unpacked; those that were looked at longest ago go first
_MOST_OPEN = 16
_PIECE = 1 << 20


@dataclass(frozen=True)
class Opened:
    """`run` reads its rollouts as those of a run."""

    run: OpenRun
    task_means: dict[str, float]


class Cache:
    """Thread-safe; several processes may share a directory."""

    def __init__(self, blobs: Blobs, directory: Path, *, most_bytes: int = _MOST_BYTES):
        self._blobs, self._directory, self._most_bytes = blobs, directory, most_bytes
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Opened] = OrderedDict()

    def open(self, blob_sha256: str) -> Opened:
        """Errors: UserError, if the blob is no archive; MissingBlobError."""
        place = self._directory / blob_sha256
        if not place.is_dir():
            self._unpack(blob_sha256, place)
        (place / "means.json").touch()  # it was looked at now
        with self._lock:  # held for lookups alone
            known = self._open.pop(blob_sha256, None)
            if known is None:
                means = json.loads((place / "means.json").read_bytes())
                known = Opened(OpenRun(blob_sha256, RunDir(place)), means)
            self._open[blob_sha256] = known
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        return known

    def _unpack(self, blob_sha256: str, place: Path) -> None:
        """Beside its place, then there at once: of two that do it, the second finds the first one's."""
        self._directory.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=self._directory))
        try:
            with self._blobs.open(blob_sha256) as blob, (beside / "archive").open("wb") as archive:
                shutil.copyfileobj(blob, archive, _PIECE)
            found = check(beside / "archive", to=RunDir(beside).results)
            (beside / "archive").unlink()
            (beside / "means.json").write_text(json.dumps(found.task_means))
            try:
                beside.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self._trim(keep=place)

    def _trim(self, *, keep: Path) -> None:
        places = [path for path in self._directory.iterdir() if not path.name.startswith(".")]
        seen = sorted(places, key=lambda path: _looked_at(path), reverse=True)
        total = 0
        for path in seen:
            total += sum(file.stat().st_size for file in path.iterdir())
            if total > self._most_bytes and path != keep:
                shutil.rmtree(path, ignore_errors=True)
                with self._lock:
                    self._open.pop(path.name, None)


def _looked_at(place: Path) -> float:
    try:
        return (place / "means.json").stat().st_mtime
    except OSError:
        return 0.0
