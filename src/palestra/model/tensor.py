"""Tensor parallelism: ranks that hold parts of the same matrices, and compute one token together.

Legend: T tokens of this rank, t those of them in this rank's part, P ranks of the axis, I inputs and O outputs of a
linear layer.

All ranks of the axis have the same hidden states, and every gradient of them is whole on each. Between a layer that is
split by outputs and the next that is split by inputs, a rank has its own features alone, and gradients there are its
own part: what enters has its gradient summed over the ranks, in every backward pass by itself, and what leaves is the
sum of the ranks' outputs (Shoeybi et al. 2019, arXiv:1909.08053, f and g). `tensor_plan` says what is split.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

OUT, IN = 0, 1  # dimensions of a linear layer's weight
SPLIT = {"colwise": OUT, "colwise_gather_output": OUT, "rowwise": IN, "rowwise_split_input": IN}
"""transformers' words for how a linear layer is split; by the dimension of its weight."""
LATENT = "mla_kv_a_proj"
"""And for a whole one whose last outputs go to the heads directly."""


class Axis:
    """One rank that holds whole matrices: everything is what it is. `_sum` and `_all` are of the ranks."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    def enter(self, x: Tensor) -> Tensor:
        """The same, for a rank's own features: gradients are summed."""
        return x if self.size == 1 else _Enter.apply(x, self)

    def enter_last(self, x: Tensor, width: int) -> Tensor:
        """The same, of whose last features alone that is true."""
        return x if self.size == 1 else _EnterLast.apply(x, self, width)

    def leave(self, x: Tensor) -> Tensor:
        """The sum of what the ranks have."""
        return x if self.size == 1 else _Leave.apply(x, self)

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of what all have, as torch.chunk cuts; the gradient is that of all parts."""
        return x if self.size == 1 else _Part.apply(x, self, dim)

    def gather(self, x: Tensor, total: int, dim: int = 0) -> Tensor:
        """All parts in a row, `total` long. Every rank goes on to compute the same from them."""
        return x if self.size == 1 else _Gather.apply(x, self, total, dim)

    def counted(self, x: Tensor) -> Tensor:
        """The same, for what is used for a rank's part of the tokens alone, and whose gradients FSDP takes the mean of
        over the axis: they count as often as there are ranks."""
        return x if self.size == 1 else _Counted.apply(x, self)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        full = -(-x.shape[dim] // self.size)
        low, high = (min(x.shape[dim], full * index) for index in (self.rank, self.rank + 1))
        return x.narrow(dim, low, high - low)

    def join(self, x: Tensor, total: int, dim: int) -> Tensor:
        """Parts may be shorter at the end: they travel padded."""
        rows, full = x.movedim(dim, 0), -(-total // self.size)
        if missing := full - rows.shape[0]:
            rows = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))
        joined = self.all(rows.contiguous())
        if total != len(joined):
            joined = joined[:total].clone()  # no view of what is longer
        return joined.movedim(0, dim).contiguous() if dim else joined

    def sum(self, x: Tensor) -> Tensor:
        return x

    def all(self, rows: Tensor) -> Tensor:
        return rows


ALONE = Axis()


class TensorRanks(Axis):
    def __init__(self, group: dist.ProcessGroup):
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def sum(self, x: Tensor) -> Tensor:
        return _arrived(collectives.all_reduce(x.contiguous(), "sum", self._group))

    def all(self, rows: Tensor) -> Tensor:
        return _arrived(collectives.all_gather_single(rows, 0, self._group))


class Pretended(Axis):
    """The first of ranks that are not there: shapes and the graph of gradients are right, values are not."""

    def sum(self, x: Tensor) -> Tensor:
        return x.clone()

    def all(self, rows: Tensor) -> Tensor:
        return torch.cat([rows] * self.size)


def _arrived(x: Any) -> Tensor:
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum(grads[0]), None


class _EnterLast(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, width: int) -> Tensor:
        ctx.axis, ctx.width = axis, width
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        latent, direct = grads[0].tensor_split([-ctx.width], dim=-1)
        return torch.cat([latent, ctx.axis.sum(direct)], dim=-1), None, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Part(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim, ctx.total = axis, dim, x.shape[dim]
        return axis.cut(x, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.join(grads[0], ctx.total, ctx.dim), None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, total: int, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.join(x, total, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.cut(grads[0], ctx.dim), None, None, None


class _Counted(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.size = axis.size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.size, None


# --- what is installed on a model's modules


Change = Callable[[Any], Any]


class Seen:
    """A module as its own forward sees it: some of its parameters are changed on their way."""

    def __init__(self, module: nn.Module, changes: Mapping[str, Change]):
        self._module, self._changes = module, changes

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        change = self._changes.get(name)
        return found if change is None or found is None else change(found)

    def whole(self, name: str) -> Any:
        return getattr(self._module, name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = type(self._module)
        return own.forward(self, *args, **kwargs)


class Door:
    """Where hidden states enter a block: layers that are given the same tensor share one sum of its gradient."""

    def __init__(self, axis: Axis, block: nn.Module):
        self._axis = axis
        self._seen: tuple[Tensor, Tensor] | None = None
        block.register_forward_hook(self._close)

    def __call__(self, x: Tensor) -> Tensor:
        if self._seen is None or self._seen[0] is not x:
            self._seen = x, self._axis.enter(x)
        return self._seen[1]

    def _close(self, *_: Any) -> None:
        self._seen = None


def split_linear(module: nn.Module, style: str, axis: Axis, door: Door) -> None:
    """Compute with this rank's part of a linear layer; `cut_parameters` leaves it only that."""
    seen = Seen(module, {"weight": _local, "bias": _local if SPLIT[style] == OUT else _without})
    module.forward = partial(_FORWARDS[style], seen, axis, door)  # pyright: ignore[reportAttributeAccessIssue]


