"""Tensors in safetensors files: staged in shared memory or on a shared file system, read by the engines."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save, save_file

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.wire.weights.manifest import TensorEntry, WeightsManifest, require_distinct, write_manifest

DEFAULT_SHARD_BYTES = 1 << 30
ADAPTER_TENSORS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names


def stage(
    directory: Path | str,
    version: int,
    attempt: int,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> WeightsManifest:
    """Write `tensors` to `directory` and a manifest with their hashes last. What the directory held before is gone.

    Holds at most one shard in memory; a tensor larger than `max_shard_bytes` has a shard of its own. Engines load in
    the order given: keep the tensors of a layer together. Tensors are whole (not sharded over ranks); a tied one is
    given once.
    Errors: InfrastructureError naming a tensor that is given twice, or a disk that is full.
    """
    directory = Path(directory)
    discard(directory)
    directory.mkdir(parents=True)
    entries: list[TensorEntry] = []
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        entries += _write_shard(directory, f"weights-{number:05d}.safetensors", shard)
    require_distinct([entry.name for entry in entries], where=f"version {version}")
    manifest = WeightsManifest(version=version, attempt=attempt, tensors=tuple(entries))
    write_manifest(directory, manifest)
    return manifest


def stage_adapter(
    directory: Path | str, version: int, attempt: int, tensors: Iterable[tuple[str, torch.Tensor]], config: bytes
) -> WeightsManifest:
    """As `stage`, in one file and in peft's layout: vLLM's own route loads the directory too. Errors: as `stage`."""
    directory = Path(directory)
    discard(directory)
    directory.mkdir(parents=True)
    whole = [(name, tensor.detach().to("cpu").contiguous()) for name, tensor in tensors]
    entries = _write_shard(directory, ADAPTER_TENSORS, whole)
    write_atomically(directory / ADAPTER_CONFIG, config)
    manifest = WeightsManifest(version=version, attempt=attempt, tensors=tuple(entries))
    write_manifest(directory, manifest)
    return manifest


def put_adapter(directory: Path | str, tensors: dict[str, torch.Tensor], home: Path | str) -> None:
    """The adapter of `directory`, whose `tensors` were read and checked, takes the place of what is in `home`."""
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / ADAPTER_TENSORS, save(tensors))
    write_atomically(home / ADAPTER_CONFIG, (Path(directory) / ADAPTER_CONFIG).read_bytes())


def read(directory: Path | str, manifest: WeightsManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in the manifest's order, each checked against its hash before it is handed out.

    Errors: InfrastructureError naming the tensor and the file.
    """
    opened, reader = "", None
    for entry in manifest.tensors:
        if entry.file != opened or reader is None:
            opened, reader = entry.file, _open(Path(directory) / entry.file)
        try:
            tensor = reader.get_tensor(entry.name)
        except Exception as error:  # safetensors raises its own type, and others for torn files
            raise InfrastructureError(f"tensor {entry.name} cannot be read from {entry.file}: {error}") from error
        if (found := hash_tensor(tensor)) != entry.hash:
            raise InfrastructureError(
                f"tensor {entry.name} in {entry.file} arrived corrupted: its hash is {found[:12]}, "
                f"the manifest has {entry.hash[:12]}; stage the version again"
            )
        yield entry.name, tensor


def discard(directory: Path | str) -> None:
    """Remove a staged version; nothing happens if there is none."""
    shutil.rmtree(directory, ignore_errors=True)


def hash_tensor(tensor: torch.Tensor) -> str:
    """blake3 of dtype, shape and raw bytes of a tensor on the CPU."""
    digest = blake3(f"{_dtype_name(tensor)}{tuple(tensor.shape)}".encode(), max_threads=blake3.AUTO)
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    shard: list[tuple[str, torch.Tensor]] = []
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > max_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append((name, tensor.detach().to("cpu").contiguous()))
        num_bytes += tensor.nbytes
    if shard:
        yield shard


def _write_shard(directory: Path, file: str, shard: list[tuple[str, torch.Tensor]]) -> list[TensorEntry]:
    require_distinct([name for name, _ in shard], where=file)
    try:
        save_file(dict(shard), directory / file)
    except Exception as error:  # a full disk, or two names for one storage: safetensors names them
        num_bytes = sum(tensor.nbytes for _, tensor in shard)
        raise InfrastructureError(f"could not write {directory / file} ({num_bytes} bytes): {error}") from error
    return [_entry(name, tensor, file) for name, tensor in shard]


def _entry(name: str, tensor: torch.Tensor, file: str) -> TensorEntry:
    shape = tuple(tensor.shape)
    return TensorEntry(name=name, dtype=_dtype_name(tensor), shape=shape, file=file, hash=hash_tensor(tensor))


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # missing, or not a safetensors file
        raise InfrastructureError(f"{path} cannot be opened: {error}; was it discarded too early?") from error


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
