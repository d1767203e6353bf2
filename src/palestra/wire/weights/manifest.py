"""What a publish consists of: the tensors in a directory, and the probe that proves that they arrived."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.wire.rundir import link_or_copy

MANIFEST, STAGED = "manifest.json", "staged.json"
KEPT_VERSIONS = 3  # in staging at once, at most: in use, on its way, being written
MAX_CHAIN = 0.5  # of a whole version's bytes: so much may lie in differences before the next version is whole


class TensorEntry(Struct, frozen=True, kw_only=True):
    """One tensor of a publish. `file` is relative to the directory; `hash` covers bytes, dtype and shape.

    `num_changed`: `file` has only what changed since the manifest's `previous` version, of so many elements; of 0
    there is no file. Whatever is sent, `hash` is the whole tensor's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    hash: str
    num_changed: int | None = None


class WeightsManifest(Struct, frozen=True, kw_only=True):
    """All tensors of one policy version, in the order in which they are to be loaded. Names differ.

    `previous`: the directory beside this one from which those come that are not sent whole, itself whole or not; empty
    where all are. `sent_bytes` are those of the files, `full_bytes` those of the tensors. `mark` tells which weights
    exactly: a version that is trained again has another.
    """

    version: int
    attempt: int
    tensors: tuple[TensorEntry, ...]
    previous: str = ""
    sent_bytes: int = 0
    full_bytes: int = 0
    mark: str = ""


class Probe(Struct, frozen=True, kw_only=True):
    """A sequence scored by the trainer: what an engine must answer once it holds the new version.

    Shapes: `token_ids` is [T], T >= 2; `logprobs[t]` is log p(token t+1 | tokens up to t) at temperature 1 under the
            new version, [T-1]; `previous_logprobs` the same under the version before, None if there is none.
    """

    token_ids: list[int]
    logprobs: list[float]
    previous_logprobs: list[float] | None = None


class Staged(Struct, frozen=True, kw_only=True):
    """A version that lies ready in `directory` for the engines to load: all weights, or an adapter to the model that
    they were started with.

    `sent_bytes` were written for it in `stage_s`, `full_bytes` it has; 0 where nobody counted. `local`: where engines
    keep copies of what they load, on their own machines; empty if they read `directory` itself. `is_sent`: it lies in
    the trainer's memory alone, and is sent when engines are ready for it; then there is no directory. `mark`: as in the
    manifest. `base`: the mark that engines must hold to be sent it; empty if that does not matter. Of what is sent,
    `shard_bytes` go from where they lie in the trainer, gathered nowhere.
    """

    version: int
    directory: str
    probe: Probe
    sent_bytes: int = 0
    full_bytes: int = 0
    stage_s: float = 0.0
    local: str = ""
    is_adapter: bool = False
    is_sent: bool = False
    mark: str = ""
    base: str = ""
    shard_bytes: int = 0


def write_manifest(directory: Path, manifest: WeightsManifest) -> None:
    """Written last and atomically: a directory without a manifest is not a publish."""
    write_atomically(directory / MANIFEST, msgspec.json.encode(manifest))


def read_manifest(directory: Path) -> WeightsManifest:
    """Errors: InfrastructureError, if there is none, it cannot be read, or a tensor is named twice."""
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=WeightsManifest)
    except OSError as error:
        raise InfrastructureError(f"{path} cannot be read: {error.strerror}; was the version staged?") from error
    except msgspec.DecodeError as error:
        raise InfrastructureError(f"{path} is not a weights manifest: {error}; stage the version again") from error
    require_distinct([entry.name for entry in manifest.tensors], where=str(path))
    return manifest


class _Link(Struct, frozen=True, kw_only=True):
    """All that a chain needs of a manifest."""

    version: int
    previous: str = ""


def chain(directory: Path) -> list[Path]:
    """What a version is put together from: one that is whole, those that changed it, at last itself.

    Errors: InfrastructureError naming the one that is missing.
    """
    links, version = [directory], None
    while True:
        path = links[0] / MANIFEST
        try:
            link = msgspec.json.decode(path.read_bytes(), type=_Link)
        except (OSError, msgspec.DecodeError) as error:
            raise InfrastructureError(
                f"{directory} cannot be put together: {path} cannot be read ({error}); stage the version whole"
            ) from error
        if version is not None and link.version >= version:
            raise InfrastructureError(f"{directory} cannot be put together: {links[0]} is not older than what follows")
        if not link.previous:
            return links
        version = link.version
        links.insert(0, directory.parent / link.previous)


def record(staged: Staged, published: Path, write_whole: Callable[[Path], object] | None = None) -> None:
    """Keep a second name for the files of a version under `published`, for `palestra replay`; its `Staged` is last.

    It is of no attempt: those of several stand beside one another in a run that was resumed. `write_whole` writes what
    is not staged whole to a directory, so that none of them needs another.
    Errors: InfrastructureError, if the disk is full.
    """
    target = published / f"{staged.version:06d}"
    try:
        shutil.rmtree(target, ignore_errors=True)  # of an attempt before, or half written
        if write_whole is None:
            shutil.copytree(staged.directory, target, copy_function=link_or_copy)
        else:
            write_whole(target)
        write_manifest(target, msgspec.structs.replace(read_manifest(target), attempt=0))
    except OSError as error:
        raise InfrastructureError(
            f"version {staged.version} could not be recorded in {target}: {error}; free space, or set "
            "log.keep_weights=false"
        ) from error
    kept = msgspec.structs.replace(staged, directory=str(target), local="")
    write_atomically(target / STAGED, msgspec.json.encode(kept))


def recorded(published: Path) -> list[Staged]:
    """Every version that was recorded whole, oldest first, where it lies now."""
    found = [(path, msgspec.json.decode(path.read_bytes(), type=Staged)) for path in published.glob(f"*/{STAGED}")]
    placed = [msgspec.structs.replace(staged, directory=str(path.parent)) for path, staged in found]
    return sorted(placed, key=lambda staged: staged.version)


def require_distinct(names: list[str], *, where: str) -> None:
    """A tensor sent twice could hide a missing one from a count of elements. Errors: InfrastructureError."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InfrastructureError(f"{where}: tensor {name} occurs twice; the exporter must yield each name once")
        seen.add(name)
