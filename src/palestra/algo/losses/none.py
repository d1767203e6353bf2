"""No importance correction: what the others are measured against. Legend: T packed tokens."""

from torch import Tensor

from palestra.algo.losses.ratio import log_ratio, mismatch_stats, reinforce
from palestra.algo.losses.term import LossTerm


def no_correction(
    trainer_logp_T: Tensor,
    engine_logp_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    rollout_T: Tensor,
) -> LossTerm:
    """loss = -w A logp, as if the engine's policy were the trainer's: the ratio counts as 1 for every token.

    The gradient is -w A d(logp); the value is not the objective. `engine_logp_T` enters the statistics only,
    `rollout_T` is not used. A control for experiments: off policy its gradient is biased.

    Source: Williams 1992, "Simple statistical gradient-following algorithms" (REINFORCE).
    """
    trained_T = weight_T != 0
    loss_T = reinforce(weight_T * advantage_T, trainer_logp_T, trained_T)
    return LossTerm(loss_T, mismatch_stats(log_ratio(trainer_logp_T, engine_logp_T, weight_T), trained_T))
