"""The law of lengths: log-normal, cut off at a multiple of its median; the same lengths for the same seeds."""

import math
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class LengthLaw:
    """Tokens of a reply: `median * exp(sigma * z)` for a standard normal z, at least 1 and at most `cap` medians."""

    median: int
    sigma: float = 1.0
    cap: float = 16.0

    @property
    def longest(self) -> int:
        return max(1, int(self.cap * self.median))

    @property
    def mean(self) -> float:
        """Of the law, before it is rounded to whole tokens."""
        if self.sigma == 0:
            return float(self.median)
        cut = math.log(self.cap) / self.sigma  # in standard deviations
        below = math.exp(self.sigma**2 / 2) * _normal_share(cut - self.sigma)
        return self.median * (below + self.cap * (1 - _normal_share(cut)))

    def draw(self, random: Random) -> int:
        """Takes one number of `random`: the first draw of a rollout's own chance is its length."""
        return self.at(random.gauss(0.0, 1.0))

    def at(self, z: float) -> int:
        """The length at `z` standard deviations from the median."""
        return min(max(1, round(self.median * math.exp(self.sigma * z))), self.longest)


def _normal_share(z: float) -> float:
    """Of a standard normal variable, below z."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
