"""A policy that is a table: the logits of every next token, given the token before it. In numpy alone.

Engine and trainer of the fault suite compute with it, so that probes, hashes and versions are really checked.
Legend: V vocabulary, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from palestra.core.errors import InfrastructureError
from palestra.wire.batches import Batch
from palestra.wire.weights.manifest import TensorEntry, WeightsManifest, read_manifest, write_manifest

FILE = "model.safetensors"
EOS, EOS_LOGIT = 2, 2.0  # half of the replies of twelve tokens end before the limit
_LOWEST_RATIO, _HIGHEST_RATIO = 0.5, 5.0


class Table:
    """`tensors` are `logits` [V, V] and `bias` [V], float32; they are replaced, never written into."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors
        self._logp: dict[float, np.ndarray] = {}  # by temperature, [V, V]

    @classmethod
    def random(cls, size: int, seed: int = 0) -> "Table":
        logits = np.random.default_rng(seed).normal(0, 0.5, (size, size)).astype(np.float32)
        logits[:, EOS] = EOS_LOGIT
        return cls({"logits": logits, "bias": np.zeros(size, np.float32)})

    @classmethod
    def load(cls, path: Path) -> "Table":
        return cls(load_file(path))

    def save(self, path: Path) -> None:
        """Errors: InfrastructureError, if the disk is full."""
        try:
            save_file(self.tensors, path)
        except Exception as error:  # safetensors raises its own type
            raise InfrastructureError(f"could not write {path}: {error}; free space and resume") from error

    def logp(self, temperature: float) -> np.ndarray:
        """Of the next token by the token before, [V, V]."""
        if temperature not in self._logp:
            logits = (self.tensors["logits"] + self.tensors["bias"]).astype(np.float64) / max(temperature, 1e-6)
            highest = logits.max(1, keepdims=True)
            self._logp[temperature] = logits - highest - np.log(np.exp(logits - highest).sum(1, keepdims=True))
        return self._logp[temperature]

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """log p(token t+1 | token t), [T - 1]."""
        ids = np.asarray(token_ids)
        return self.logp(temperature)[ids[:-1], ids[1:]].tolist()

    def sample(self, before: int, temperature: float, chance: float) -> tuple[int, float]:
        """The token that `chance` in [0, 1) falls on, and its log-probability."""
        row = self.logp(temperature)[before]
        token = min(int(np.searchsorted(np.cumsum(np.exp(row)), chance)), len(row) - 1)
        return token, float(row[token])

    def trained(self, batch: Batch, lr: float) -> "Table":
        """After one step of masked importance sampling, plain gradient ascent. The same batch gives the same bits."""
        logits = self.tensors["logits"]
        at = np.flatnonzero(batch.rl_weight)
        before, token = batch.token_ids[at - 1], batch.token_ids[at]
        temperature = np.repeat(batch.temperature, batch.lengths)[at]
        logp = np.stack([self.logp(float(t))[b] for t, b in zip(temperature, before, strict=True)])
        ratio = np.exp(logp[np.arange(len(at)), token] - batch.engine_logprobs[at])
        kept = (ratio >= _LOWEST_RATIO) & (ratio <= _HIGHEST_RATIO)
        weight = np.where(kept, ratio * batch.advantage[at], 0.0) / temperature / max(len(at), 1)
        gradient = np.zeros(logits.shape)
        np.add.at(gradient, before, -weight[:, None] * np.exp(logp))
        np.add.at(gradient, (before, token), weight)
        bias = self.tensors["bias"] + np.float32(lr) * gradient.sum(0).astype(np.float32)
        return Table({"logits": logits + np.float32(lr) * gradient.astype(np.float32), "bias": bias})

    def equals(self, other: "Table") -> bool:
        return all(np.array_equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())


def stage(table: Table, directory: Path, version: int, attempt: int, mark: str = "") -> None:
    """As `wire.weights.files.stage`, manifest last."""
    directory.mkdir(parents=True)
    table.save(directory / FILE)
    entries = [
        TensorEntry(name=name, dtype=tensor.dtype.name, shape=tensor.shape, file=FILE, hash=hash_array(tensor))
        for name, tensor in table.tensors.items()
    ]
    manifest = WeightsManifest(version=version, attempt=attempt, tensors=tuple(entries), mark=mark)
    write_manifest(directory, manifest)


def read(directory: Path, version: int) -> Table:
    """A staged version, checked as an engine's plugin checks it. Errors: InfrastructureError."""
    manifest = read_manifest(directory)
    if manifest.version != version:
        raise InfrastructureError(f"version {version} was announced, but its manifest says {manifest.version}")
    table = Table.load(directory / FILE)
    for entry in manifest.tensors:
        if hash_array(table.tensors[entry.name]) != entry.hash:
            raise InfrastructureError(f"tensor {entry.name} in {entry.file} arrived corrupted")
    return table


def hash_array(array: np.ndarray) -> str:
    """That of `wire.weights.files.hash_tensor`, without torch."""
    digest = blake3(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
