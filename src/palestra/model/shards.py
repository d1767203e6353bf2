"""Weights out of the policy from where they lie: each rank's part of a tensor where a checkpoint has what such parts
make up, and the whole tensor on every rank where it does not.

Whole come experts that a checkpoint names one by one, what ranks hold in another order than theirs or in unequal parts
(experts of several owners, matrices of a tensor axis, uneven rows), what lies in too many parts, and buffers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from palestra.model.export import by_layer, layout, published, whole_as
from palestra.model.holdings import even_dim
from palestra.model.policy import Policy


@dataclass(frozen=True)
class Lying:
    """A tensor of a checkpoint. `dim`: that of which each rank has one part of those of its copy, in the order of
    ranks; None: each has all of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int | None


@dataclass(frozen=True)
class _Layer:
    parts: dict[str, Lying]  # by the policy's name
    whole: list[Lying]


@dataclass(frozen=True)
class ShardedWeights:
    """`copies` of the weights lie one after the other on the ranks. At most `max_parts` may make up a tensor."""

    policy: Policy
    dtype: torch.dtype
    copies: int
    num_ranks: int
    max_parts: int

    @property
    def lying(self) -> list[Lying]:
        """In the order of `tensors`. No collective: only shapes are asked what a checkpoint makes of them."""
        return [tensor for layer in self._layers for tensor in (*layer.parts.values(), *layer.whole)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank has, layer by layer; what must come whole of one layer is gathered at a time.

        A collective: every rank must iterate to the end.
        """
        for group, layer in zip(self._groups(), self._layers, strict=True):
            for source, tensor in layer.parts.items():
                yield tensor.name, _part(group[source], self.dtype)
            rest = {name: tensor for name, tensor in group.items() if name not in layer.parts}
            if rest:
                yield from layout(self.policy, {name: whole_as(tensor, self.dtype) for name, tensor in rest.items()})

    @cached_property
    def _layers(self) -> list[_Layer]:
        return [self._plan(group) for group in self._groups()]

    def _groups(self) -> list[dict[str, Tensor]]:
        return by_layer(self.policy.model.state_dict(keep_vars=True))

    def _plan(self, group: dict[str, Tensor]) -> _Layer:
        """What a checkpoint has as it is here comes from its parts."""
        shapes = {name: published(tensor, self.dtype) for name, tensor in group.items()}
        sources = {id(shape): name for name, shape in shapes.items()}
        parts = {}
        for name, shape in layout(self.policy, dict(shapes)):
            source = sources.get(id(shape))
            if source is not None and (dim := self._dim(group[source])) is not None:
                parts[source] = Lying(name, shape.dtype, tuple(shape.shape), dim)
        rest = {name: shape for name, shape in shapes.items() if name not in parts}
        whole = layout(self.policy, rest) if rest else ()
        return _Layer(parts, [Lying(name, shape.dtype, tuple(shape.shape), None) for name, shape in whole])

    def _dim(self, tensor: Tensor) -> int | None:
        if not isinstance(tensor, DTensor) or self.num_ranks // self.copies > self.max_parts:
            return None
        return even_dim(
            tensor.shape, tensor.device_mesh, tensor.placements, copies=self.copies, num_ranks=self.num_ranks
        )


@torch.no_grad()
def _part(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().to(dtype)
