"""Laws of the step: how samples are packed changes nothing, each component has its own count, faults are visible."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from palestra.algo.losses import policy_loss
from palestra.config.schema import Train
from palestra.core.errors import PalestraError
from palestra.core.ledger import Ledger
from palestra.core.metrics import Mean, values
from palestra.model.load import load_policy, passes
from palestra.train.optimizer import make_optimizer
from palestra.train.packs import plan_step
from palestra.train.step import Readings, pack_loss, train_step
from tests.unit.train.batches import make_batch

LENGTHS = [9, 4, 17, 5, 12, 6, 4, 8]
LOSS = policy_loss("mis", {"low": 1e-9, "high": 1e9, "floor": 0.0})  # nothing masked: the law is about sums


@pytest.fixture
def policy(qwen, ranks):
    return load_policy(
        str(qwen),
        dtype=torch.float32,
        experts="grouped_mm",
        head_chunk_tokens=16,
        meshes=ranks.meshes,
        device=ranks.device,
    )


def _gradients(policy, batch, rl_loss=LOSS):
    readings = Readings()
    plan = plan_step(batch, rank=0, num_ranks=1)
    for pack in plan.packs:
        pack_loss(policy, pack, plan.counts, rl_loss, readings).backward()
    grads = {name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    return grads, readings


def _assert_same(grads, others):
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], atol=1e-6, rtol=1e-4)


def _step(policy, batch, ranks, lr=1e-3, rl_loss=LOSS, lr_ess_power=0.0, reshard_after="forward"):
    optimizer = make_optimizer(policy, policy.decoder_layers, Train())
    plan = plan_step(batch, rank=0, num_ranks=1)
    return train_step(
        policy,
        optimizer,
        plan,
        rl_loss=rl_loss,
        lr=lr,
        max_grad_norm=1.0,
        ranks=ranks,
        ledger=Ledger("test"),
        lr_ess_power=lr_ess_power,
        reshard_after=reshard_after,
    )


@pytest.mark.parametrize("packs", [range(8), [0, 0, 1, 1, 2, 2, 3, 3], [1, 0, 1, 0, 0, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("supervised", [(), (2, 5)])
def test_accumulated_microbatches_equal_one(policy, packs, supervised):
    whole, readings = _gradients(policy, make_batch(LENGTHS, supervised=supervised))
    parts, part_readings = _gradients(policy, make_batch(LENGTHS, packs=list(packs), supervised=supervised))
    _assert_same(parts, whole)
    assert parts.keys() == whole.keys()
    assert readings.means.keys() == part_readings.means.keys()
    for name, total_and_count in readings.means.items():
        torch.testing.assert_close(part_readings.means[name], total_and_count, atol=1e-4, rtol=1e-4)


def test_a_mean_of_means_is_another_gradient(policy):
    """The negative control: each pack divided by its own count, averaged over packs, is not the law above."""
    packs = [0, 0, 1, 1, 1, 1, 1, 1]
    batch = make_batch(LENGTHS, packs=packs)
    whole, _ = _gradients(policy, batch)
    plan = plan_step(batch, rank=0, num_ranks=1)
    for pack in plan.packs:
        own = {"rl": len(pack.scored), "ce": 0, "ref": 0}
        (pack_loss(policy, pack, own, LOSS, Readings()) / len(plan.packs)).backward()
    wrong = {name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    with pytest.raises(AssertionError):
        _assert_same(wrong, whole)


def test_the_loss_by_hand(policy):
    """loss = -sum(r A) / n for reinforcement and -sum(logp) / m for supervision, n and m counted apart."""
    batch = make_batch([6, 5, 7], supervised=[1])
    plan = plan_step(batch, rank=0, num_ranks=1)
    (pack,) = plan.packs
    with torch.no_grad():
        logp, _ = policy(pack.token_ids, pack.documents, pack.scored, pack.temperature)
        loss = pack_loss(policy, pack, plan.counts, LOSS, Readings())
    is_rl = pack.weights["rl"] > 0
    ratio = (logp - pack.engine_logp).exp()
    expected = -(ratio * pack.advantage)[is_rl].sum() / 9 - logp[~is_rl].sum() / 3
    assert plan.counts == {"rl": 9, "ce": 3, "ref": 0}
    torch.testing.assert_close(loss, expected)


def test_the_reference_is_a_component_of_its_own(policy):
    batch = make_batch([6, 5])
    batch = dataclasses.replace(
        batch, ref_weight=batch.rl_weight * 0.1, reference_logprobs=batch.engine_logprobs, rl_weight=batch.rl_weight * 0
    )
    plan = plan_step(batch, rank=0, num_ranks=1)
    (pack,) = plan.packs
    with torch.no_grad():
        logp, _ = policy(pack.token_ids, pack.documents, pack.scored, pack.temperature)
        loss = pack_loss(policy, pack, plan.counts, LOSS, Readings())
    d = pack.reference_logp - logp
    torch.testing.assert_close(loss, (0.1 * (d.exp() - 1 - d)).mean())


def test_a_rollout_of_two_samples_is_masked_whole(policy):
    """The 1e-5 rule looks over the samples of a rollout in one pack."""
    batch = make_batch([6, 6, 6], rollouts=[1, 1, 2])
    engine = batch.engine_logprobs.copy()
    engine[3] = 40.0  # one token of the first sample has a ratio below the floor
    mis = policy_loss("mis", {"low": 1e-9, "high": 1e9, "floor": 1e-5})
    _, readings = _gradients(policy, dataclasses.replace(batch, engine_logprobs=engine), mis)
    assert readings.means["train/rl/masked_rollouts"].tolist() == [1, 2]
    assert readings.means["train/rl/masked_tokens"].tolist() == [8, 12]


@pytest.mark.parametrize(
    ("reshard_after", "forward", "backward"),
    [("forward", "....", "...."), ("backward", "gggg", "...."), ("step", "gggg", "ggg.")],
)
def test_gathered_weights_are_kept_as_long_as_is_said(policy, ranks, reshard_after, forward, backward):
    """After the forward and the backward of each of four packs: gathered (g) or not; and no number changes."""
    batch = make_batch(LENGTHS, packs=[0, 0, 1, 1, 2, 2, 3, 3])
    plan = plan_step(batch, rank=0, num_ranks=1)
    after: dict[str, list[str]] = {"forward": [], "backward": []}

    def look(when: str) -> None:
        is_sharded = {isinstance(parameter, DTensor) for parameter in policy.decoder_layers[0].parameters()}
        after[when].append({True: ".", False: "g"}[is_sharded.pop()])
        assert not is_sharded

    for pack in passes(policy, plan.packs, reshard_after):
        loss = pack_loss(policy, pack, plan.counts, LOSS, Readings())
        look("forward")
        loss.backward()
        look("backward")
    assert ("".join(after["forward"]), "".join(after["backward"])) == (forward, backward)
    kept = {name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    once, _ = _gradients(policy, batch)
    assert all(torch.equal(kept[name], gradient) for name, gradient in once.items())
    _step(policy, batch, ranks, reshard_after=reshard_after)
    assert policy.score(torch.arange(9)).isfinite().all()
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def test_learns_and_accounts_for_its_time(policy, ranks):
    batch = make_batch(LENGTHS, supervised=range(8))
    ledger = Ledger("test")
    optimizer = make_optimizer(policy, policy.decoder_layers, Train(weight_decay=0.01))
    plan = plan_step(batch, rank=0, num_ranks=1)
    step = partial(train_step, policy, optimizer, plan, rl_loss=LOSS, max_grad_norm=1.0, ranks=ranks, ledger=ledger)
    losses = [step(lr=1e-2)["train/ce/loss"].value for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]
    entry = ledger.close()
    assert {"forward_backward", "optimizer"} <= entry.parts_s.keys()
    assert entry.closure < 0.01


def test_metrics_are_those_of_the_whole_batch(policy, ranks):
    batch = make_batch(LENGTHS, packs=[0, 0, 0, 1, 1, 1, 2, 2])
    metrics = _step(policy, batch, ranks, lr=0.0)
    num_trained = int((batch.rl_weight != 0).sum())
    mean = metrics["train/rl/mismatch_abs"]
    assert isinstance(mean, Mean)
    assert mean.count == num_trained
    numbers = values(metrics)
    assert numbers["train/tokens"] == sum(LENGTHS)
    assert numbers["train/packing/fill"] == pytest.approx(sum(LENGTHS) / (3 * 65))
    assert numbers["train/rl/mismatch_max"] > numbers["train/rl/mismatch_abs"] > 0
    assert 0 < numbers["train/rl/entropy"] < np.log(31)
    assert 0 < numbers["train/rl/effective_share"] <= 1


def _log_ratios(policy, batch):
    """(log r, age) of the trained tokens."""
    plan = plan_step(batch, rank=0, num_ranks=1)
    (pack,) = plan.packs
    with torch.no_grad():
        logp, _ = policy(pack.token_ids, pack.documents, pack.scored, pack.temperature)
    policy.reshard()
    return (logp - pack.engine_logp).double().numpy(), pack.age.numpy()


@pytest.mark.parametrize("packs", [[0] * 8, [0, 1, 2, 0, 1, 2, 0, 1]], ids=str)
def test_the_ratio_spreads_by_the_age_of_each_sample(policy, ranks, packs):
    ages = [0, 0, 2, 2, 4, 4, 4, 12]
    log_ratio, age = _log_ratios(policy, make_batch(LENGTHS, ages=ages))
    assert sorted(set(age)) == [0, 2, 4, 12]
    numbers = values(_step(policy, make_batch(LENGTHS, ages=ages, packs=packs), ranks, lr=0.0))
    spread = {name.removeprefix("train/rl/log_ratio/"): x for name, x in numbers.items() if "log_ratio/" in name}
    assert {name.split("/")[0] for name in spread} == {"age_0", "age_2", "age_3_4", "age_9_up"}
    for bucket, of_age in {"age_0": age == 0, "age_3_4": age == 4, "age_9_up": age == 12}.items():
        exact = np.quantile(log_ratio[of_age], [0.01, 0.5, 0.99], method="inverted_cdf")
        found = [spread[f"{bucket}/{quantile}"] for quantile in ("p01", "p50", "p99")]
        assert found == pytest.approx(exact.tolist(), rel=0.08, abs=1e-4)


@pytest.mark.parametrize("packs", [[0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]], ids=str)
def test_the_learning_rate_follows_the_effective_sample_size_of_the_whole_batch(policy, ranks, packs):
    log_ratio, _ = _log_ratios(policy, make_batch(LENGTHS))
    ratio = np.exp(log_ratio)
    share = ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())  # Kish, over all packs at once
    assert share < 0.9
    before = {name: parameter.detach().full_tensor().clone() for name, parameter in policy.named_parameters()}
    metrics = values(_step(policy, make_batch(LENGTHS, packs=packs), ranks, lr=1e-3, lr_ess_power=0.5))
    assert metrics["train/lr"] == pytest.approx(1e-3 * share**0.5, rel=1e-4)
    moved = max(
        float((parameter.detach().full_tensor() - before[name]).abs().max())
        for name, parameter in policy.named_parameters()
    )
    assert moved == pytest.approx(1e-3 * share**0.5, rel=1e-2)  # AdamW's first step is as long as its rate
    assert values(_step(policy, make_batch(LENGTHS), ranks, lr=1e-3))["train/lr"] == 1e-3  # off
    supervised = make_batch(LENGTHS, supervised=range(8))
    assert values(_step(policy, supervised, ranks, lr=1e-3, lr_ess_power=0.5))["train/lr"] == 1e-3


def _on_policy(policy, batch):
    """The batch as an engine would have sampled it: its log-probabilities are the policy's own."""
    plan = plan_step(batch, rank=0, num_ranks=1)
    (pack,) = plan.packs
    with torch.no_grad():
        logp, _ = policy(pack.token_ids, pack.documents, pack.scored, pack.temperature)
    policy.reshard()
    engine = np.zeros(batch.num_tokens, np.float32)
    engine[pack.scored.numpy()] = logp.numpy()
    return dataclasses.replace(batch, engine_logprobs=engine)


