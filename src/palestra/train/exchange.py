"""Whole matrices out of shards and back, by two all-to-alls: each rank works on the matrices that it owns.

Matrices are dealt by cost to the ranks that hold a part of them, the dearest first, always to the least loaded; the
work then goes in rounds in which every rank has about as much. Shards travel to the owner from the ranks of its own
replica only, results to all replicas: those share the work and hold the same bits afterwards. No rank ever holds more
whole matrices than those it owns in two rounds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from palestra.model.holdings import Holding, Run
from palestra.model.mesh import group_among

Index = tuple[int | slice, ...]
Shape = tuple[int, int]
ROUND_ELEMENTS = 2**24  # whole matrices of so many elements are on their owner at once, or one that is larger


@dataclass(frozen=True)
class Piece:
    """A rectangle of a matrix that a rank holds."""

    here: Index  # in the rank's shard of the parameter
    there: tuple[slice, slice]  # in the matrix
    shape: Shape

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter, and which rank holds what of it."""

    parameter: int  # its place in the caller's list
    shape: Shape
    pieces: dict[int, tuple[Piece, ...]]  # by rank of the group; only those that hold any
    replicas: dict[int, tuple[int, ...]]  # by rank of the group

    @property
    def cost(self) -> int:
        """Of orthogonalising it, up to a factor."""
        return min(self.shape) ** 2 * max(self.shape)

    def is_sent(self, rank: int, owner: int) -> bool:
        """Whether the owner gets its pieces from `rank`: one of its own replica."""
        return rank in self.pieces and self.replicas[rank] == self.replicas[owner]

    def senders(self, owner: int) -> list[int]:
        return [rank for rank in self.pieces if self.is_sent(rank, owner)]


def cut(
    parameter: int, rows: slice, columns: slice, expert: int | None, holdings: dict[int, Holding], shape: Sequence[int]
) -> Matrix:
    """The matrix that is `rows` x `columns` of a parameter, or of its `expert`, with who holds what of it."""
    row_indices, column_indices = range(*rows.indices(shape[-2])), range(*columns.indices(shape[-1]))
    pieces: dict[int, tuple[Piece, ...]] = {}
    for rank, held in holdings.items():
        first: list[int | None] = [None]
        if expert is not None:
            first = [run.at + expert - run.start for run in held.runs[0] if 0 <= expert - run.start < run.length]
        tall, wide = (list(_overlaps(*one)) for one in ((held.runs[-2], row_indices), (held.runs[-1], column_indices)))
        found = tuple(
            Piece(
                here=(row[0], column[0]) if at is None else (at, row[0], column[0]),
                there=(row[1], column[1]),
                shape=(row[1].stop - row[1].start, column[1].stop - column[1].start),
            )
            for at, row, column in product(first, tall, wide)
        )
        if found:
            pieces[rank] = found
    replicas = {rank: held.replica for rank, held in holdings.items()}
    return Matrix(parameter, (len(row_indices), len(column_indices)), pieces, replicas)


