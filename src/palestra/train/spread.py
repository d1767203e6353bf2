"""How the ratio of the policies spreads, by age: quantiles from a histogram that adds over packs, ranks and steps.

Legend: K tokens of a pack that train something, A buckets of age, B bins of log r.

Quantiles of parts cannot be added, counts can. The bins of log r are one around 0, and on either side 16 per decade of
|log r| from 1e-4 to 20: a quantile is the geometric middle of its bin, within 7.5 % of the true one, and 0 where
|log r| < 1e-4.
"""

from functools import cache

import torch
from torch import Tensor

from palestra.core.metrics import Last, Metrics

AGE_BUCKETS = {"age_0": 0, "age_1": 1, "age_2": 2, "age_3_4": 3, "age_5_8": 5, "age_9_up": 9}
"""The smallest age of each bucket."""
QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}

_SMALLEST, _LARGEST, _PER_DECADE = 1e-4, 20.0, 16
_MAGNITUDES = [_SMALLEST * 10 ** (i / _PER_DECADE) for i in range(86)]  # the last one is above 20
_EDGES = torch.tensor([*(-m for m in reversed(_MAGNITUDES)), *_MAGNITUDES], dtype=torch.float64)
_NUM_BINS = len(_EDGES) + 1


def histogram(log_ratio_K: Tensor, age_K: Tensor, where_K: Tensor) -> Tensor:
    """Counts of the tokens in `where_K`, [A, B] float64, on their device, no host sync. NaN counts as the top."""
    device = log_ratio_K.device
    starts_A, edges_B = _bounds(device)
    bucket_K = torch.bucketize(age_K, starts_A, right=True) - 1
    log_r = torch.nan_to_num(log_ratio_K.detach().double(), nan=_LARGEST).clamp(-_LARGEST, _LARGEST)
    bin_K = torch.bucketize(log_r, edges_B)
    slots = torch.zeros(len(AGE_BUCKETS) * _NUM_BINS, dtype=torch.float64, device=device)
    return slots.index_add(0, bucket_K * _NUM_BINS + bin_K, where_K.double()).view(len(AGE_BUCKETS), _NUM_BINS)


@cache
def _bounds(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of ages and of bins. Copied once: the host waits for a copy until the device has done all it was asked before."""
    return torch.tensor(list(AGE_BUCKETS.values()), device=device), _EDGES.to(device)


def spread_metrics(counts_AB: Tensor) -> Metrics:
    """`train/rl/log_ratio/AGE/QUANTILE` of the ages that have tokens."""
    metrics: Metrics = {}
    for (name, _), counts_B in zip(AGE_BUCKETS.items(), counts_AB, strict=True):
        if counts_B.sum() > 0:
            metrics |= {
                f"train/rl/log_ratio/{name}/{quantile}": Last(_quantile(counts_B, share))
                for quantile, share in QUANTILES.items()
            }
    return metrics


def _quantile(counts_B: Tensor, share: float) -> float:
    """The middle of the bin that holds the smallest value which at least `share` of the tokens do not exceed."""
    reached = torch.searchsorted(counts_B.cumsum(0), share * counts_B.sum())
    return _middle(int(reached))


def _middle(index: int) -> float:
    if index == _NUM_BINS // 2:
        return 0.0
    low, high = (float(_EDGES[max(min(i, len(_EDGES) - 1), 0)]) for i in (index - 1, index))
    middle = min((low * high) ** 0.5, _LARGEST)
    return -middle if high < 0 else middle
