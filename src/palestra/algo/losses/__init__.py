"""The losses: functions over one pack, one file each; torch tensors in, a `LossTerm` out.

Legend: T packed tokens. All policy losses take (trainer_logp_T, engine_logp_T, advantage_T, weight_T, rollout_T):
  log-probabilities of the sampled tokens at the sampling temperature, float32 or wider, by who computed them;
  weight_T is 0 where a token is not trained; rollout_T (int64, 0..R-1) is each token's rollout in the pack.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from palestra.algo.losses.cispo import cispo
from palestra.algo.losses.cross_entropy import cross_entropy
from palestra.algo.losses.dppo import DIVERGENCES, dppo
from palestra.algo.losses.gspo import gspo
from palestra.algo.losses.masks import RolloutMasks, with_masks
from palestra.algo.losses.mis import masked_importance_sampling
from palestra.algo.losses.none import no_correction
from palestra.algo.losses.ppo_clip import ppo_clip
from palestra.algo.losses.ratio import effective_sample_share
from palestra.algo.losses.reference_kl import reference_kl
from palestra.algo.losses.term import LossTerm, PolicyLoss
from palestra.algo.losses.tis import truncated_importance_sampling

__all__ = [
    "LOSSES",
    "LossTerm",
    "PolicyLoss",
    "RolloutMasks",
    "cross_entropy",
    "effective_sample_share",
    "policy_loss",
    "reference_kl",
    "with_masks",
]


LOSSES: dict[str, PolicyLoss] = {
    "mis": masked_importance_sampling,
    "tis": truncated_importance_sampling,
    "cispo": cispo,
    "gspo": gspo,
    "dppo": dppo,
    "ppo_clip": ppo_clip,
    "none": no_correction,
}


def policy_loss(name: str, options: Mapping[str, Any] | None = None) -> PolicyLoss:
    """The loss called `name` with its keyword options bound.

    Errors: ValueError for an unknown name or option, or a band whose low end is not below its high end.
    """
    if name not in LOSSES:
        raise ValueError(f"algo.loss={name!r} is not known; choose one of {', '.join(LOSSES)}")
    known = {
        option: parameter.default
        for option, parameter in inspect.signature(LOSSES[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        choices = ", ".join(f"{option}={default}" for option, default in known.items())
        raise ValueError(f"algo.loss={name!r} has no option {', '.join(unknown)}; it has {choices}")
    for option, value in (options or {}).items():
        if isinstance(known[option], float) and not isinstance(value, int | float):
            raise ValueError(f"algo.loss_args.{option}={value!r} is not a number")
    bound = known | dict(options or {})
    if (divergence := bound.get("divergence", "tv")) not in DIVERGENCES:
        known_ones = ", ".join(DIVERGENCES)
        raise ValueError(f"algo.loss_args.divergence={divergence!r} is not known; choose one of {known_ones}")
    if "low" in bound and not bound["low"] < bound["high"]:
        raise ValueError(
            f"algo.loss={name!r} got low={bound['low']} and high={bound['high']}; low must be less than high"
        )
    return partial(LOSSES[name], **bound)
