"""Batches on the wire: columnar, one contiguous buffer per stream, about 9 bytes per token; with the experts that
engines chose, L x K bytes more.

Legend: N tokens of all samples end to end, S samples, P packs, M tokens with routes, L layers, K experts of a token.

Integer columns take the narrowest type that holds them. Float streams are kept as runs (value, length) where that is
smaller than one float per token, so that a stream that is constant in a sample costs one value.
"""

import mmap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from palestra.core.errors import FencedError, InfrastructureError
from palestra.core.files import write_atomically

COMPONENTS = ("rl", "ce", "ref")  # of the loss, each with a weight per token
_MAGIC = b"palestra-batch-2\n"
_INTEGERS = ("token_ids", "lengths", "rollout", "pack", "version")
_RUN_STREAMS = ("advantage", "rl_weight", "ce_weight", "ref_weight", "reference_logprobs", "engine_logprobs")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """All samples of one step, packed for the trainer's ranks.

    Shapes: per-token fields are [N]; `lengths`, `rollout`, `temperature`, `pack`, `version` are [S].
    `pack[s]` is the microbatch of sample s; rank r of R owns packs [r*P/R, (r+1)*P/R), samples in order.
    `version[s]` is the oldest policy version that sampled a token of sample s (`step`, if nothing in it was sampled).
    Log-probabilities stand at the token's own position; the weights are 0 where a token is not trained.
    `routes` [M, L, K] are the experts of the first `num_routed[s]` tokens of each sample, samples in order: uint8, or
    uint16 beyond 256 experts. Where no sample has any, both are empty.
    """

    step: int
    attempt: int
    num_packs: int
    max_pack_tokens: int
    token_ids: np.ndarray
    engine_logprobs: np.ndarray
    advantage: np.ndarray
    rl_weight: np.ndarray
    ce_weight: np.ndarray
    ref_weight: np.ndarray
    reference_logprobs: np.ndarray
    lengths: np.ndarray
    rollout: np.ndarray
    temperature: np.ndarray
    pack: np.ndarray
    version: np.ndarray
    routes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint8))
    num_routed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.size)

    @property
    def num_samples(self) -> int:
        return int(self.lengths.size)

    @property
    def age(self) -> np.ndarray:
        """[S]: how many versions older than the trainer's the oldest token of each sample is."""
        return self.step - self.version

    @property
    def offsets(self) -> np.ndarray:
        """[S + 1]: sample s is tokens [offsets[s], offsets[s + 1])."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def routes_of(self, sample: int) -> np.ndarray:
        """[m, L, K] of its first m tokens."""
        if not self.num_routed.size:
            return self.routes
        end = int(self.num_routed[: sample + 1].sum())
        return self.routes[end - int(self.num_routed[sample]) : end]


def encode(batch: Batch) -> bytes:
    columns: dict[str, dict[str, Any]] = {}
    buffers: list[bytes] = []

    def add(name: str, array: np.ndarray) -> None:
        columns[name] = {"dtype": array.dtype.str, "size": int(array.size)}
        buffers.append(array.tobytes())

    for name in _INTEGERS:
        array = getattr(batch, name)
        low = int(array.min()) if array.size else 0
        add(name, _narrow(array - low))
        columns[name]["low"] = low
    for name in (*_RUN_STREAMS, "temperature"):
        values, run_lengths = _runs(np.asarray(getattr(batch, name), np.float32))
        if values.nbytes + run_lengths.nbytes < 4 * run_lengths.sum():
            add(f"{name}.values", values)
            add(f"{name}.lengths", run_lengths)
        else:
            add(name, np.asarray(getattr(batch, name), np.float32))
    if batch.routes.size:
        add("num_routed", _narrow(batch.num_routed))
        add("routes", batch.routes.reshape(-1))
    header = {
        "routes": batch.routes.shape[1:],
        "step": batch.step,
        "attempt": batch.attempt,
        "num_packs": batch.num_packs,
        "max_pack_tokens": batch.max_pack_tokens,
        "columns": columns,
    }
    packed = msgspec.msgpack.encode(header)
    return b"".join([_MAGIC, len(packed).to_bytes(4, "little"), packed, *buffers])


def decode(data: bytes, *, source: str = "a batch") -> Batch:
    """Errors: InfrastructureError naming `source`, if the bytes are torn or of another format."""
    start = len(_MAGIC) + 4
    if data[: len(_MAGIC)] != _MAGIC:
        raise InfrastructureError(
            f"{source} is not a batch of this version of palestra; delete it and start the step again"
        )
    end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    try:
        header = msgspec.msgpack.decode(data[start:end])
    except msgspec.DecodeError:
        raise InfrastructureError(f"{source} is torn: it ends inside its header; restore it or resume") from None
    arrays: dict[str, np.ndarray] = {}
    for name, column in header["columns"].items():
        dtype = np.dtype(column["dtype"])
        if end + column["size"] * dtype.itemsize > len(data):
            raise InfrastructureError(f"{source} is torn: column {name} ends after the last byte; restore it or resume")
        arrays[name] = np.frombuffer(data, dtype, column["size"], end)
        end += column["size"] * dtype.itemsize
    integers = {name: arrays[name].astype(np.int64) + header["columns"][name]["low"] for name in _INTEGERS}
    return Batch(
        step=header["step"],
        attempt=header["attempt"],
        num_packs=header["num_packs"],
        max_pack_tokens=header["max_pack_tokens"],
        **integers,
        **{name: _stream(arrays, name) for name in (*_RUN_STREAMS, "temperature")},
        **_routed(arrays, header),
    )


def _routed(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> dict[str, np.ndarray]:
    if "num_routed" not in arrays:
        return {}
    routes = arrays["routes"].reshape(-1, *header["routes"])
    return {"routes": routes, "num_routed": arrays["num_routed"].astype(np.int64)}


@dataclass(frozen=True, kw_only=True)
class BatchSample:
    """Sample `index` of a batch, per token: what a batch adds to the rollout it was cut from."""

    index: int
    token_ids: np.ndarray
    advantage: np.ndarray
    weights: dict[str, np.ndarray]  # by component: rl, ce, ref
    reference_logprobs: np.ndarray

    @property
    def is_trained(self) -> np.ndarray:
        """[T]: the tokens that a component has a weight for."""
        return np.any([weight != 0 for weight in self.weights.values()], axis=0)


def read_samples(path: Path, rollout: int) -> list[BatchSample]:
    """Those of one rollout, in order, without reading the others. Errors: InfrastructureError; OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = data[: len(_MAGIC) + 4]
        if head[: len(_MAGIC)] != _MAGIC:
            raise InfrastructureError(f"{path} is not a batch of this version of palestra")
        end = len(head) + int.from_bytes(head[len(_MAGIC) :], "little")
        columns, places = msgspec.msgpack.decode(data[len(head) : end])["columns"], {}
        for name, column in columns.items():
            places[name] = end
            end += column["size"] * np.dtype(column["dtype"]).itemsize
        if end > len(data):
            raise InfrastructureError(f"{path} is torn: its columns end after its last byte")

        def cut(name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
            dtype = np.dtype(columns[name]["dtype"])
            num = (columns[name]["size"] if end is None else end) - begin
            start = places[name] + begin * dtype.itemsize
            found = np.frombuffer(data[start : start + num * dtype.itemsize], dtype)
            return found.astype(np.int64) + columns[name]["low"] if "low" in columns[name] else found

        def stream(name: str, begin: int, end: int) -> np.ndarray:
            if name in columns:
                return cut(name, begin, end)
            ends = np.cumsum(cut(f"{name}.lengths"), dtype=np.int64)
            return cut(f"{name}.values")[np.searchsorted(ends, np.arange(begin, end), side="right")]

        offsets = np.concatenate([[0], np.cumsum(cut("lengths"))])
        return [
            BatchSample(
                index=sample,
                token_ids=cut("token_ids", *offsets[sample : sample + 2].tolist()),
                advantage=stream("advantage", *offsets[sample : sample + 2].tolist()),
                weights={name: stream(f"{name}_weight", *offsets[sample : sample + 2].tolist()) for name in COMPONENTS},
                reference_logprobs=stream("reference_logprobs", *offsets[sample : sample + 2].tolist()),
            )
            for sample in np.flatnonzero(cut("rollout") == rollout).tolist()
        ]


def _stream(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name in arrays:
        return arrays[name]
    return np.repeat(arrays[f"{name}.values"], arrays[f"{name}.lengths"])


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.min_scalar_type(int(array.max()) if array.size else 0))


def _runs(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of the runs of equal bits; NaN equals itself."""
    if not stream.size:
        return stream, np.zeros(0, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(stream.view(np.uint32))) + 1])
    return stream[starts], _narrow(np.diff(np.concatenate([starts, [stream.size]])))


def equal(one: Batch, other: Batch) -> bool:
    """Same numbers in every field, floats by their bits: NaN equals itself, 0.0 is not -0.0."""
    return all(_same(np.asarray(getattr(one, f.name)), np.asarray(getattr(other, f.name))) for f in fields(Batch))


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    return one.shape == other.shape and one.astype(np.float32).tobytes() == other.astype(np.float32).tobytes()


class BatchFiles:
    """The file backend: one file per step in the run directory, whole or absent.

    A file is kept until `discard_before`, so that a restarted trainer trains it again and a run can be replayed.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, step: int) -> Path:
        return self.directory / f"{step:06d}.batch"

    def write(self, batch: Batch) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        return write_atomically(self.path(batch.step), encode(batch))

    def read(self, step: int, *, attempt: int) -> Batch:
        """Errors: FencedError, if a later attempt than `attempt` wrote it (this reader is a leftover)."""
        path = self.path(step)
        batch = decode(path.read_bytes(), source=str(path))
        if batch.attempt > attempt:
            raise FencedError(
                f"{path} was written by attempt {batch.attempt}, this process belongs to attempt {attempt}"
            )
        return batch

    def steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.directory.glob("*.batch"))

    def discard_before(self, step: int) -> None:
        for known in self.steps():
            if known < step:
                self.path(known).unlink(missing_ok=True)
