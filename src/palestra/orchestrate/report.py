"""What the loop tells: metrics of a step, progress for people, the summary of a run."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from palestra.core.clock import unix_now
from palestra.core.ledger import LedgerEntry, total
from palestra.core.metrics import Last, Max, Mean, Metric, Metrics, Sum, merge
from palestra.core.records import Ending, RolloutRecord
from palestra.orchestrate.buffer import seat_rewards
from palestra.orchestrate.curriculum import pool_metrics, pool_summary
from palestra.orchestrate.state import EvalEnded, Group, LoopState
from palestra.wire.weights.manifest import Staged


def finished_metrics(record: RolloutRecord) -> Metrics:
    """Of one rollout that ended, whether it trains or not."""
    metrics: Metrics = {
        "rollout/invalid": Mean(record.ending == Ending.INVALID),
        "rollout/truncated": Mean(record.ending == Ending.TRUNCATED),
        "rollout/finished": Sum(1),
        "rollout/sampled_tokens": Mean(record.num_sampled_tokens),
        "rollout/turns": Mean(record.num_turns),
    }
    if record.ending != Ending.INVALID:
        metrics |= {"reward/finished": Mean(record.reward), **of_seats("reward/finished", record)}
        metrics |= {f"reward/{record.environment}/{name}": Mean(value) for name, value in record.rewards.items()}
        metrics |= {f"metric/{record.environment}/{name}": Mean(value) for name, value in record.metrics.items()}
    return metrics


def trained_metrics(records: Iterable[RolloutRecord], step: int) -> Metrics:
    """Of the rollouts in one batch."""
    return merge(
        {
            "reward/trained": Mean(record.reward),
            **of_seats("reward/trained", record),
            "age/mean": Mean(step - record.versions[0]),
            "age/max": Max(step - record.versions[0]),
            "rollout/trained_tokens": Mean(record.num_sampled_tokens),
            "rollout/versions": Max(len(record.versions)),
        }
        for record in records
    )


def of_seats(name: str, record: RolloutRecord) -> Metrics:
    """What each of several seats that train was worth, below the name of the rollout's reward."""
    return {f"{name}/{seat}": Mean(reward) for seat, reward in seat_rewards(record).items()}


class Tails:
    """Time lost to tails: from the end of the member in the middle of a group to the group's end. `note` hears it."""

    def __init__(self, note: Callable[[Metrics], None]):
        self._note = note
        self._ends: dict[int, list[float]] = {}

    def ended(self, group: Group) -> None:
        """A member did."""
        self._ends.setdefault(group.group_id, []).append(time.monotonic())

    def closed(self, group: Group) -> None:
        """All members did, or those that did may train without the others."""
        if ends := self._ends.pop(group.group_id, []):
            self._note({"group/tail_s": Mean(time.monotonic() - ends[(len(ends) - 1) // 2])})


@dataclass
class Totals:
    """What the summary is computed from; gathered while the run goes on."""

    started_at: float
    publishes: int = 0
    max_gap: float = 0.0
    sent_bytes: int = 0
    full_bytes: int = 0
    age: Mean = field(default_factory=lambda: Mean(0, 0))
    predicted_age: Mean = field(default_factory=lambda: Mean(0, 0))
    sampled_tokens: int = 0
    sampling_since: float | None = None
    ledgers: dict[str, LedgerEntry] = field(default_factory=dict)  # by process
    trainer_steps: list[LedgerEntry] = field(default_factory=list)  # the first, and the sum of the others

    def note_tokens(self, tokens: int) -> None:
        self.sampling_since = self.sampling_since or unix_now()
        self.sampled_tokens += tokens

    def note_age(self, age: Metric) -> None:
        if isinstance(age, Mean):
            self.age += age

    def note_publish(self, max_gap: float, staged: Staged) -> None:
        self.publishes += 1
        self.sent_bytes += staged.sent_bytes
        self.full_bytes += staged.full_bytes
        self.max_gap = max(self.max_gap, max_gap)

    @property
    def tokens_per_s(self) -> float:
        return self.sampled_tokens / (unix_now() - self.sampling_since) if self.sampling_since else 0.0

    @property
    def trainer_idle(self) -> float:
        """Share of the trainer's wall it waited for batches, from the end of its first step on."""
        later = self.trainer_steps[1:]
        return later[0].parts_s.get("wait_for_batch", 0.0) / later[0].wall_s if later else 0.0

    def note_step(self, entry: LedgerEntry) -> None:
        """One step of the trainer."""
        first, later = self.trainer_steps[:1], [*self.trainer_steps[1:], entry]
        self.trainer_steps = [*first, total(later)] if first else [entry]

    @property
    def ledger_closure(self) -> float:
        """The worst process's |sum of parts - wall| / wall."""
        return max((entry.closure for entry in self.ledgers.values()), default=0.0)

    def note_ledger(self, entry: LedgerEntry) -> None:
        known = self.ledgers.get(entry.process)
        self.ledgers[entry.process] = total([known, entry]) if known else entry

    def metrics(self, state: LoopState) -> Metrics:
        return {
            "rollout/tokens_per_s": Last(self.tokens_per_s),
            "groups/zero_signal": Last(state.counts.get("groups_zero_signal", 0)),
            "groups/too_old": Last(state.counts.get("groups_too_old", 0)),
            "groups/all_invalid": Last(state.counts.get("groups_all_invalid", 0)),
            "rollout/retried": Last(state.counts.get("rollouts_retried", 0)),
            "rollout/cut": Last(state.counts.get("rollouts_cut", 0)),
            "rollout/length_drift": Last(state.length_drift),
            "groups/parted": Last(state.counts.get("groups_parted", 0)),
            **pool_metrics(state.pools),
        }


def summary(totals: Totals, state: LoopState, *, name: str, first_eval: str | None, attempt: int) -> dict[str, Any]:
    """summary.json. `reward_before` and `reward_after` are those of the first evaluation set.

    `steps`, `counts`, `evals` and `max_versions_in_a_rollout` are of the whole run, the rest is of this attempt.
    """
    return {
        "name": name,
        "status": "finished",
        "attempt": attempt,
        "reward_before": _reward(state.evals, first_eval, "start"),
        "reward_after": _reward(state.evals, first_eval, "end"),
        "evals": _evals(state.evals),
        "steps": state.next_step,
        "wall_s": unix_now() - totals.started_at,
        "max_versions_in_a_rollout": state.max_versions_in_a_rollout,
        "publishes": totals.publishes,
        "publish_max_abs_logprob_gap": totals.max_gap,
        "publish_bytes": totals.sent_bytes,
        "publish_share": totals.sent_bytes / totals.full_bytes if totals.full_bytes else None,
        "ledger_closure": totals.ledger_closure,
        "trainer_idle": totals.trainer_idle,
        "mean_age": totals.age.value if totals.age.count else None,
        "predicted_mean_age": totals.predicted_age.value if totals.predicted_age.count else None,
        "sample_tokens_per_s": totals.tokens_per_s,
        "length_drift": state.length_drift,
        "counts": dict(sorted(state.counts.items())),
        "curriculum": pool_summary(state.pools, state.seeds),
    }


def _reward(evals: list[EvalEnded], name: str | None, when: str) -> float | None:
    found = [entry.reward for entry in evals if entry.name == name and entry.when == when]
    return found[-1] if found else None


def _evals(evals: list[EvalEnded]) -> list[dict[str, Any]]:
    return [
        {
            "name": e.name,
            "when": e.when,
            "version": e.version,
            "versions": e.versions,
            "reward": e.reward,
            "rollouts": e.num_rollouts,
        }
        for e in evals
    ]
