"""DPPO: a trust region on the divergence of the policies instead of a clipped ratio. Legend: T packed tokens."""

from typing import Literal

import torch
from torch import Tensor

from palestra.algo.losses.ratio import log_ratio, mismatch_stats, only_where, reinforce
from palestra.algo.losses.term import LossTerm, mean_parts


def dppo(
    trainer_logp_T: Tensor,
    engine_logp_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    rollout_T: Tensor,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    delta_low: float = 0.15,
    delta_high: float = 0.15,
    cap: float = 20.0,
) -> LossTerm:
    """loss = -w m stop_gradient(min(r, cap)) A logp; m = 0 where the update would leave the trust region, else 1.

    With p = exp(trainer) and q = exp(engine) of the sampled token and D the divergence of "this token or another"
    under both policies, a token is masked if A > 0, r > 1 and D > delta_high, or if A < 0, r < 1 and D > delta_low.
    D is |p - q| ("tv") or q log(q/p) + (1-q) log((1-q)/(1-p)) ("kl": take thresholds near 0.05). The gradient is
    -w m min(r, cap) A d(logp); the value is not the objective. `rollout_T` is not used.

    Source: Qi et al. 2026, arXiv:2602.04879, equations 11 to 14; thresholds and cap: its authors' code in verl.
    """
    trained_T = weight_T != 0
    log_ratio_T = log_ratio(trainer_logp_T, engine_logp_T, weight_T).detach()
    divergence_T = DIVERGENCES[divergence](trainer_logp_T.detach(), engine_logp_T)
    above_T = (advantage_T > 0) & (log_ratio_T > 0) & (divergence_T > delta_high)
    below_T = (advantage_T < 0) & (log_ratio_T < 0) & (divergence_T > delta_low)
    coefficient_T = weight_T * log_ratio_T.exp().clamp(max=cap) * advantage_T
    loss_T = reinforce(only_where(~(above_T | below_T), coefficient_T), trainer_logp_T, trained_T)
    stats = mismatch_stats(log_ratio_T, trained_T)
    stats["divergence"] = mean_parts(divergence_T.double(), trained_T)
    stats["masked_above"] = mean_parts(above_T.double(), trained_T)
    stats["masked_below"] = mean_parts(below_T.double(), trained_T)
    return LossTerm(loss_T, stats)


def binary_tv(trainer_logp_T: Tensor, engine_logp_T: Tensor) -> Tensor:
    """Total variation between the two policies, each reduced to "the sampled token or another"."""
    return (trainer_logp_T.exp() - engine_logp_T.exp()).abs()


def binary_kl(trainer_logp_T: Tensor, engine_logp_T: Tensor) -> Tensor:
    """KL(engine || trainer), each reduced to "the sampled token or another". log(1 - p) is finite for p = 1 too."""
    q_T = engine_logp_T.exp()
    log_other_p_T, log_other_q_T = _log1m_exp(trainer_logp_T), _log1m_exp(engine_logp_T)
    return q_T * (engine_logp_T - trainer_logp_T) + (1 - q_T) * (log_other_q_T - log_other_p_T)


def _log1m_exp(logp_T: Tensor) -> Tensor:
    """log(1 - exp(logp)) with 1 - p at least the resolution of the type."""
    return (-torch.expm1(logp_T)).clamp(min=torch.finfo(logp_T.dtype).eps).log()


DIVERGENCES = {"tv": binary_tv, "kl": binary_kl}
