"""Tensors in safetensors files: staged in shared memory or on a shared file system, read by the engines.

A version is staged whole, or as what changed since the one before: that one again, and so on to one that is whole.
Whoever reads puts the tensors together one by one, from what lies in staging; so any engine can load any version that
is there, whatever it held before, and nobody keeps a copy that could be torn. What comes out is proved by the hash of
the whole tensor.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save, save_file

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.wire.weights.difference import Difference, apply, between
from palestra.wire.weights.manifest import (
    TensorEntry,
    WeightsManifest,
    chain,
    read_manifest,
    require_distinct,
    write_manifest,
)

DEFAULT_SHARD_BYTES = 1 << 28
_PARTS = ("gaps", "steps", "far")
ADAPTER_TENSORS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names


def stage(
    directory: Path | str,
    version: int,
    attempt: int,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    previous: Path | None = None,
    mark: str = "",
) -> WeightsManifest:
    """Write `tensors` to `directory` and a manifest with their hashes last. What the directory held before is gone.

    `previous`: a version beside it that stays as long as this one; only what changed since then is written.
    Holds at most one shard in memory, and of `previous` one tensor; a tensor larger than `max_shard_bytes` has a shard
    of its own. Engines load in the order given: keep the tensors of a layer together. Tensors are whole (not sharded
    over ranks); a tied one is given once.
    Errors: InfrastructureError naming a tensor that is given twice, or a disk that is full.
    """
    directory = Path(directory)
    before = None if previous is None else Version(previous, read_manifest(previous))
    discard(directory)
    directory.mkdir(parents=True)
    entries: list[TensorEntry] = []
    sent_bytes = full_bytes = 0
    for number, shard in enumerate(_shards((_piece(*pair, before) for pair in tensors), max_shard_bytes)):
        entries += _write_shard(directory, f"weights-{number:05d}.safetensors", shard)
        sent_bytes += sum(piece.num_bytes for piece in shard)
        full_bytes += sum(piece.full_bytes for piece in shard)
    require_distinct([entry.name for entry in entries], where=f"version {version}")
    is_difference = any(entry.num_changed is not None for entry in entries)
    manifest = WeightsManifest(
        version=version,
        attempt=attempt,
        tensors=tuple(entries),
        previous=previous.name if previous is not None and is_difference else "",
        sent_bytes=sent_bytes,
        full_bytes=full_bytes,
        mark=mark,
    )
    write_manifest(directory, manifest)
    return manifest


def stage_adapter(
    directory: Path | str, version: int, attempt: int, tensors: Iterable[tuple[str, torch.Tensor]], config: bytes
) -> WeightsManifest:
    """As `stage`, in one file and in peft's layout: vLLM's own route loads the directory too. Errors: as `stage`."""
    directory = Path(directory)
    discard(directory)
    directory.mkdir(parents=True)
    pieces = [_piece(name, tensor, None) for name, tensor in tensors]
    entries = _write_shard(directory, ADAPTER_TENSORS, pieces)
    write_atomically(directory / ADAPTER_CONFIG, config)
    num_bytes = sum(piece.num_bytes for piece in pieces)
    manifest = WeightsManifest(
        version=version, attempt=attempt, tensors=tuple(entries), sent_bytes=num_bytes, full_bytes=num_bytes
    )
    write_manifest(directory, manifest)
    return manifest


def put_adapter(directory: Path | str, tensors: dict[str, torch.Tensor], home: Path | str) -> None:
    """The adapter of `directory`, whose `tensors` were read and checked, takes the place of what is in `home`."""
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / ADAPTER_TENSORS, save(tensors))
    write_atomically(home / ADAPTER_CONFIG, (Path(directory) / ADAPTER_CONFIG).read_bytes())


def read(directory: Path | str, manifest: WeightsManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in the manifest's order, each whole and checked against its hash before it is handed out.

    Errors: InfrastructureError naming the tensor and the file.
    """
    version = Version(Path(directory), manifest)
    for entry in manifest.tensors:
        yield entry.name, version.tensor(entry.name)


def discard(directory: Path | str) -> None:
    """Remove a staged version; nothing happens if there is none."""
    shutil.rmtree(directory, ignore_errors=True)


