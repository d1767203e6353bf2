"""Groups in, one packed batch out. Pure.

Legend: G valid members of a group, S samples, N tokens of all samples.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from palestra.algo.advantages import advantages
from palestra.algo.packing import Packing, pack
from palestra.algo.shaping import LengthShaping
from palestra.config.schema import RunConfig
from palestra.core.records import RolloutRecord, Sample
from palestra.orchestrate.buffer import is_fresh, shaped_by_seat
from palestra.orchestrate.frozen import Logprobs
from palestra.orchestrate.state import Group
from palestra.wire.batches import Batch


@dataclass(frozen=True)
class BatchRules:
    """The part of the config that batching needs."""

    baseline: Literal["mean", "leave_one_out"]
    advantage_scale: Literal["none", "std"]
    max_age: int
    max_pack_tokens: int
    num_ranks: int
    temperature: float
    length: LengthShaping
    reference_weight: float  # of the pull to the reference model
    teacher_weight: float  # of the teacher's advantages
    reward_weight: float  # of the rewards' advantages


def rules_of(config: RunConfig) -> BatchRules:
    algo, length = config.algo, config.algo.length
    return BatchRules(
        baseline=algo.baseline,
        advantage_scale=algo.advantage_scale,
        max_age=algo.max_age,
        max_pack_tokens=config.train.max_pack_tokens,
        num_ranks=config.train.num_ranks,
        temperature=config.sampling.temperature,
        length=LengthShaping(
            max_tokens=length.max_tokens or config.sampling.max_tokens,
            penalty=length.penalty,
            overlong_tokens=length.overlong_tokens,
            overlong_penalty=length.overlong_penalty,
        ),
        reference_weight=algo.reference.weight if algo.reference else 0.0,
        teacher_weight=algo.teacher.weight if algo.teacher else 0.0,
        reward_weight=0.0 if algo.teacher and algo.teacher.replaces_reward else 1.0,
    )


@dataclass(frozen=True)
class _Row:
    rollout_id: int
    sample: Sample
    advantage: float
    reference: NDArray[np.float32]  # [T] log-probabilities; NaN where nobody was asked
    teacher: NDArray[np.float32]


def make_batch(
    groups: list[Group], logprobs: Logprobs, *, step: int, attempt: int, rules: BatchRules
) -> tuple[Batch, Packing, list[RolloutRecord]]:
    """The batch of `step`, how it was packed, and the rollouts in it. `logprobs` is what frozen models say of them.

    Rollouts older than `max_age` are left out, but count in their group's baseline. Members of a group that trained
    before are compared with what it was trained with.
    """
    rows, trained = _rows(groups, logprobs, step, rules)
    lengths = [len(row.sample.token_ids) for row in rows]
    packing = pack(
        lengths,
        max_tokens=rules.max_pack_tokens,
        num_ranks=rules.num_ranks,
        keep_together=[row.rollout_id for row in rows],
    )
    sampled, engine = _column(rows, "sampled", np.float32), _column(rows, "logprobs", np.float32)
    rewarded = np.repeat(np.asarray([rules.reward_weight * row.advantage for row in rows], np.float32), lengths)
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
        temperature=np.full(len(rows), rules.temperature, np.float32),
        pack=packing.pack_of_sample,
        version=np.asarray([min((span.version for span in row.sample.spans), default=step) for row in rows], np.int64),
    )
    return batch, packing, trained


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
    groups: list[Group], logprobs: Logprobs, step: int, rules: BatchRules
) -> tuple[list[_Row], list[RolloutRecord]]:
    rows: list[_Row] = []
    trained: list[RolloutRecord] = []
    for group in groups:
        advantage_of = _advantages(group, rules)
        for record in group.unsettled:
            if not is_fresh(record, step=step, max_age=rules.max_age):
                continue
            trained.append(record)
            samples = [(seat, sample) for seat in record.seats for sample in seat.samples]
            for index, (seat, sample) in enumerate(samples):
                said = [_said(logprobs, name, record.rollout_id, index, sample) for name in ("reference", "teacher")]
                rows.append(_Row(record.rollout_id, sample, advantage_of[record.rollout_id, seat.name], *said))
    return rows, trained


def _said(logprobs: Logprobs, name: str, rollout_id: int, index: int, sample: Sample) -> NDArray[np.float32]:
    answers = logprobs.get(name, {}).get(rollout_id)
    return np.full(len(sample.token_ids), np.nan, np.float32) if answers is None else answers[index]


def _advantages(group: Group, rules: BatchRules) -> dict[tuple[int, str], float]:
    """By rollout and seat, of the members that no batch has taken yet."""
    found: dict[tuple[int, str], float] = {}
    for name, rewards_G in shaped_by_seat(group.unsettled, rules.length).items():
        kept = group.baselines.get(name) if group.settled else None
        advantage_G = advantages(
            rewards_G,
            baseline=rules.baseline,
            scale=rules.advantage_scale,
            given_baseline=kept and kept.mean,
            given_scale=kept and kept.std,
        )
        members = [record for record in group.unsettled if any(seat.name == name for seat in record.seats)]
        for record, advantage in zip(members, advantage_G.tolist(), strict=True):
            found[record.rollout_id, name] = advantage
    return found


def _column(rows: list[_Row], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(row.sample, name), dtype) for row in rows])
