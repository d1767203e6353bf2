"""Warnings in words before a run collapses: rules over the last rows of metrics. Pure; docs/stability.md explains each.

A rule has two bounds: it speaks when its number reaches `warn_at`, and may speak again only after that number was below
`clear_at`. Numbers are medians or means of a few steps, since importance ratios have heavy tails.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

WINDOW = 40  # rows that rules look at
_FEW = 5  # rows that count as "now" and, at the window's start, as "before"
_ENOUGH = 15  # rows before "now" is compared with "before"

Row = Mapping[str, float]
Rows = Sequence[Row]


@dataclass(frozen=True)
class HealthWarning:
    """What a rule said at `step`."""

    rule: str
    step: int
    text: str


@dataclass(frozen=True)
class Rule:
    """`measure` gives a number that is worse the greater it is, or None where there is not enough to judge by."""

    name: str
    measure: Callable[[Rows], float | None]
    warn_at: float
    clear_at: float
    words: Callable[[Rows], str]


def judge(rows: Rows, active: frozenset[str]) -> tuple[list[tuple[str, str]], frozenset[str]]:
    """(rule, text) of the rules that speak now, and the rules that have spoken and not been cleared since."""
    said: list[tuple[str, str]] = []
    still = set(active)
    for rule in RULES:
        value = rule.measure(rows)
        if value is None:
            continue
        if rule.name in active:
            still -= {rule.name} if value < rule.clear_at else set()
        elif value >= rule.warn_at:
            said.append((rule.name, rule.words(rows)))
            still.add(rule.name)
    return said, frozenset(still)


class Health:
    """The window of one attempt, and all that was said in it."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._active: frozenset[str] = frozenset()
        self.warnings: list[HealthWarning] = []

    def note(self, step: int, row: Row) -> list[HealthWarning]:
        """The warnings that this row gives rise to."""
        self._rows = [*self._rows[1 - WINDOW :], row]
        said, self._active = judge(self._rows, self._active)
        new = [HealthWarning(rule, step, text) for rule, text in said]
        self.warnings += new
        return new


# --- numbers of a window


def _values(rows: Rows, *names: str) -> list[float]:
    """By row, the sum of the named metrics it has; rows that have none of them are left out."""
    found = [[row[name] for name in names if not math.isnan(row.get(name, math.nan))] for row in rows]
    return [sum(values) for values in found if values]


def _now(rows: Rows, *names: str) -> list[float]:
    return _values(rows[-_FEW:], *names)


def _before(rows: Rows, *names: str) -> list[float]:
    return _values(rows[:_FEW], *names) if len(rows) >= _ENOUGH else []


# --- entropy

_ENTROPY, _REWARD = "train/rl/entropy", "reward/finished"
_RISE = 0.02  # of the mean reward: whoever learns may grow sure of it


def _entropy_lost(rows: Rows) -> float | None:
    before, now = _before(rows, _ENTROPY), _now(rows, _ENTROPY)
    if not before or not now or median(before) <= 0:
        return None
    return 0.0 if any(_rose(rows, name) for name in _rewards(rows)) else 1 - median(now) / median(before)


def _rewards(rows: Rows) -> list[str]:
    """The rollouts', and of seats where several train: in self-play that of the rollout is always the same."""
    return [_REWARD, *dict.fromkeys(name for row in rows for name in row if name.startswith(f"{_REWARD}/"))]


def _rose(rows: Rows, name: str) -> bool:
    before, now = _before(rows, name), _now(rows, name)
    return bool(before and now) and fmean(now) - fmean(before) > _RISE


def _entropy_words(rows: Rows) -> str:
    before, now = median(_before(rows, _ENTROPY)), median(_now(rows, _ENTROPY))
    return (
        f"entropy is collapsing: {before:.3g} to {now:.3g} nats a token within {len(rows)} steps, and the reward did "
        "not rise; lower train.lr, raise the upper bound of the ratio (algo.loss_args.high), or set algo.reference"
    )


# --- trainer against engine

_SHARE, _K3 = "train/rl/effective_share", "train/rl/mismatch_k3"
_K3_HIGH, _K3_FACTOR, _K3_FLOOR = 0.1, 8.0, 0.05


def _share_lost(rows: Rows) -> float | None:
    now = _now(rows, _SHARE)
    return 1 - median(now) if len(now) == _FEW else None


def _share_words(rows: Rows) -> str:
    share, age = median(_now(rows, _SHARE)), _now(rows, "age/mean")
    return (
        f"the effective sample size is falling: batches count as {share:.0%} of their tokens"
        + (f" at a mean age of {fmean(age):.1f}" if age else "")
        + "; lower algo.pace_age, or set train.lr_ess_power=0.5"
    )


def _mismatch(rows: Rows) -> float | None:
    """1 where KL(engine || trainer) is high, or is high for this run."""
    now, before = _now(rows, _K3), _before(rows, _K3)
    if len(now) < _FEW:
        return None
    bound = max(_K3_FACTOR * median(before), _K3_FLOOR) if before else _K3_HIGH
    return median(now) / min(bound, _K3_HIGH)


