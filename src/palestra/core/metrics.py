"""Metrics that know how to be added: the sum of two parts is the value of the whole.

A mean is kept as (total, count), so a mean over ranks, packs or steps is never a mean of means.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct


class Mean(Struct, frozen=True, tag="mean"):
    """A mean that adds: `Mean(6, 3) + Mean(2, 1)` is 2.0, not 2.0 and 2.0 averaged."""

    total: float
    count: float = 1

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


class Sum(Struct, frozen=True, tag="sum"):
    """An amount that accumulates: tokens, seconds, rollouts."""

    total: float

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


class Max(Struct, frozen=True, tag="max"):
    """The largest seen."""

    largest: float

    def __add__(self, other: "Max") -> "Max":
        return Max(max(self.largest, other.largest))

    @property
    def value(self) -> float:
        return self.largest


class Last(Struct, frozen=True, tag="last"):
    """A reading, such as a learning rate: the later one replaces the earlier one."""

    reading: float

    def __add__(self, other: "Last") -> "Last":
        return other

    @property
    def value(self) -> float:
        return self.reading


Metric = Mean | Sum | Max | Last
Metrics = dict[str, Metric]


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Add metrics of the same name. Errors: TypeError where one name has two kinds."""
    merged: Metrics = {}
    for part in parts:
        add_to(merged, part)
    return merged


def add_to(merged: Metrics, part: Mapping[str, Metric]) -> None:
    """Add `part` to `merged`, in place. Errors: TypeError where one name has two kinds."""
    for name, metric in part.items():
        known = merged.get(name)
        if known is not None and type(known) is not type(metric):
            raise TypeError(f"metric {name} is a {type(known).__name__} and a {type(metric).__name__}; use one kind")
        merged[name] = metric if known is None else known + metric  # pyright: ignore[reportOperatorIssue]


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers, for JSON and people."""
    return {name: metric.value for name, metric in metrics.items()}


def percentile(numbers: Sequence[float], share: float) -> float:
    """The smallest of the numbers that at least `share` of them do not exceed; 0 for none."""
    ordered = sorted(numbers)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0
