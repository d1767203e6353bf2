"""Copies of staged versions on an engine's own machine, where staging is on a file system that several share.

A version that is a difference needs the ones before it: those were copied when they were loaded, so only what is new
crosses the network. All workers of all engines of a machine share the copies; one copies, the others wait for it.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palestra.core.errors import InfrastructureError
from palestra.wire.weights.manifest import MANIFEST, chain


def fetch(directory: Path, own: Path) -> Path:
    """Copy what `directory` is put together from to below `own`; where the copy of `directory` is.

    What staging has no more is removed from `own` too. A copy that was broken off has no manifest, and is made anew.
    Errors: InfrastructureError, if a version is missing, or the disk is full.
    """
    staging = own / directory.parent.name
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with _alone(staging):
            for link in chain(directory):
                _copy(link, staging / link.name)
            for copy in staging.glob("v*"):
                if not (directory.parent / copy.name).exists():
                    shutil.rmtree(copy, ignore_errors=True)
    except OSError as error:
        raise InfrastructureError(
            f"{directory} could not be copied to {staging}: {error}; free space there, or leave sync.local out"
        ) from error
    return staging / directory.name


def _copy(source: Path, target: Path) -> None:
    manifest = (source / MANIFEST).read_bytes()
    if (target / MANIFEST).exists() and (target / MANIFEST).read_bytes() == manifest:
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in source.iterdir():
        if file.name != MANIFEST:
            shutil.copyfile(file, target / file.name)
    beside = target / f".{MANIFEST}"
    beside.write_bytes(manifest)
    beside.rename(target / MANIFEST)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """The only process on this machine in here; the lock of one that dies is free."""
    with (directory / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
