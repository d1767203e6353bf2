"""Masks over whole rollouts, for any policy loss. Legend: T packed tokens."""

import math
from dataclasses import dataclass

from torch import Tensor

from palestra.algo.losses.ratio import log_ratio, mean_in_rollout, only_where, rollout_parts
from palestra.algo.losses.term import LossTerm, PolicyLoss, mean_parts


@dataclass(frozen=True)
class RolloutMasks:
    """What is masked, judged by the mean of log r over the trained tokens of a rollout, all its samples in the pack.

    Geometric: every token of a rollout whose geometric mean ratio exp(mean log r) is outside
    [`geometric_low`, `geometric_high`]: a bound that does not tighten with length, as one on the product would.
    Negative: the tokens of negative advantage of a rollout with mean(-log r) > `negative_mismatch`: what the policy has
    left behind is not pushed further away. mean(-log r) estimates KL(engine || trainer) on the rollout.

    Source: geometric: Liu et al. 2025, "When speed kills stability" (geometric sequence masking);
            negative: DeepSeek-V3.2, arXiv:2512.02556, off-policy sequence masking.
    """

    geometric_low: float = 0.0
    geometric_high: float = math.inf
    negative_mismatch: float = math.inf

    @property
    def is_off(self) -> bool:
        return self == RolloutMasks()


def with_masks(loss: PolicyLoss, masks: RolloutMasks) -> PolicyLoss:
    """`loss` with a gradient of 0 on what `masks` takes out; masked tokens still count in its normalisation.

    The loss's own statistics stay those of all trained tokens. Added to them, as shares of rollouts:
    `masked_geometric`, `masked_negative`; as a share of tokens: `masked_by_rollout`.
    A NaN is not masked: the loss becomes NaN and shows it.
    """
    if masks.is_off:
        return loss

    def masked(
        trainer_logp_T: Tensor, engine_logp_T: Tensor, advantage_T: Tensor, weight_T: Tensor, rollout_T: Tensor
    ) -> LossTerm:
        term = loss(trainer_logp_T, engine_logp_T, advantage_T, weight_T, rollout_T)
        trained_T = weight_T != 0
        log_ratio_T = log_ratio(trainer_logp_T.detach(), engine_logp_T, weight_T)
        mean_T = mean_in_rollout(log_ratio_T, trained_T, rollout_T)
        geometric_T = trained_T & ((mean_T.exp() < masks.geometric_low) | (mean_T.exp() > masks.geometric_high))
        negative_T = trained_T & (-mean_T > masks.negative_mismatch) & (advantage_T < 0)
        masked_T = geometric_T | negative_T
        stats = {
            "masked_geometric": rollout_parts(geometric_T, trained_T, rollout_T),
            "masked_negative": rollout_parts(negative_T, trained_T, rollout_T),
            "masked_by_rollout": mean_parts(masked_T.double(), trained_T),
        }
        return LossTerm(only_where(~masked_T, term.loss_T), term.stats | stats)

    return masked
