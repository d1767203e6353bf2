"""Groups in, one packed batch out. Pure.

Legend: G valid members of a group, S samples, N tokens of all samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from palestra.algo.advantages import advantages, group_baseline, group_scale
from palestra.algo.packing import Packing, pack
from palestra.algo.shaping import LengthShaping
from palestra.config.schema import AdvantageScale, BaselineKind, RunConfig
from palestra.core.records import RolloutRecord, Sample, Seat
from palestra.orchestrate.buffer import Part, credited, is_fresh, returns
from palestra.orchestrate.frozen import Logprobs
from palestra.orchestrate.state import Average, Baseline, Group
from palestra.wire.batches import Batch
from palestra.wire.routes import stacked

Averages = Mapping[str, Average]
"""Moving averages of returns by environment and `Part.key`."""


@dataclass(frozen=True, kw_only=True)
class SourceRules:
    """What may differ between environments."""

    baseline: BaselineKind
    advantage_scale: AdvantageScale
    length: LengthShaping
    temperature: float
    weight: float = 1.0  # of its advantages


@dataclass(frozen=True, kw_only=True)
class BatchRules:
    """The part of the config that batching needs. `sources` are those of env.mix; all others are as `default` says."""

    default: SourceRules
    sources: Mapping[str, SourceRules] = field(default_factory=dict)
    max_age: int
    max_pack_tokens: int
    num_ranks: int
    reference_weight: float  # of the pull to the reference model
    teacher_weight: float  # of the teacher's advantages
    reward_weight: float  # of the rewards' advantages
    average_decay: float = 0.95  # of moving averages

    def of(self, source: str) -> SourceRules:
        return self.sources.get(source, self.default)


def rules_of(config: RunConfig) -> BatchRules:
    algo = config.algo
    return BatchRules(
        default=_source_rules(config, ""),
        sources={entry.label: _source_rules(config, entry.label) for entry in config.env.mix},
        max_age=algo.max_age,
        max_pack_tokens=config.train.max_pack_tokens,
        num_ranks=config.train.num_data_ranks,
        reference_weight=algo.reference.weight if algo.reference else 0.0,
        teacher_weight=algo.teacher.weight if algo.teacher else 0.0,
        reward_weight=0.0 if algo.teacher and algo.teacher.replaces_reward else 1.0,
        average_decay=algo.average_decay,
    )


def _source_rules(config: RunConfig, source: str) -> SourceRules:
    algo, sampling = config.algo_of(source), config.sampling_of(source)
    return SourceRules(
        baseline=algo.baseline,
        advantage_scale=algo.advantage_scale,
        length=LengthShaping(
            max_tokens=algo.length.max_tokens or sampling.max_tokens,
            penalty=algo.length.penalty,
            overlong_tokens=algo.length.overlong_tokens,
            overlong_penalty=algo.length.overlong_penalty,
        ),
        temperature=sampling.temperature,
        weight=config.settings_of(source).advantage_weight,
    )


@dataclass(frozen=True)
class _Row:
    rollout_id: int
    sample: Sample
    temperature: float
    advantage: NDArray[np.float32]  # [T]
    reference: NDArray[np.float32]  # [T] log-probabilities; NaN where nobody was asked
    teacher: NDArray[np.float32]


def make_batch(
    groups: list[Group],
    logprobs: Logprobs,
    *,
    step: int,
    attempt: int,
    rules: BatchRules,
    averages: Averages = MappingProxyType({}),
) -> tuple[Batch, Packing, list[RolloutRecord]]:
    """The batch of `step`, how it was packed, and the rollouts in it. `logprobs` is what frozen models say of them,
    `averages` what moving averages were before it (see `moved`).

    Rollouts older than `max_age` are left out, but count in their group's baseline. Members of a group that trained
    before are compared with what it was trained with.
    """
    rows, trained = _rows(groups, logprobs, step, rules, averages)
    lengths = [len(row.sample.token_ids) for row in rows]
    packing = pack(
        lengths,
        max_tokens=rules.max_pack_tokens,
        num_ranks=rules.num_ranks,
        keep_together=[row.rollout_id for row in rows],
    )
    sampled, engine = _column(rows, "sampled", np.float32), _column(rows, "logprobs", np.float32)
    rewarded = np.float32(rules.reward_weight) * np.concatenate([row.advantage for row in rows])
    reference = np.concatenate([row.reference for row in rows])
    has_reference = (sampled > 0) & ~np.isnan(reference)
    batch = Batch(
        step=step,
        attempt=attempt,
        num_packs=packing.num_packs,
        max_pack_tokens=rules.max_pack_tokens,
        token_ids=_column(rows, "token_ids", np.int64),
        engine_logprobs=engine,
        advantage=rewarded + rules.teacher_weight * _teacher_advantage(rows, sampled, engine),
        rl_weight=sampled,
        ce_weight=np.zeros_like(sampled),
        ref_weight=np.where(has_reference, np.float32(rules.reference_weight), np.float32(0)),
        reference_logprobs=np.where(has_reference, reference, np.float32(0)),
        lengths=np.asarray(lengths, np.int64),
        rollout=np.asarray([row.rollout_id for row in rows], np.int64),
        temperature=np.asarray([row.temperature for row in rows], np.float32),
        pack=packing.pack_of_sample,
        version=np.asarray([min((span.version for span in row.sample.spans), default=step) for row in rows], np.int64),
        **_routed([row.sample for row in rows]),
    )
    return batch, packing, trained


def _routed(samples: list[Sample]) -> dict[str, np.ndarray]:
    num_routed = np.asarray([sample.routes.num_tokens for sample in samples], np.int64)
    if not num_routed.any():
        return {}
    return {"routes": stacked([sample.routes for sample in samples]), "num_routed": num_routed}


def _teacher_advantage(
    rows: list[_Row], sampled: NDArray[np.float32], engine: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[N] teacher - engine log-probability, minus its mean over the batch, where the teacher was asked about a sampled
    token; else 0.

    Without the mean its expectation under the policy is -KL(policy || teacher) at the token, and as an advantage it has
    the gradient of that KL, token by token: what a token does to later ones is left out. The mean is a baseline: a
    policy far from its teacher would else push down nearly everything it samples.
    Source: Agarwal et al. 2023, arXiv:2306.13649 (on-policy distillation by reverse KL).
    """
    gap = np.concatenate([row.teacher for row in rows]) - engine
    known = (sampled > 0) & ~np.isnan(gap)
    return np.where(known, gap - (gap[known].mean() if known.any() else 0), 0).astype(np.float32)


