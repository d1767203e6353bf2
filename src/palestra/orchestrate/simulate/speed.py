"""From when rollouts were in flight and what they sampled, to how fast an engine is with how many of them.

Legend: R rollouts, K knots of concurrency, B moments at which a rollout came or went.

The model is the simulator's own: a request gets c(n) tokens per second while n are running, so a rollout's tokens are
the sum of c(n) over its time. A rollout's mean speed alone would not do: the last ones of a tail began in a crowd. What
prefilling costs is contained in c.
"""

from dataclasses import dataclass

import numpy as np

from palestra.orchestrate.simulate.curves import EngineCurve

_MIN_SHARE = 0.002  # of the rollouts' time, near a knot; others are left out
_ROUNDS = 8


@dataclass(frozen=True)
class Flights:
    """Rollouts that ran to their end. Shapes: [R] each. `share` of their time they waited for an engine."""

    began_s: np.ndarray
    ended_s: np.ndarray
    tokens: np.ndarray
    share: np.ndarray


@dataclass(frozen=True)
class Stop:
    """An engine stood still for `part` of the time in between."""

    began_s: float
    ended_s: float
    part: float


def fit_speed(flights: Flights, stops: list[Stop], *, engines: int) -> EngineCurve:
    """Errors: ValueError, if nothing ran."""
    knots_K, exposure_RK = _covered(flights, stops, engines)
    total_K = _speed(exposure_RK, flights.tokens) * knots_K
    return EngineCurve(concurrency=tuple(knots_K.tolist()), tokens_per_s=tuple(total_K.tolist()))


def relative_speed(flights: Flights, stops: list[Stop], curve: EngineCurve, *, engines: int) -> float:
    """The tokens there were over those that `curve` would have given in the same time. Errors: as `fit_speed`."""
    knots_K, exposure_RK = _covered(flights, stops, engines)
    speed_K = np.array([curve.per_request(knot) for knot in knots_K])
    return float(flights.tokens.sum() / (exposure_RK @ speed_K).sum())


def _running(flights: Flights, moments_B: np.ndarray) -> np.ndarray:
    """Requests at the engines from each moment to the next."""
    change_B = np.zeros(len(moments_B))
    np.add.at(change_B, np.searchsorted(moments_B, flights.began_s), flights.share)
    np.add.at(change_B, np.searchsorted(moments_B, flights.ended_s), -flights.share)
    return np.maximum(np.cumsum(change_B), 0.0)


def _going(moments_B: np.ndarray, stops: list[Stop]) -> np.ndarray:
    """Seconds from each moment to the next that an engine was not stopped."""
    going_B = np.append(np.diff(moments_B), 0.0)
    for stop in stops:
        going_B[np.searchsorted(moments_B, stop.began_s) : np.searchsorted(moments_B, stop.ended_s)] *= 1 - stop.part
    return going_B


def _covered(flights: Flights, stops: list[Stop], engines: int) -> tuple[np.ndarray, np.ndarray]:
    """The knots that rollouts spent time near, and that time. Errors: ValueError, if nothing ran."""
    edges = [edge for stop in stops for edge in (stop.began_s, stop.ended_s)]
    moments_B = np.unique(np.concatenate([flights.began_s, flights.ended_s, edges]))
    running_B, going_B = _running(flights, moments_B) / engines, _going(moments_B, stops)
    if not running_B.any():
        raise ValueError("no rollout was in flight")
    knots_K = _knots(running_B.max())
    while True:
        exposure_RK = _exposure(flights, moments_B, running_B, going_B, knots_K)
        shares_K = exposure_RK.sum(0) / exposure_RK.sum()
        if len(knots_K) == 1 or shares_K.min() >= _MIN_SHARE:
            return knots_K, exposure_RK
        knots_K = np.delete(knots_K, int(shares_K.argmin()))


def _knots(highest: float) -> np.ndarray:
    """1, 2, 4, ... and the highest concurrency there was."""
    knots = 2.0 ** np.arange(max(int(np.log2(max(highest, 1.0))), 0) + 1)
    return np.unique(np.append(knots[knots < 0.8 * highest], max(highest, 1.0)))


def _exposure(
    flights: Flights, moments_B: np.ndarray, running_B: np.ndarray, going_B: np.ndarray, knots_K: np.ndarray
) -> np.ndarray:
    """[R, K]: seconds that each rollout spent near each knot, shared between the two next to its concurrency."""
    log_running_B = np.log(np.maximum(running_B, 1e-9))
    hats_BK = np.stack([np.interp(log_running_B, np.log(knots_K), row) for row in np.eye(len(knots_K))], 1)
    until_BK = np.concatenate([np.zeros((1, len(knots_K))), np.cumsum(hats_BK * going_B[:, None], 0)])
    begin, end = np.searchsorted(moments_B, flights.began_s), np.searchsorted(moments_B, flights.ended_s)
    return (until_BK[end] - until_BK[begin]) * flights.share[:, None]


def _speed(exposure_RK: np.ndarray, tokens_R: np.ndarray) -> np.ndarray:
    """[K]: tokens per second of a request near each knot.

    Each rollout's tokens are shared out over its time, evenly first, then in proportion to the speed found so far
    (expectation maximisation). After every round all rollouts together get the tokens they had; few rounds, since many
    would follow the noise.
    """
    seconds_K = exposure_RK.sum(0)
    speed_K = np.ones(len(seconds_K))
    for _ in range(_ROUNDS):
        expected_R = np.maximum(exposure_RK @ speed_K, 1e-9)
        speed_K = speed_K * (exposure_RK.T @ (tokens_R / expected_R)) / seconds_K
    return speed_K
