"""What a policy loss is, and what a loss returns. Legend: T packed tokens."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """One component of the loss over one pack, not yet normalised.

    Shapes: loss_T is [T], weighted, 0 where not trained. The trainer sums it and divides by the component's token
            count over all packs of the step on all ranks (tokens of weight != 0; masked ones count).
            Each of `stats` is [2], float64: (total, count). They add across packs, steps and ranks with `+`; the mean
            is total / count.
    """

    loss_T: Tensor
    stats: dict[str, Tensor]


class PolicyLoss(Protocol):
    """A policy loss with its options bound."""

    def __call__(
        self,
        trainer_logp_T: Tensor,
        engine_logp_T: Tensor,
        advantage_T: Tensor,
        weight_T: Tensor,
        rollout_T: Tensor,
    ) -> LossTerm: ...


def mean_parts(value_T: Tensor, where_T: Tensor) -> Tensor:
    """(total, count) of `value_T` where `where_T` is true, as a [2] tensor on the same device, without a host sync."""
    value_T = value_T.detach()
    total = torch.where(where_T, value_T, torch.zeros_like(value_T)).sum(dtype=torch.float64)
    return torch.stack((total, where_T.sum(dtype=torch.float64)))