def _rows(
    groups: list[Group], logprobs: Logprobs, step: int, rules: BatchRules, averages: Averages
) -> tuple[list[_Row], list[RolloutRecord]]:
    rows: list[_Row] = []
    trained: list[RolloutRecord] = []
    for group in groups:
        advantage_of = _advantages(group, rules, averages)
        for record in group.unsettled:
            if not is_fresh(record, step=step, max_age=rules.max_age):
                continue
            trained.append(record)
            samples = [(seat, sample) for seat in record.seats for sample in seat.samples]
            for index, (seat, sample) in enumerate(samples):
                said = [_said(logprobs, name, record.rollout_id, index, sample) for name in ("reference", "teacher")]
                of_tokens = _of_tokens(sample, seat, advantage_of[record.rollout_id])
                rows.append(_Row(record.rollout_id, sample, rules.of(group.source).temperature, of_tokens, *said))
    return rows, trained


def _said(logprobs: Logprobs, name: str, rollout_id: int, index: int, sample: Sample) -> NDArray[np.float32]:
    answers = logprobs.get(name, {}).get(rollout_id)
    return np.full(len(sample.token_ids), np.nan, np.float32) if answers is None else answers[index]


def _of_tokens(sample: Sample, seat: Seat, advantage_of: dict[Part, float]) -> NDArray[np.float32]:
    """[T]: the seat's advantage, or that of the turn, or the part of it, which said the token."""
    of_tokens = np.full(len(sample.token_ids), advantage_of[Part(seat.name)], np.float32)
    for span in sample.turns:
        for cuts, num_tokens in enumerate((0, *seat.cuts(span.turn))):
            if (of_part := advantage_of.get(Part(seat.name, span.turn, cuts))) is not None:
                of_tokens[span.start + num_tokens : span.end] = of_part
    return of_tokens


