"""Which rank holds which part of a sharded tensor, as plain ranges: pure functions of shape, mesh and placements."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from palestra.core.errors import PalestraError


@dataclass(frozen=True)
class Run:
    """Consecutive indices of one dimension that a rank holds side by side."""

    start: int  # in the whole tensor
    at: int  # in the rank's shard
    length: int


@dataclass(frozen=True)
class Holding:
    """What one rank has of a tensor: the product of its runs over the dimensions."""

    replica: tuple[int, ...]  # coordinates on the mesh dimensions that replicate: equal ones make up a whole tensor
    runs: tuple[tuple[Run, ...], ...]  # per dimension


def holding(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Holding:
    """Of the rank at `coordinate`. Errors: PalestraError for a placement that does not say where the values are."""
    spans: list[list[tuple[int, int]]] = [[(0, size)] for size in shape]
    for placement, num, index in zip(placements, mesh_shape, coordinate, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            spans[placement.dim] = _shard(spans[placement.dim], placement, num, index)
        elif not isinstance(placement, Replicate):
            raise PalestraError(f"a parameter is placed as {placement} on its mesh; it must be sharded or replicated")
    replica = tuple(index for index, where in zip(coordinate, placements, strict=True) if isinstance(where, Replicate))
    return Holding(replica, tuple(_runs(of_dim) for of_dim in spans))


def holdings(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> dict[int, Holding]:
    """By rank of the whole job, in the mesh's order."""
    return {
        int(rank): holding(shape, mesh.shape, placements, coordinate)
        for rank, coordinate in zip(mesh.mesh.flatten().tolist(), _coordinates(mesh.shape), strict=True)
    }


def even_dim(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], *, copies: int, num_ranks: int
) -> int | None:
    """The dimension of which every rank of the job holds one of equal parts, in the order of ranks, with `copies` of
    the whole one after the other; None, if what ranks hold is anything else."""
    parts, held = num_ranks // copies, holdings(shape, mesh, placements)
    if sorted(held) != list(range(num_ranks)):
        return None
    for dim, size in enumerate(shape):
        if size % parts == 0 and all(held[rank].runs == _part(shape, dim, rank % parts, parts) for rank in held):
            return dim
    return None


def is_sharded(mesh: DeviceMesh, placements: Sequence[Placement], dims: Sequence[int]) -> bool:
    """Whether any of `dims` is cut over more than one rank."""
    return any(
        isinstance(placement, Shard | _StridedShard) and placement.dim in dims and num > 1
        for placement, num in zip(placements, mesh.shape, strict=True)
    )


def sharding_dims(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, ...]:
    """Mesh dimensions over which shards must be added up to have each value once. Errors: as `holding`."""
    if partial := [placement for placement in placements if isinstance(placement, Partial)]:
        raise PalestraError(f"a gradient is placed as {partial[0]} on its mesh: it was not reduced over its ranks")
    return tuple(
        dim
        for dim, (placement, num) in enumerate(zip(placements, mesh.shape, strict=True))
        if not isinstance(placement, Replicate) and num > 1
    )


def _part(shape: Sequence[int], dim: int, index: int, parts: int) -> tuple[tuple[Run, ...], ...]:
    length = shape[dim] // parts
    cut = Run(index * length, 0, length)
    return tuple((cut,) if at == dim else (Run(0, 0, size),) for at, size in enumerate(shape))


def _coordinates(mesh_shape: Sequence[int]) -> list[tuple[int, ...]]:
    coordinates: list[tuple[int, ...]] = [()]
    for num in mesh_shape:
        coordinates = [(*known, index) for known in coordinates for index in range(num)]
    return coordinates


def _shard(
    spans: list[tuple[int, int]], placement: Shard | _StridedShard, num: int, index: int
) -> list[tuple[int, int]]:
    """Of spans (start, length) in the shard's order; strided: each of `split_factor` chunks is cut for itself."""
    if not isinstance(placement, _StridedShard):
        return _chunk(spans, num, index)
    pieces = (_chunk(spans, int(placement.split_factor), piece) for piece in range(int(placement.split_factor)))
    return [span for piece in pieces for span in _chunk(piece, num, index)]


def _chunk(spans: list[tuple[int, int]], num: int, index: int) -> list[tuple[int, int]]:
    """Chunk `index` of `num`, as torch.chunk cuts: the last ones may be short or empty."""
    size = sum(length for _, length in spans)
    full = -(-size // num)
    low, high = min(size, full * index), min(size, full * (index + 1))
    cut, before = [], 0
    for start, length in spans:
        first, last = max(low, before), min(high, before + length)
        if first < last:
            cut.append((start + first - before, last - first))
        before += length
    return cut


def _runs(spans: list[tuple[int, int]]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for start, length in spans:
        last = runs[-1] if runs else Run(0, 0, 0)
        if runs and last.start + last.length == start:
            runs[-1] = Run(last.start, last.at, last.length + length)
        else:
            runs.append(Run(start, last.at + last.length, length))
    return tuple(runs)