def _mismatch_words(rows: Rows) -> str:
    now, before = median(_now(rows, _K3)), _before(rows, _K3)
    return (
        "trainer and engines drift apart: the mismatch KL (k3) is "
        + f"{now:.3g} a token"
        + (f", {median(before):.3g} before" if before else "")
        + "; if publish/max_abs_logprob_gap grows too, the engines compute something else (dtype, kernels): otherwise "
        "lower train.lr or algo.pace_age, or set algo.masks.geometric_high"
    )


# --- masks and gradients

_MASKED = ("train/rl/masked_tokens", "train/rl/masked_by_rollout", "train/rl/masked_above", "train/rl/masked_below")
_NORM = "train/grad_norm"
_SPIKE_OF = 20  # rows whose median is the usual norm


def _masked(rows: Rows) -> float | None:
    now = _now(rows, *_MASKED)
    return fmean(now) if len(now) == _FEW else None


def _masked_words(rows: Rows) -> str:
    low, high = _now(rows, "train/rl/below_band"), _now(rows, "train/rl/above_band")
    where = f" ({fmean(low):.1%} below the band, {fmean(high):.1%} above)" if low and high else ""
    return (
        f"{fmean(_now(rows, *_MASKED)):.0%} of the sampled tokens are masked{where}: that work is lost; lower "
        "algo.pace_age or train.lr, and check publish/max_abs_logprob_gap"
    )


def _spike(rows: Rows) -> float | None:
    usual = _values(rows[-_SPIKE_OF - 1 : -1], _NORM)
    now = _values(rows[-1:], _NORM)
    return now[0] / median(usual) if len(usual) >= 2 * _FEW and now and median(usual) > 0 else None


def _spike_words(rows: Rows) -> str:
    now, usual = _values(rows[-1:], _NORM)[0], median(_values(rows[-_SPIKE_OF - 1 : -1], _NORM))
    return (
        f"the gradient's norm jumped to {now:.3g} from {usual:.3g}: look at the rollouts of this step; "
        "lower train.max_grad_norm or train.lr if it happens again"
    )


# --- rollouts

_TRUNCATED, _ZERO = "rollout/truncated", "groups/zero_signal_share"
_DRIFT = "rollout/length_drift"  # of the whole run: (mean trained length / mean dispatched length) - 1
_TRUNCATED_HIGH = 0.3  # from here on the share itself counts like a rise


def _truncation(rows: Rows) -> float | None:
    now, before = _now(rows, _TRUNCATED), _before(rows, _TRUNCATED)
    if len(now) < _FEW:
        return None
    return max(fmean(now) - _TRUNCATED_HIGH, fmean(now) - fmean(before) if before else 0.0)


def _truncation_words(rows: Rows) -> str:
    now, before = _now(rows, _TRUNCATED), _before(rows, _TRUNCATED)
    return (
        f"{fmean(now):.0%} of the rollouts are cut off"
        + (f", {fmean(before):.0%} before" if before else "")
        + ": they learn from a limit, not from the task; raise sampling.max_tokens, or shorten replies by "
        "algo.length.overlong_tokens"
    )


def _zero_signal(rows: Rows) -> float | None:
    now = _now(rows, _ZERO)
    has_teacher = bool(_now(rows, "frozen/teacher/kl"))  # who gives every group signal
    return fmean(now) if len(now) == _FEW and not has_teacher else None


def _zero_signal_words(rows: Rows) -> str:
    found = {name.removeprefix(_REWARD).strip("/"): _now(rows, name) for name in _rewards(rows)}
    means = ", ".join(f"{seat} {fmean(reward):.2f}".strip() for seat, reward in found.items() if reward)
    return (
        f"in {fmean(_now(rows, _ZERO)):.0%} of the groups all rewards are equal"
        + (f" (mean reward {means})" if means else "")
        + ": most sampling teaches nothing; take tasks that are harder or easier, a larger algo.group_size, or stop"
    )


def _length_drift(rows: Rows) -> float | None:
    drift = _values(rows, _DRIFT)
    return abs(drift[-1]) if len(drift) >= 2 * _FEW else None


def _length_words(rows: Rows) -> str:
    drift = _values(rows, _DRIFT)[-1]
    return (
        f"the rollouts that trained are {abs(drift):.0%} {'longer' if drift > 0 else 'shorter'} than those dispatched: "
        "the loop selects by length; look at groups/too_old and rollout/invalid, and raise algo.max_age or env.stall_s"
    )


RULES = (
    Rule("entropy", _entropy_lost, warn_at=0.6, clear_at=0.3, words=_entropy_words),
    Rule("effective_share", _share_lost, warn_at=0.5, clear_at=0.35, words=_share_words),
    Rule("mismatch", _mismatch, warn_at=1.0, clear_at=0.6, words=_mismatch_words),
    Rule("masked", _masked, warn_at=0.1, clear_at=0.05, words=_masked_words),
    Rule("grad_norm", _spike, warn_at=10.0, clear_at=3.0, words=_spike_words),
    Rule("truncated", _truncation, warn_at=0.2, clear_at=0.1, words=_truncation_words),
    Rule("zero_signal", _zero_signal, warn_at=0.8, clear_at=0.65, words=_zero_signal_words),
    Rule("length_drift", _length_drift, warn_at=0.1, clear_at=0.05, words=_length_words),
)