def moved(averages: Averages, groups: Sequence[Group], rules: BatchRules) -> dict[str, Average]:
    """Moving averages of returns after these groups, by environment and `Part.key`; a first group sets its own.

    A group that trains in parts moves them by its members, as it would at once.
    """
    found = dict(averages)
    for group in groups:
        own = rules.of(group.source)
        if own.baseline != "moving_average":
            continue
        for part, of_rollout in _returns(group, own, averages).items():
            now = Average.of(list(of_rollout.values()))
            name, kept = f"{group.source} {part.key}", rules.average_decay ** (len(of_rollout) / group.size)
            before = found.get(name, now)
            found[name] = Average(
                kept * before.mean + (1 - kept) * now.mean, kept * before.square + (1 - kept) * now.square
            )
    return found


def baselines(group: Group, rules: BatchRules, averages: Averages) -> dict[str, Baseline]:
    """By `Part.key`, what members of a group are compared with that end after a batch took the others.

    It does not depend on what a late member will be worth, so its advantage is as unbiased as with a baseline that
    leaves it out.
    """
    own = rules.of(group.source)
    found: dict[str, Baseline] = {}
    for part, of_rollout in _returns(group, own, averages, of=group.valid).items():
        rewards = list(of_rollout.values())
        of_group = Baseline(group_baseline(rewards), group_scale(rewards))
        found[part.key] = _average(group, part, own, averages) or of_group
    return found


def _returns(
    group: Group, own: SourceRules, averages: Averages, *, of: list[RolloutRecord] | None = None
) -> dict[Part, dict[int, float]]:
    """Of members that no batch has taken yet. Which seats count by turn does not depend on what these are worth: one
    that was ever credited so does always, in its group, or by the averages it is compared with."""
    if group.settled:
        known = {key.partition("@")[0] for key in group.baselines if "@" in key}
        return returns(group.unsettled if of is None else of, own.length, by_turn=known)
    known = credited(group.valid)
    if own.baseline == "moving_average":
        prefix = f"{group.source} "
        keys = [name.removeprefix(prefix) for name in averages if name.startswith(prefix)]
        known |= {key.partition("@")[0] for key in keys if "@" in key}
    records = group.unsettled if of is None else of
    return returns(records, own.length, by_turn=known)


def _trained_with(group: Group, part: Part) -> Baseline | None:
    """Of a group that trained before; where none of its members had as many cuts in the turn, behind all they had."""
    cuts = (part._replace(cuts=cuts).key for cuts in range(part.cuts, -1, -1))
    return next((group.baselines[key] for key in cuts if key in group.baselines), None)


def _average(group: Group, part: Part, own: SourceRules, averages: Averages) -> Baseline | None:
    """The seat's own past, where that is what it is compared with, and there is one."""
    past = averages.get(f"{group.source} {part.key}") if own.baseline == "moving_average" else None
    return past and Baseline(past.mean, max(past.square - past.mean**2, 0.0) ** 0.5)


def _advantages(group: Group, rules: BatchRules, averages: Averages) -> dict[int, dict[Part, float]]:
    """By rollout and part, of the members that no batch has taken yet."""
    own = rules.of(group.source)
    found: dict[int, dict[Part, float]] = {}
    for part, of_rollout in _returns(group, own, averages).items():
        rewards_G = list(of_rollout.values())
        kept = _trained_with(group, part) if group.settled else _average(group, part, own, averages)
        if group.settled and kept is None:
            advantage_G = np.zeros(len(rewards_G))  # a turn that no other member had: nothing to compare it with
        else:
            advantage_G = advantages(
                rewards_G,
                baseline="leave_one_out" if own.baseline == "leave_one_out" else "mean",
                scale=own.advantage_scale,
                given_baseline=kept and kept.mean,
                given_scale=kept and kept.std,
            )
        for rollout_id, advantage in zip(of_rollout, advantage_G.tolist(), strict=True):
            found.setdefault(rollout_id, {})[part] = own.weight * advantage
    return found


def _column(rows: list[_Row], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(row.sample, name), dtype) for row in rows])