def _colwise(seen: Seen, axis: Axis, door: Door, x: Tensor) -> Tensor:
    return seen.run(door(x))


def _colwise_gathered(seen: Seen, axis: Axis, door: Door, x: Tensor) -> Tensor:
    return axis.gather(seen.run(door(x)), seen.out_features, x.dim() - 1)


def _rowwise(seen: Seen, axis: Axis, door: Door, x: Tensor) -> Tensor:
    """The bias is whole on every rank, and added once."""
    out, bias = axis.leave(seen.run(x)), seen.whole("bias")
    return out if bias is None else out + bias


def _rowwise_parted(seen: Seen, axis: Axis, door: Door, x: Tensor) -> Tensor:
    return _rowwise(seen, axis, door, axis.part(x, x.dim() - 1))


_FORWARDS = {
    "colwise": _colwise,
    "colwise_gather_output": _colwise_gathered,
    "rowwise": _rowwise,
    "rowwise_split_input": _rowwise_parted,
}


def share_latent(module: nn.Module, axis: Axis, width: int) -> None:
    """The last `width` outputs of a whole layer go to each rank's heads without another layer between."""
    plain = module.forward
    module.forward = lambda x: axis.enter_last(plain(x), width)  # pyright: ignore[reportAttributeAccessIssue]


def share_parameters(module: nn.Module, names: Mapping[str, bool], axis: Axis) -> None:
    """Whole parameters that a rank uses for its own heads. Where it says so, there is a value for each head."""
    changes = {name: axis.part if by_head else axis.enter for name, by_head in names.items()}
    module.forward = Seen(module, changes).run  # pyright: ignore[reportAttributeAccessIssue]


def cut_parameters(module: nn.Module, style: str, axis: Axis, mesh: DeviceMesh | None) -> None:
    """Leave a linear layer this rank's part, on a mesh of one axis; without one, of the axis that is pretended."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if name == "bias" and SPLIT[style] == IN:
            continue
        dim = SPLIT[style]
        if mesh is None:
            part: Tensor = axis.cut(parameter.data, dim)
        else:
            part = distribute_tensor(parameter.data, mesh, [Shard(dim)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _without(parameter: Tensor) -> None:
    return None