def test_a_wrong_temperature_in_the_trainer_is_visible(policy, ranks):
    """On policy the mismatch is rounding; with another temperature than the engine's it is not."""
    batch = _on_policy(policy, make_batch(LENGTHS, temperature=0.7))
    right = values(_step(policy, batch, ranks, lr=0.0))
    wrong = values(_step(policy, dataclasses.replace(batch, temperature=np.ones(8, np.float32)), ranks, lr=0.0))
    assert right["train/rl/mismatch_max"] < 1e-5
    assert right["train/rl/ratio"] == pytest.approx(1, abs=1e-6)
    assert wrong["train/rl/mismatch_abs"] > 0.05


def test_a_gradient_that_is_not_finite_leaves_the_policy_alone(policy, ranks):
    batch = make_batch(LENGTHS)
    broken = dataclasses.replace(batch, advantage=np.full(batch.num_tokens, np.nan, np.float32))
    before = {name: parameter.full_tensor().clone() for name, parameter in policy.named_parameters()}
    with pytest.raises(PalestraError, match="gradient's norm is nan"):
        _step(policy, broken, ranks)
    assert all(torch.equal(parameter.full_tensor(), before[name]) for name, parameter in policy.named_parameters())
    assert all(parameter.grad is None for parameter in policy.parameters())
