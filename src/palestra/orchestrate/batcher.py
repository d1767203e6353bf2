"""Groups in, one packed batch out. Pure.

Legend: G valid members of a group, S samples, N tokens of all samples.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from palestra.algo.advantages import advantages
from palestra.algo.packing import Packing, pack
from palestra.algo.shaping import LengthShaping
from palestra.core.records import RolloutRecord, Sample
from palestra.orchestrate.buffer import is_fresh, shaped_by_seat
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


@dataclass(frozen=True)
class _Row:
    rollout_id: int
    sample: Sample
    advantage: float


def make_batch(
    groups: list[Group], *, step: int, attempt: int, rules: BatchRules
) -> tuple[Batch, Packing, list[RolloutRecord]]:
    """The batch of `step`, how it was packed, and the rollouts in it. Rollouts older than `max_age` are left out,
    but count in their group's baseline."""
    rows, trained = _rows(groups, step, rules)
    lengths = [len(row.sample.token_ids) for row in rows]
    packing = pack(
        lengths,
        max_tokens=rules.max_pack_tokens,
        num_ranks=rules.num_ranks,
        keep_together=[row.rollout_id for row in rows],
    )
    sampled = _column(rows, "sampled", np.float32)
    batch = Batch(
        step=step,
        attempt=attempt,
        num_packs=packing.num_packs,
        max_pack_tokens=rules.max_pack_tokens,
        token_ids=_column(rows, "token_ids", np.int64),
        engine_logprobs=_column(rows, "logprobs", np.float32),
        advantage=np.repeat(np.asarray([row.advantage for row in rows], np.float32), lengths),
        rl_weight=sampled,
        ce_weight=np.zeros_like(sampled),
        ref_weight=np.zeros_like(sampled),
        reference_logprobs=np.zeros_like(sampled),
        lengths=np.asarray(lengths, np.int64),
        rollout=np.asarray([row.rollout_id for row in rows], np.int64),
        temperature=np.full(len(rows), rules.temperature, np.float32),
        pack=packing.pack_of_sample,
        version=np.asarray([min((span.version for span in row.sample.spans), default=step) for row in rows], np.int64),
    )
    return batch, packing, trained


def _rows(groups: list[Group], step: int, rules: BatchRules) -> tuple[list[_Row], list[RolloutRecord]]:
    rows: list[_Row] = []
    trained: list[RolloutRecord] = []
    for group in groups:
        advantage_of = _advantages(group, rules)
        for record in group.valid:
            if not is_fresh(record, step=step, max_age=rules.max_age):
                continue
            trained.append(record)
            for seat in record.seats:
                advantage = advantage_of[record.rollout_id, seat.name]
                rows += [_Row(record.rollout_id, sample, advantage) for sample in seat.samples]
    return rows, trained


def _advantages(group: Group, rules: BatchRules) -> dict[tuple[int, str], float]:
    """By rollout and seat."""
    found: dict[tuple[int, str], float] = {}
    for name, rewards_G in shaped_by_seat(group.valid, rules.length).items():
        advantage_G = advantages(rewards_G, baseline=rules.baseline, scale=rules.advantage_scale)
        members = [record for record in group.valid if any(seat.name == name for seat in record.seats)]
        for record, advantage in zip(members, advantage_G.tolist(), strict=True):
            found[record.rollout_id, name] = advantage
    return found


def _column(rows: list[_Row], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(row.sample, name), dtype) for row in rows])
