"""Admission: how many rollouts may be in flight at an engine, by what the engine reports. Pure.

An engine samples faster the more requests run in it, until their keys and values fill its cache: then it preempts some,
computes their prefixes again later, and the same work is done twice. How many fit depends on lengths nobody knows
beforehand; what one rollout holds, on average over its life, is measured: cache use / rollouts in flight.

**Start.** As many rollouts as have room at their full length. Where these are `most` already (short rollouts, a small
model), the limit is `most` from the first moment, and little else below ever happens.

**Limit.** The rollouts that would fill `_AIM` of the cache. It is judged once a *generation*, when `_LIVES` times as
many rollouts have ended as may be in flight, and `_FEW` at least: use follows the limit only when the rollouts admitted
last have grown to their lengths, and the longest are seen last. Generations are averaged over `_MEMORY` rollouts. The
limit changes only if it is off by more than `_BAND`, above the noise of that average: growth and trims are steps to the
same place, in proportion to what is missing, so two or three arrive whatever the engine's size, and nothing swings.
Growth also needs that every slot was used and no request waits, and is at most `_MOST_GROWTH`: the rollouts of a first
generation are younger than later ones.

**Brake.** While cache use is above `_FULL`, or will be at the next reading if it goes on as since the last, nothing is
admitted, whatever the limit, unless there is room at full length. It takes what chance adds to the average use, so
`_AIM` may be above 1: without the brake the best fixed limit is lower, wastes more, and is known only afterwards. The
trend counts as far as the same rollouts are still there.

**Cut.** Preemptions are the price of a full cache: a prefill each. If in one generation there are more than `_SHARE` of
the rollouts, the measure is wrong (lengths have jumped, or the gauge hides a full part of the cache): the limit becomes
`_CUT` of the rollouts in flight, and later ones aim lower. Rollouts are never stopped, so a lower limit acts as they
end; until they are down to it, nothing is cut again. Lower aims are kept until rollouts hold `_OTHER` times as much or
as little: those are others, measured anew.

**Not used: tokens per second.** An engine may sample no faster with more requests although its cache has room. To hold
it there, engines with room would have to be held back, and gain nothing but age, which pacing bounds already. For such
an engine `engine.max_in_flight` is the bound.
"""

import dataclasses
from dataclasses import dataclass

_AIM, _FULL = 1.1, 0.9  # shares of the cache
_BAND = 1.3
_LIVES, _FEW, _MEMORY = 2, 128, 1000  # rollouts that ended; the first times the limit
_MOST_GROWTH = 2.0
_SHARE, _FEW_IN_FLIGHT = 0.75, 64  # of rollouts ended or in flight, and of so many at least
_CUT, _LOWER_AIM, _LOWEST_AIM = 0.8, 0.9, 0.5
_OTHER = 2.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One engine at one moment. `rollouts` are in flight at it, `ended` have ended at it so far; `preempted` are
    requests that it preempted for want of room since the reading before."""

    kv_use: float
    waiting: int
    preempted: int
    rollouts: int
    ended: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Sums over the readings since `began` rollouts had ended."""

    began: int
    kv_use: float = 0.0
    rollouts: int = 0
    most_rollouts: int = 0
    preempted: int = 0

    def seen(self, reading: Reading) -> "Generation":
        return Generation(
            began=self.began,
            kv_use=self.kv_use + reading.kv_use,
            rollouts=self.rollouts + reading.rollouts,
            most_rollouts=max(self.most_rollouts, reading.rollouts),
            preempted=self.preempted + reading.preempted,
        )


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The limit of one engine, never more than `most`, and what it rests on. `is_braked`: nothing is admitted now; up
    to `safe` rollouts, which have room at their full length, always are.

    `kv_each` is the share of the cache that one rollout holds, averaged over the last `known` that ended.
    """

    limit: int
    most: int
    safe: int
    last: Reading
    now: Generation
    is_braked: bool = False
    aim: float = _AIM
    kv_each: float = 0.0
    known: int = 0

    def next(self, reading: Reading) -> "Admission":
        """After one more reading."""
        braked = reading.rollouts >= self.safe and expected_kv(self.last, reading) >= _FULL
        seen = dataclasses.replace(self, last=reading, now=self.now.seen(reading), is_braked=braked)
        ended = reading.ended - self.now.began
        if seen.now.preempted > _SHARE * max(ended, self.limit, _FEW_IN_FLIGHT):
            return seen._cut() if reading.rollouts <= self.limit else seen
        return seen._judged(ended) if ended >= max(_LIVES * self.limit, _FEW) else seen

    def _cut(self) -> "Admission":
        limit = max(1, int(_CUT * self.last.rollouts))
        return self._renewed(limit, aim=max(_LOWEST_AIM, _LOWER_AIM * self.aim))

    def _judged(self, ended: int) -> "Admission":
        """At the end of a generation, in which so many rollouts ended."""
        measured = self._measured(ended)
        fitting = measured.aim / measured.kv_each if measured.kv_each else self.most
        if fitting < self.limit / _BAND:
            return measured._renewed(max(1, int(fitting)))
        is_used = self.now.most_rollouts >= self.limit and not self.last.waiting
        if is_used and fitting > self.limit * _BAND:
            return measured._renewed(int(min(fitting, _MOST_GROWTH * self.limit, self.most)))
        return measured._renewed(self.limit)

    def _measured(self, ended: int) -> "Admission":
        """With this generation in the average, or alone beside as much of the past if its rollouts are others."""
        each = self.now.kv_use / max(self.now.rollouts, 1)
        known, aim = min(self.known + ended, _MEMORY), self.aim
        if self.kv_each and not self.kv_each / _OTHER < each < self.kv_each * _OTHER:
            known, aim = 2 * ended, _AIM
        kv_each = self.kv_each + ended / max(known, ended) * (each - self.kv_each)
        return dataclasses.replace(self, kv_each=kv_each, known=known, aim=aim)

    def _renewed(self, limit: int, *, aim: float | None = None) -> "Admission":
        """A new generation begins."""
        return dataclasses.replace(self, limit=limit, aim=aim or self.aim, now=Generation(began=self.last.ended))


def begin(reading: Reading, *, most: int, safe: float | None) -> Admission:
    """With the `safe` rollouts that have room at their full length; `most`, where the engine does not say how many."""
    limit = most if safe is None else max(1, min(most, int(safe)))
    return Admission(
        limit=limit,
        most=most,
        safe=int(safe or 0),
        last=reading,
        now=Generation(began=reading.ended),
        is_braked=reading.rollouts >= int(safe or 0) and reading.kv_use >= _FULL,
    )


def expected_kv(before: Reading, now: Reading) -> float:
    """Cache use at the next reading, if it goes on rising as since the last one."""
    stayed = max(0.0, 1 - (now.ended - before.ended) / max(now.rollouts, 1))
    return now.kv_use + stayed * max(0.0, now.kv_use - before.kv_use)
