"""Rewards of one group in, advantages out.

Legend: G members of a group. NaN stands for a member without a reward (an invalid rollout): it takes no part in
the baseline or the scale, and its advantage is 0, which trains nothing.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SCALE_FLOOR = 1e-6  # rewards that differ by rounding alone are not blown up to +-1

Rewards = Sequence[float] | NDArray[np.floating]


def advantages(
    rewards_G: Rewards,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["none", "std"] = "none",
    given_baseline: float | None = None,
    given_scale: float | None = None,
) -> NDArray[np.float64]:
    """How much better than its baseline each member did.

    `mean` subtracts the mean of the valid members, `leave_one_out` the mean of the other valid members (0 for a
    member that has none). `std` divides by the population standard deviation of the valid members, at least 1e-6.
    A member that trains after its group did is given what the group was trained with: `given_baseline`, and with
    `scale="std"` also `given_scale` (see `group_baseline` and `group_scale`); `baseline` is then not used. A given
    scale of 1e-6 or less is none: what never differed says nothing of how large a difference is.

    Shapes:  [G] in, [G] out, float64.
    Keeps:   with `mean` the valid advantages sum to 0; equal rewards give exactly 0.
    Errors:  ValueError for an infinite reward, or for `given_baseline` with `scale="std"` and no `given_scale`.
    Source:  mean: INTELLECT-3, arXiv:2512.16144; std: GRPO, arXiv:2402.03300; leave-one-out: RLOO, arXiv:2402.14740.
    """
    if given_baseline is not None and scale == "std" and given_scale is None:
        raise ValueError('scale="std" with a given_baseline needs the given_scale of the same group; pass both')
    rewards_G = _checked(rewards_G)
    if given_baseline is not None:
        advantage_G = rewards_G - given_baseline
    else:
        advantage_G = _centered(rewards_G)
        num_valid = np.count_nonzero(~np.isnan(rewards_G))
        if baseline == "leave_one_out" and num_valid > 1:  # r - mean(others) = (r - mean(all)) * n / (n - 1)
            advantage_G = advantage_G * num_valid / (num_valid - 1)
    if scale == "std":
        advantage_G = advantage_G / (group_scale(rewards_G) if given_scale is None else _usable(given_scale))
    return np.nan_to_num(advantage_G, nan=0.0)


def _usable(scale: float) -> float:
    return scale if scale > SCALE_FLOOR else 1.0


def group_baseline(rewards_G: Rewards) -> float:
    """Mean reward of the valid members: what to store for members that train later. ValueError if none is valid."""
    valid = _valid(_checked(rewards_G))
    if not len(valid):
        raise ValueError("the group has no valid member, so it has no baseline; drop the group")
    return float(valid[0] + np.mean(valid - valid[0]))


def group_scale(rewards_G: Rewards) -> float:
    """Population standard deviation of the valid members, at least 1e-6."""
    valid = _valid(_checked(rewards_G))
    return max(float(np.std(valid - valid[0])), SCALE_FLOOR) if len(valid) else SCALE_FLOOR


def _checked(rewards_G: Rewards) -> NDArray[np.float64]:
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if rewards.ndim != 1:
        raise ValueError(f"rewards of one group are a flat list, got shape {rewards.shape}; pass one group at a time")
    if np.isinf(rewards).any():
        member = int(np.flatnonzero(np.isinf(rewards))[0])
        raise ValueError(f"reward of member {member} is {rewards[member]}; a reward is finite, or NaN if there is none")
    return rewards


def _valid(rewards_G: NDArray[np.float64]) -> NDArray[np.float64]:
    return rewards_G[~np.isnan(rewards_G)]


def _centered(rewards_G: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rewards minus their mean, measured from the first valid one, so that equal rewards give exactly 0."""
    valid = _valid(rewards_G)
    if not len(valid):
        return rewards_G
    from_first_G = rewards_G - valid[0]
    return from_first_G - np.nanmean(from_first_G)
