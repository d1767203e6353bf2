"""What a simulated run was like."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Tally:
    """Readings since the beginning, at the end of one step. Engine seconds are sums over all engines."""

    at_s: float
    trainer_waited_s: float
    generate_s: float
    prefill_s: float
    publish_s: float
    lent_s: float
    in_flight_s: float  # rollouts in flight, times seconds
    ended: int  # rollouts
    ended_s: float  # the seconds these were in flight, in all
    sampled_tokens: float
    too_old: int  # rollouts
    groups_closed: int
    groups_dropped: int  # without signal


@dataclass
class Course:
    """Step by step: tallies, and the ages of the rollouts each step trained."""

    engines: int
    tallies: list[Tally] = field(default_factory=list)
    ages: list[np.ndarray] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Means over the steps that count. Shares are of the wall clock, of all engines together."""

    steps: int
    step_s: float
    trainer_idle: float
    engine_idle: float
    generate: float
    prefill: float
    publish: float
    lent: float
    mean_age: float
    p95_age: float
    max_age: int
    too_old: float  # share of the rollouts that ended
    mean_in_flight: float
    mean_rollout_s: float
    rollouts_per_s: float
    tokens_per_s: float
    tokens_per_step: float
    zero_signal: float


def outcome_of(course: Course, *, skip: int) -> Outcome:
    """Errors: ValueError, if no step is left after the first `skip`."""
    if len(course.tallies) <= skip + 1:
        raise ValueError(f"{len(course.tallies)} steps were simulated, none is left after the first {skip + 1}")
    first, last = course.tallies[skip], course.tallies[-1]
    wall_s, ages = last.at_s - first.at_s, np.concatenate(course.ages[skip + 1 :])
    engine_s = wall_s * course.engines
    shares = {
        cause: (getattr(last, f"{cause}_s") - getattr(first, f"{cause}_s")) / engine_s
        for cause in ("generate", "prefill", "publish", "lent")
    }
    steps, ended = len(course.tallies) - skip - 1, last.ended - first.ended
    closed = last.groups_closed - first.groups_closed
    return Outcome(
        steps=steps,
        step_s=wall_s / steps,
        trainer_idle=(last.trainer_waited_s - first.trainer_waited_s) / wall_s,
        engine_idle=max(1 - sum(shares.values()), 0.0),
        mean_age=float(ages.mean()),
        p95_age=float(np.percentile(ages, 95)),
        max_age=int(ages.max()),
        too_old=_ratio(last.too_old - first.too_old, ended),
        mean_in_flight=(last.in_flight_s - first.in_flight_s) / wall_s,
        mean_rollout_s=_ratio(last.ended_s - first.ended_s, ended),
        rollouts_per_s=ended / wall_s,
        tokens_per_s=(last.sampled_tokens - first.sampled_tokens) / wall_s,
        tokens_per_step=float(np.mean(course.tokens[skip + 1 :])),
        zero_signal=_ratio(last.groups_dropped - first.groups_dropped, closed),
        **shares,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
