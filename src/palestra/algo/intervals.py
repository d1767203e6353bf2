"""How sure a number over tasks is: the bootstrap over tasks, which are drawn again as a whole, with putting back.

Legend: N tasks, B draws. Rollouts of one task are not independent, so a task is drawn with all its rollouts.
Source: Efron and Tibshirani 1993, chapter 13 (the percentile interval).
"""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

RESAMPLES = 2000
_AT_ONCE = 4_000_000  # drawn numbers in memory


class Interval(Struct, frozen=True, kw_only=True):
    """A number and the bounds that 95 % of the draws are within; None where one task alone tells nothing of others."""

    value: float
    low: float | None
    high: float | None


def over_tasks(
    sums: Sequence[float], counts: Sequence[float] | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Of the mean `sum(sums) / sum(counts)`; `counts` are 1 where they are left out. The same seed, the same bounds.

    Shapes: both are [N]. Errors: ValueError, if there is no task.
    """
    sum_N = np.asarray(sums, dtype=np.float64)
    count_N = np.ones_like(sum_N) if counts is None else np.asarray(counts, dtype=np.float64)
    num_tasks = len(sum_N)
    if not num_tasks or count_N.sum() <= 0:
        raise ValueError("no rollout has a reward")
    value = float(sum_N.sum() / count_N.sum())
    if num_tasks < 2:
        return Interval(value=value, low=None, high=None)
    drawn_B = _drawn(sum_N, count_N, np.random.default_rng(seed), resamples)
    low, high = np.quantile(drawn_B, (0.025, 0.975))
    return Interval(value=value, low=float(low), high=float(high))


def _drawn(sum_N: np.ndarray, count_N: np.ndarray, chance: np.random.Generator, resamples: int) -> np.ndarray:
    """The mean of each draw, [B]."""
    num_tasks = len(sum_N)
    each = max(_AT_ONCE // num_tasks, 1)
    found = []
    for begin in range(0, resamples, each):
        chosen = chance.integers(0, num_tasks, size=(min(each, resamples - begin), num_tasks))
        found.append(sum_N[chosen].sum(axis=1) / count_N[chosen].sum(axis=1))
    return np.concatenate(found)