def hash_tensor(tensor: torch.Tensor) -> str:
    """blake3 of dtype, shape and raw bytes of a tensor on the CPU."""
    digest = blake3(f"{_dtype_name(tensor)}{tuple(tensor.shape)}".encode(), max_threads=blake3.AUTO)
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Version:
    """Whole tensors of a staged version, in any order; files are opened when they are needed."""

    def __init__(self, directory: Path, manifest: WeightsManifest):
        """Errors: InfrastructureError, if a version is missing that it is put together from."""
        older = chain(directory)[:-1] if manifest.previous else []
        self._links = [*(_Link(path, read_manifest(path)) for path in older), _Link(directory, manifest)]

    def entry(self, name: str) -> TensorEntry | None:
        return self._links[-1].entries.get(name)

    def tensor(self, name: str, *, checked: bool = True) -> torch.Tensor:
        """Errors: InfrastructureError naming the first file in which something is wrong."""
        links = self._links_of(name)
        tensor = self._put_together(name, links)
        if checked and hash_tensor(tensor) != links[-1].entries[name].hash:
            for number in range(1, len(links) + 1):  # which of them is it?
                links[number - 1].check(name, self._put_together(name, links[:number]))
        return tensor

    def _links_of(self, name: str) -> list["_Link"]:
        """From the newest that has the tensor whole."""
        for first in range(len(self._links) - 1, -1, -1):
            entry = self._links[first].entries.get(name)
            if entry is None:
                raise InfrastructureError(
                    f"tensor {name} is not in {self._links[first].directory}, where it was sought"
                )
            if entry.num_changed is None:
                return self._links[first:]
        raise InfrastructureError(f"tensor {name} is whole in none of the versions of {self._links[-1].directory}")

    def _put_together(self, name: str, links: list["_Link"]) -> torch.Tensor:
        tensor = links[0].array(name, name)
        if any(link.entries[name].num_changed for link in links[1:]):
            tensor = tensor.clone()  # what is read may be the file's own memory
        for link in links[1:]:
            link.change(name, tensor)
        return tensor


class _Link:
    """One directory of a chain."""

    def __init__(self, directory: Path, manifest: WeightsManifest):
        self.directory = directory
        self.entries = {entry.name: entry for entry in manifest.tensors}
        self._opened, self._reader = "", None

    def array(self, name: str, key: str) -> torch.Tensor:
        """`key` of the file that has tensor `name`."""
        file = self.entries[name].file
        if file != self._opened or self._reader is None:
            self._opened, self._reader = file, _open(self.directory / file)
        try:
            return self._reader.get_tensor(key)
        except Exception as error:  # safetensors raises its own type, and others for torn files
            raise InfrastructureError(f"tensor {name} cannot be read from {file}: {error}") from error

    def change(self, name: str, tensor: torch.Tensor) -> None:
        """From what it was in the version before to what it is in this one."""
        if self.entries[name].num_changed == 0:
            return
        parts = [self.array(name, f"{name}/{part}").numpy() for part in _PARTS]
        try:
            apply(Difference(*parts), tensor)
        except ValueError as error:
            raise InfrastructureError(
                f"what changed of tensor {name} in {self._where(name)} does not fit the version before: {error}; "
                "stage the version whole"
            ) from error

    def check(self, name: str, tensor: torch.Tensor) -> None:
        expected = self.entries[name].hash
        if (found := hash_tensor(tensor)) != expected:
            raise InfrastructureError(
                f"tensor {name} in {self._where(name)} arrived corrupted: its hash is {found[:12]}, "
                f"the manifest has {expected[:12]}; stage the version again"
            )

    def _where(self, name: str) -> str:
        return f"{self.directory.name}/{self.entries[name].file}"


@dataclass(frozen=True)
class _Piece:
    """What is written of one tensor: itself, or what changed."""

    entry: dict[str, Any]
    arrays: dict[str, torch.Tensor]
    full_bytes: int

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def _piece(name: str, tensor: torch.Tensor, before: Version | None) -> _Piece:
    whole = tensor.detach().to("cpu").contiguous()
    entry = {
        "name": name,
        "dtype": _dtype_name(whole),
        "shape": tuple(whole.shape),
        "hash": hash_tensor(whole),
    }
    known = None if before is None else before.entry(name)
    if before is None or known is None or (known.dtype, known.shape) != (entry["dtype"], entry["shape"]):
        return _Piece(entry, {name: whole}, whole.nbytes)
    if known.hash == entry["hash"]:
        return _Piece({**entry, "num_changed": 0}, {}, whole.nbytes)
    difference = between(before.tensor(name, checked=False), whole)
    if difference is None:
        return _Piece(entry, {name: whole}, whole.nbytes)
    parts = {f"{name}/{part}": torch.from_numpy(getattr(difference, part)) for part in _PARTS}
    return _Piece({**entry, "num_changed": difference.num_changed}, parts, whole.nbytes)


def _shards(pieces: Iterable[_Piece], max_bytes: int) -> Iterator[list[_Piece]]:
    shard: list[_Piece] = []
    num_bytes = 0
    for piece in pieces:
        if shard and num_bytes + piece.num_bytes > max_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(piece)
        num_bytes += piece.num_bytes
    if shard:
        yield shard


def _write_shard(directory: Path, file: str, shard: list[_Piece]) -> list[TensorEntry]:
    require_distinct([key for piece in shard for key in piece.arrays], where=file)
    arrays = {key: array for piece in shard for key, array in piece.arrays.items()}
    try:
        if arrays:
            save_file(arrays, directory / file)
    except Exception as error:  # a full disk, or two names for one storage: safetensors names them
        num_bytes = sum(piece.num_bytes for piece in shard)
        raise InfrastructureError(f"could not write {directory / file} ({num_bytes} bytes): {error}") from error
    return [TensorEntry(**piece.entry, file=file if piece.arrays else "") for piece in shard]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # missing, or not a safetensors file
        raise InfrastructureError(f"{path} cannot be opened: {error}; was it discarded too early?") from error


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
