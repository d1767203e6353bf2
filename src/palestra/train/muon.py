"""Muon on sharded matrices: each is orthogonalised whole, by one rank of those that share it.

Legend: M matrices of a parameter, R rows and C columns of a whole one, r rows of it on this rank, N ranks of a group.

A step sends the rows of every matrix to its owner (one all-to-all), orthogonalises there, and sends the rows back
(another). Within a group no work is done twice. Where a rank has whole matrices, as of experts, nothing is sent.
Replicas have the same gradients and do the same work.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; dealt out as in Ahn et al. 2025,
arXiv:2504.05295; the scale of the update, which makes steps as large as AdamW's: Liu et al. 2025, arXiv:2502.16982.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

_QUINTIC = (3.4445, -4.7750, 2.0315)
_BUCKET = 1 << 26  # elements of a rank that are on their way at once


class Muon(torch.optim.Optimizer):
    """For parameters of matrices, [R, C] or [M, R, C], on any mesh. `step` is a collective.

    A group's `parts` says of how many matrices along `parts_dim` (-2 or -1) each is made up: they are orthogonalised
    apart. Errors: NotImplementedError for a matrix that is sharded over more than one axis.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        newton_schulz_steps: int = 5,
    ):
        defaults = {
            "lr": 0.0,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "newton_schulz_steps": newton_schulz_steps,
            "parts": 1,
            "parts_dim": -2,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for bucket in _buckets(parameters):
                self._step(bucket, group)

    def _step(self, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        slabs = [_slab(parameter, self._momentum(parameter, group), group) for parameter in parameters]
        _orthogonalise(slabs, group["newton_schulz_steps"])
        for parameter, slab in zip(parameters, slabs, strict=True):
            local = _local(parameter)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(slab.back().to(local.dtype), alpha=-group["lr"] * 0.2 * slab.longest**0.5)

    def _momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """This rank's part of what is to be orthogonalised."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        grad, buffer = _local(parameter.grad), _local(state["momentum_buffer"])
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer.clone()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The same on all ranks that share them: by the size of the largest share."""
    bucket: list[nn.Parameter] = []
    num = 0
    for parameter in parameters:
        ranks = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
        share = -(-parameter.numel() // ranks)
        if bucket and num + share > _BUCKET:
            yield bucket
            bucket, num = [], 0
        bucket.append(parameter)
        num += share
    if bucket:
        yield bucket


@dataclass
class _Slab:
    """What this rank has of a parameter's matrices, turned so that it is rows that are shared out.

    Shapes: `rows` [M, r, C] of matrices [M, R, C]; `shape` (R, C). `group` shares the rows, None: they are all here.
    """

    rows: Tensor
    shape: tuple[int, int]
    group: dist.ProcessGroup | None
    is_turned: bool
    parts: int
    is_across: bool  # the parts lie side by side, in columns
    local_shape: torch.Size

    @property
    def longest(self) -> int:
        """Side of one part."""
        rows, columns = self.shape
        return max(rows, columns // self.parts) if self.is_across else max(rows // self.parts, columns)

    def back(self) -> Tensor:
        """In the shape of the parameter's part on this rank."""
        return (self.rows.transpose(1, 2) if self.is_turned else self.rows).reshape(self.local_shape)


def _slab(parameter: nn.Parameter, update: Tensor, group: dict[str, Any]) -> _Slab:
    """The last two dimensions are the matrix; ranks that differ in the first of three have other matrices."""
    sharing: list[tuple[int, int]] = []  # mesh axis, dimension counted from the end
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            dim = None if isinstance(placement, Replicate) else placement.dim - parameter.dim()  # type: ignore[attr-defined]
            if dim is not None and dim >= -2 and parameter.device_mesh.size(axis) > 1:
                sharing.append((axis, dim))
    if len(sharing) > 1:
        raise NotImplementedError(f"Muon on a matrix that is sharded over {len(sharing)} axes; use AdamW")
    is_turned = bool(sharing) and sharing[0][1] == -1
    matrices = update if update.dim() == 3 else update.unsqueeze(0)
    shape = tuple(parameter.shape[-2:])
    return _Slab(
        rows=matrices.transpose(1, 2) if is_turned else matrices,
        shape=(shape[1], shape[0]) if is_turned else (shape[0], shape[1]),
        group=parameter.device_mesh.get_group(sharing[0][0]) if sharing else None,  # type: ignore[attr-defined]
        is_turned=is_turned,
        parts=group["parts"],
        is_across=(group["parts_dim"] == -1) != is_turned,
        local_shape=update.shape,
    )


def _orthogonalise(slabs: Sequence[_Slab], steps: int) -> None:
    """Put in place of each slab's rows those of its orthogonalised matrices."""
    groups: dict[dist.ProcessGroup, list[_Slab]] = {}
    for slab in slabs:
        if slab.group is None:
            slab.rows = _apart(slab.rows, slab, steps)
        else:
            groups.setdefault(slab.group, []).append(slab)
    for group, sharing in groups.items():
        matrices = [(slab, index) for slab in sharing for index in range(len(slab.rows))]
        _at_owners(matrices, group, steps)


def _at_owners(matrices: Sequence[tuple[_Slab, int]], group: dist.ProcessGroup, steps: int) -> None:
    num, me = dist.get_world_size(group), dist.get_rank(group)
    owned = _deal([slab.shape for slab, _ in matrices], num)
    dtype = _working_dtype(matrices[0][0].rows)
    sent = [[slab.rows[index].to(dtype) for slab, index in (matrices[i] for i in owned[owner])] for owner in range(num)]
    mine = [matrices[i][0] for i in owned[me]]
    arriving = [[(_rows_of(rank, slab.shape[0], num), slab.shape[1]) for slab in mine] for rank in range(num)]
    parts = _exchange(sent, arriving, group, dtype)
    whole = [_apart(torch.cat(rows).unsqueeze(0), slab, steps)[0] for slab, *rows in zip(mine, *parts, strict=True)]
    splits = [[_rows_of(rank, slab.shape[0], num) for rank in range(num)] for slab in mine]
    answers = [list(rows) for rows in zip(*(w.split(s) for w, s in zip(whole, splits, strict=True)), strict=True)]
    back = _exchange(answers or [[]] * num, [[tuple(rows.shape) for rows in each] for each in sent], group, dtype)
    for owner, rows in enumerate(back):
        for i, found in zip(owned[owner], rows, strict=True):
            slab, index = matrices[i]
            slab.rows[index] = found.to(slab.rows.dtype)


def _deal(shapes: Sequence[tuple[int, int]], num: int) -> list[list[int]]:
    """Matrices by owner: the dearest first, each to whoever has least to do. The same on every rank."""
    owned: list[list[int]] = [[] for _ in range(num)]
    load = [0] * num
    for i in sorted(range(len(shapes)), key=lambda i: (-_cost(shapes[i]), i)):
        owner = load.index(min(load))
        owned[owner].append(i)
        load[owner] += _cost(shapes[i])
    return owned


def _cost(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * min(shape)


def _rows_of(rank: int, rows: int, num: int) -> int:
    """How FSDP deals rows: equal runs, and what is left of them for the last ranks."""
    run = -(-rows // num)
    return max(0, min(rows - rank * run, run))


def _exchange(
    sent: Sequence[Sequence[Tensor]],
    arriving: Sequence[Sequence[tuple[int, ...]]],
    group: dist.ProcessGroup,
    dtype: torch.dtype,
) -> list[list[Tensor]]:
    """`sent[n]` goes to rank n; what comes from rank n has the shapes `arriving[n]`."""
    device = next((tensor.device for each in sent for tensor in each), torch.device("cpu"))
    buffer = torch.cat([torch.empty(0, dtype=dtype, device=device), *(t.reshape(-1) for each in sent for t in each)])
    sizes = [[rows * columns for rows, columns in each] for each in arriving]
    received = buffer.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        received, buffer, list(map(sum, sizes)), [sum(t.numel() for t in each) for each in sent], group=group
    )
    pieces = iter(received.split([size for each in sizes for size in each]))
    return [[next(pieces).view(shape) for shape in each] for each in arriving]


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.is_cuda else x.dtype


def _apart(x_MRC: Tensor, slab: _Slab, steps: int) -> Tensor:
    """Each part of each matrix orthogonalised by itself."""
    if slab.is_across:
        parts = x_MRC.unflatten(2, (slab.parts, -1)).transpose(1, 2)
    else:
        parts = x_MRC.unflatten(1, (slab.parts, -1))
    done = newton_schulz(parts, steps)
    return (done.transpose(1, 2).flatten(2) if slab.is_across else done.flatten(1, 2)).to(x_MRC.dtype)


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Matrices [..., R, C] with their singular values brought near 1, in bfloat16 on a GPU."""
    a, b, c = _QUINTIC
    is_tall = x.shape[-2] > x.shape[-1]
    y = (x.transpose(-2, -1) if is_tall else x).to(_working_dtype(x))
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = y @ y.transpose(-2, -1)
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.transpose(-2, -1) if is_tall else y
