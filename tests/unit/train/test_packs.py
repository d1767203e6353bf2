"""The plan of a step keeps every trained token and its streams, on exactly one rank."""

import dataclasses

import numpy as np
import pytest
import torch

from palestra.core.errors import InfrastructureError
from palestra.train.packs import plan_step, samples_of, split
from palestra.wire.batches import Batch
from tests.unit.train.batches import make_batch

LENGTHS, PACKS = [5, 9, 4, 7], [0, 1, 0, 1]


def test_streams_stand_at_the_tokens_they_belong_to():
    batch = make_batch(LENGTHS, packs=PACKS, rollouts=[7, 8, 7, 9], temperature=0.5)
    first, second = plan_step(batch, rank=0, num_ranks=1).packs
    assert first.token_ids.tolist() == [*batch.token_ids[:5], *batch.token_ids[14:18]]
    assert first.scored.tolist() == [2, 3, 4, 7, 8]
    assert first.engine_logp.tolist() == [*batch.engine_logprobs[2:5], *batch.engine_logprobs[16:18]]
    assert first.rollout.tolist() == [0, 0, 0, 0, 0]
    assert first.temperature.tolist() == [0.5] * 5
    assert second.rollout.tolist() == [0] * 7 + [1] * 5
    assert first.documents.ends.tolist() == [0, 5, 9]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_trained_token_is_on_one_rank(num_ranks):
    batch = make_batch(LENGTHS, packs=PACKS, supervised=[1])
    plans = [plan_step(batch, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    packs = [pack for plan in plans for pack in plan.packs]
    assert sum(len(pack.token_ids) for pack in packs) == batch.num_tokens
    for name in ("rl", "ce", "ref"):
        total = sum(float(pack.weights[name].sum()) for pack in packs)
        assert total == getattr(batch, f"{name}_weight").sum() == plans[0].counts[name]
    assert all(plan.counts == plans[0].counts for plan in plans)


def test_a_rank_without_samples_still_has_a_forward():
    batch = make_batch([5, 6], packs=[0, 2])
    plan = plan_step(dataclasses.replace(batch, num_packs=4), rank=1, num_ranks=2)
    assert [len(pack.scored) for pack in plan.packs] == [4, 0]


def test_counts_rollouts_that_are_split_over_packs():
    plan = plan_step(make_batch(LENGTHS, packs=PACKS, rollouts=[1, 1, 2, 3]), rank=0, num_ranks=1)
    assert (plan.num_split, plan.num_rollouts) == (1, 3)


def test_refuses_a_batch_for_another_number_of_ranks():
    with pytest.raises(InfrastructureError, match="2 packs for 3 ranks"):
        plan_step(make_batch(LENGTHS, packs=PACKS), rank=0, num_ranks=3)


def test_refuses_to_train_a_first_token():
    with pytest.raises(InfrastructureError, match="sample 0 trains its first token"):
        plan_step(make_batch(LENGTHS, prompt=0), rank=0, num_ranks=1)


def test_refuses_supervision_at_another_temperature():
    batch = make_batch(LENGTHS, supervised=[2])
    hot = np.array([1, 1, 0.7, 1], np.float32)
    with pytest.raises(InfrastructureError, match=r"sample 2 has supervised tokens at temperature 0\.69"):
        plan_step(dataclasses.replace(batch, temperature=hot), rank=0, num_ranks=1)


def test_what_packs_say_goes_back_to_samples():
    """All ranks together have every trained token once, in the order of its sample."""
    batch = _batch_for_split()
    value_N = np.arange(batch.num_tokens, dtype=np.float32)
    found: dict[int, list[float]] = {}
    for rank in range(2):
        plan = plan_step(batch, rank=rank, num_ranks=2)
        samples = samples_of(batch, rank, 2)
        per_pack = batch.num_packs // 2
        said = []
        for pack, index in zip(plan.packs, range(rank * per_pack, (rank + 1) * per_pack), strict=True):
            tokens = [np.arange(*batch.offsets[s : s + 2]) for s in np.flatnonzero(batch.pack == index)]
            whole = torch.from_numpy(value_N[np.concatenate(tokens)]) if tokens else torch.zeros(2)
            said.append(whole[pack.scored])
        found |= {s: values.tolist() for s, values in zip(samples, split(batch, samples, said), strict=True)}
    offsets, trained = batch.offsets, batch.rl_weight != 0
    assert found == {
        s: value_N[offsets[s] : offsets[s + 1]][trained[offsets[s] : offsets[s + 1]]].tolist()
        for s in range(batch.num_samples)
    }


def _batch_for_split() -> Batch:
    lengths = np.array([3, 5, 2, 4])
    weight = np.array([0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1], np.float32)
    zeros = np.zeros(14, np.float32)
    return Batch(
        step=0,
        attempt=1,
        num_packs=4,
        max_pack_tokens=16,
        token_ids=np.arange(14),
        engine_logprobs=zeros,
        advantage=zeros,
        rl_weight=weight,
        ce_weight=zeros,
        ref_weight=zeros,
        reference_logprobs=zeros,
        lengths=lengths,
        rollout=np.arange(4),
        temperature=np.ones(4, np.float32),
        pack=np.array([3, 0, 0, 2]),
        version=np.zeros(4, np.int64),
    )