def _overlaps(runs: Iterable[Run], wanted: range) -> Iterator[tuple[slice, slice]]:
    """Where a rank has the wanted indices: in its shard, and in the sequence of the wanted ones."""
    for run in runs:
        first = max(0, -((wanted.start - run.start) // wanted.step))
        last = min(len(wanted), -((wanted.start - run.start - run.length) // wanted.step))
        if first < last:
            at = run.at + wanted[first] - run.start
            yield slice(at, at + (last - first - 1) * wanted.step + 1, wanted.step), slice(first, last)


@dataclass(frozen=True)
class Round:
    """Matrices by the rank that owns them."""

    owned: dict[int, tuple[Matrix, ...]]

    def matrices(self) -> Iterator[tuple[int, Matrix]]:
        return ((owner, matrix) for owner, matrices in self.owned.items() for matrix in matrices)


def deal(matrices: Sequence[Matrix], *, round_elements: int = ROUND_ELEMENTS) -> list[Round]:
    """The same on every rank."""
    loads: dict[int, int] = {}
    queues: dict[int, list[Matrix]] = {}
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):
        owner = min(matrix.pieces, key=lambda rank: (loads.get(rank, 0), rank))
        loads[owner] = loads.get(owner, 0) + matrix.cost
        queues.setdefault(owner, []).append(matrix)
    rounds: list[Round] = []
    while any(queues.values()):
        rounds.append(Round({owner: _take(queue, round_elements) for owner, queue in sorted(queues.items()) if queue}))
    return rounds


def _take(queue: list[Matrix], elements: int) -> tuple[Matrix, ...]:
    taken = [queue.pop(0)]
    held = taken[0].shape[0] * taken[0].shape[1]
    while queue and (held := held + queue[0].shape[0] * queue[0].shape[1]) <= elements:
        taken.append(queue.pop(0))
    return tuple(taken)


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of a mesh. A collective where the mesh is neither a line nor the whole job, the first time."""
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1] or [0]
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    if mesh.size() == dist.get_world_size():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return group_among(mesh.mesh.flatten().tolist())


class Exchange:
    """One step's way of all matrices of one mesh; planned once."""

    def __init__(
        self, matrices: Sequence[Matrix], group: dist.ProcessGroup, *, device: torch.device, dtype: torch.dtype
    ):
        self._group, self._device, self._dtype = group, device, dtype
        self._rank, self._num = dist.get_rank(group), dist.get_world_size(group)
        self.rounds = deal(matrices)

    def run(
        self,
        read: Callable[[int, Index], Tensor],
        transform: Callable[[Tensor], Tensor],
        write: Callable[[int, Index, Tensor], None],
    ) -> None:
        """A collective. `read` and `write` are of a parameter's shard, each element once on every rank that has it;
        `transform` gets stacks of whole matrices of one shape. The next round's shards travel while a round is
        computed."""
        if not self.rounds:
            return
        coming = self._gather(self.rounds[0], read)
        for current, following in zip(self.rounds, [*self.rounds[1:], None], strict=True):
            stacks = self._assemble(current, coming)
            if following is not None:
                coming = self._gather(following, read)
            self._scatter(current, {shape: transform(stack) for shape, stack in stacks.items()}, write)

    def _gather(self, current: Round, read: Callable[[int, Index], Tensor]) -> "_Transfer":
        """Send what this rank holds to the owners."""
        outgoing: list[list[Tensor]] = [[] for _ in range(self._num)]
        for owner, matrix in current.matrices():
            for piece in matrix.pieces.get(self._rank, ()):
                values = read(matrix.parameter, piece.here)  # in every replica: reading moves the momentum on
                if matrix.is_sent(self._rank, owner):
                    outgoing[owner].append(values.to(self._dtype).flatten())
        incoming = [0] * self._num
        for matrix in current.owned.get(self._rank, ()):
            for sender in matrix.senders(self._rank):
                incoming[sender] += sum(piece.numel for piece in matrix.pieces[sender])
        return self._send(outgoing, incoming)

    def _assemble(self, current: Round, coming: "_Transfer") -> dict[Shape, Tensor]:
        received = coming.arrived()
        taken = [0] * self._num
        stacks: dict[Shape, list[Tensor]] = {}
        for matrix in current.owned.get(self._rank, ()):
            whole = torch.empty(matrix.shape, dtype=self._dtype, device=self._device)
            for sender in matrix.senders(self._rank):
                for piece in matrix.pieces[sender]:
                    values = received[sender][taken[sender] : taken[sender] + piece.numel]
                    whole[piece.there] = values.view(piece.shape)
                    taken[sender] += piece.numel
            stacks.setdefault(matrix.shape, []).append(whole)
        return {shape: torch.stack(matrices) for shape, matrices in stacks.items()}

    def _scatter(
        self, current: Round, stacks: dict[Shape, Tensor], write: Callable[[int, Index, Tensor], None]
    ) -> None:
        """Send every rank its pieces of the results."""
        outgoing: list[list[Tensor]] = [[] for _ in range(self._num)]
        used = dict.fromkeys(stacks, 0)
        for matrix in current.owned.get(self._rank, ()):
            whole = stacks[matrix.shape][used[matrix.shape]]
            used[matrix.shape] += 1
            for rank, pieces in matrix.pieces.items():
                outgoing[rank].extend(whole[piece.there].flatten() for piece in pieces)
        mine = [
            (owner, matrix, piece)
            for owner, matrix in current.matrices()
            for piece in matrix.pieces.get(self._rank, ())
        ]
        incoming = [0] * self._num
        for owner, _, piece in mine:
            incoming[owner] += piece.numel
        received = self._send(outgoing, incoming).arrived()
        taken = [0] * self._num
        for owner, matrix, piece in mine:
            values = received[owner][taken[owner] : taken[owner] + piece.numel]
            write(matrix.parameter, piece.here, values.view(piece.shape))
            taken[owner] += piece.numel

    def _send(self, outgoing: list[list[Tensor]], incoming: list[int]) -> "_Transfer":
        sizes = [sum(part.numel() for part in parts) for parts in outgoing]
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        sent = torch.cat([nothing, *(part for parts in outgoing for part in parts)])
        received = torch.empty(sum(incoming), dtype=self._dtype, device=self._device)
        work = dist.all_to_all_single(received, sent, incoming, sizes, group=self._group, async_op=True)
        assert work is not None
        return _Transfer(work, sent, received, incoming)


@dataclass(frozen=True)
class _Transfer:
    work: dist.Work
    sent: Tensor  # kept until it has arrived
    received: Tensor
    sizes: list[int]

    def arrived(self) -> tuple[Tensor, ...]:
        """What came, by sender; at most as long as the group's deadline."""
        self.work.wait()
        return self.received.split(self.sizes)
