"""What rollouts ask for: drawn for each group by its number, so that two settings with one seed get the same tasks."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from palestra.orchestrate.simulate.curves import LogNormal, Recorded

_NEAR = 0.05  # of the run: how far from its own place a recorded group may be used again
_FEW = 8  # groups to choose among, at least


@dataclass(frozen=True, slots=True)
class Want:
    """What one rollout takes, all its turns together."""

    prompt_tokens: int
    sampled_tokens: int
    turns: int
    env_s: float


@dataclass(frozen=True, slots=True)
class GroupWant:
    members: list[Want]
    trains: bool


class Work:
    """Groups of `group_size` rollouts."""

    def __init__(self, law: LogNormal | Recorded, *, group_size: int, seed: int):
        self._law, self._size, self._seed = law, group_size, seed
        self._positions = [group.position for group in law.groups] if isinstance(law, Recorded) else []

    def group(self, group_id: int, position: float) -> GroupWant:
        """`position`: share of the run's steps that have their batch."""
        rng = np.random.default_rng((self._seed, group_id))
        if isinstance(self._law, Recorded):
            return self._again(self._law, position, rng)
        return self._by_law(self._law, rng)

    def _by_law(self, law: LogNormal, rng: np.random.Generator) -> GroupWant:
        trains = bool(rng.random() >= law.zero_signal)
        common, own = rng.standard_normal(), rng.standard_normal(self._size)
        spread = law.group_share**0.5 * common + (1 - law.group_share) ** 0.5 * own
        tokens = np.clip(np.rint(law.median_tokens * np.exp(law.sigma * spread)), 1, law.max_tokens).astype(int)
        members = [Want(law.prompt_tokens, count, law.turns, law.env_s) for count in tokens.tolist()]
        return GroupWant(members, trains)

    def _again(self, law: Recorded, position: float, rng: np.random.Generator) -> GroupWant:
        low, high = bisect_left(self._positions, position - _NEAR), bisect_left(self._positions, position + _NEAR)
        if high - low < _FEW:
            low = max(min(low, len(law.groups) - _FEW), 0)
            high = low + _FEW
        group = law.groups[int(rng.integers(low, min(high, len(law.groups))))]
        known = len(group.sampled_tokens)
        chosen = range(known) if known == self._size else rng.choice(known, self._size, replace=known < self._size)
        members = [
            Want(group.prompt_tokens[i], group.sampled_tokens[i], group.turns[i], group.env_s[i]) for i in chosen
        ]
        return GroupWant(members, group.trains)
