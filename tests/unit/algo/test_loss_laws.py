"""Laws that hold for every policy loss, whatever its formula."""

import math

import pytest
import torch
from torch import Tensor

from palestra.algo.losses import LOSSES, cross_entropy, policy_loss, reference_kl

NUM_ROLLOUTS, TOKENS_PER_ROLLOUT = 8, 6
T = NUM_ROLLOUTS * TOKENS_PER_ROLLOUT

every_loss = pytest.mark.parametrize("name", LOSSES)


def off_policy_pack(seed: int = 0) -> dict[str, Tensor]:
    """8 rollouts of 6 tokens, far enough off policy that every mask and clip acts; rollout 3 has collapsed."""
    generator = torch.Generator().manual_seed(seed)
    engine_logp_T = -3 * torch.rand(T, generator=generator, dtype=torch.float64) - 0.05
    drift_T = torch.randn(T, generator=generator, dtype=torch.float64)
    drift_T[3 * TOKENS_PER_ROLLOUT] = -14
    return {
        "trainer_logp_T": (engine_logp_T + drift_T).clamp(max=-1e-3),
        "engine_logp_T": engine_logp_T,
        "advantage_T": torch.randn(NUM_ROLLOUTS, generator=generator).double().repeat_interleave(TOKENS_PER_ROLLOUT),
        "weight_T": (torch.rand(T, generator=generator) > 0.2).double(),
        "rollout_T": torch.arange(NUM_ROLLOUTS).repeat_interleave(TOKENS_PER_ROLLOUT),
    }


def evaluate(name: str, pack: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [T], gradient [T], stats [names, 2])."""
    trainer_logp_T = pack["trainer_logp_T"].clone().requires_grad_()
    term = LOSSES[name](**(pack | {"trainer_logp_T": trainer_logp_T}))
    term.loss_T.sum().backward()
    assert trainer_logp_T.grad is not None
    return term.loss_T.detach(), trainer_logp_T.grad, torch.stack(list(term.stats.values()))


@every_loss
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name):
    pack = off_policy_pack()
    pack["trainer_logp_T"] = pack["engine_logp_T"]
    _, gradient_T, _ = evaluate(name, pack)
    torch.testing.assert_close(gradient_T, -pack["weight_T"] * pack["advantage_T"])


@every_loss
def test_8_microbatches_of_1_rollout_equal_1_of_8(name):
    pack = off_policy_pack()
    loss_T, gradient_T, stats = evaluate(name, pack)
    microbatches = [pack["rollout_T"] == rollout for rollout in range(NUM_ROLLOUTS)]
    parts = []
    for where in microbatches:
        microbatch = {stream: values[where] for stream, values in pack.items()}
        microbatch["rollout_T"] = torch.zeros_like(microbatch["rollout_T"])
        parts.append(evaluate(name, microbatch))
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), loss_T)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient_T)
    summed = sum((part[2] for part in parts), torch.zeros_like(stats))
    torch.testing.assert_close(summed, stats)
    # the control: microbatches have different token counts, and a mean of their means is another number
    mean_of_means = torch.stack([part[2][0, 0] / part[2][0, 1] for part in parts]).mean()
    assert abs(mean_of_means - stats[0, 0] / stats[0, 1]) > 1e-3


@every_loss
def test_the_order_of_tokens_and_the_numbering_of_rollouts_do_not_matter(name):
    pack = off_policy_pack()
    loss_T, gradient_T, stats = evaluate(name, pack)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    renumbered = torch.randperm(NUM_ROLLOUTS, generator=torch.Generator().manual_seed(2))
    shuffled = {stream: values[order] for stream, values in pack.items()}
    shuffled["rollout_T"] = renumbered[shuffled["rollout_T"]]
    shuffled_loss_T, shuffled_gradient_T, shuffled_stats = evaluate(name, shuffled)
    torch.testing.assert_close(shuffled_loss_T, loss_T[order])
    torch.testing.assert_close(shuffled_gradient_T, gradient_T[order])
    torch.testing.assert_close(shuffled_stats, stats)


@pytest.mark.parametrize("name", ["mis", "gspo"])
def test_cutting_a_rollout_over_two_packs_changes_what_looks_at_it_whole(name):
    """Why samples of a rollout are kept together: the control to the law above."""
    start = 3 * TOKENS_PER_ROLLOUT
    pack = {stream: values[start : start + TOKENS_PER_ROLLOUT] for stream, values in off_policy_pack().items()}
    pack["rollout_T"] = torch.zeros(TOKENS_PER_ROLLOUT, dtype=torch.int64)
    pack["weight_T"] = pack["advantage_T"] = torch.ones(TOKENS_PER_ROLLOUT).double()
    whole_T, _, _ = evaluate(name, pack)
    halves = [{stream: values[part] for stream, values in pack.items()} for part in (slice(0, 4), slice(4, None))]
    apart_T = torch.cat([evaluate(name, half)[0] for half in halves])
    assert not torch.allclose(whole_T, apart_T)


@every_loss
def test_what_stands_at_untrained_tokens_does_not_matter(name):
    pack = off_policy_pack()
    expected = evaluate(name, pack)
    untrained_T = pack["weight_T"] == 0
    for stream in ("trainer_logp_T", "engine_logp_T", "advantage_T"):
        pack[stream] = pack[stream].masked_fill(untrained_T, math.nan)
    for found, wanted in zip(evaluate(name, pack), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@every_loss
@pytest.mark.parametrize("stream", ["trainer_logp_T", "engine_logp_T"])
def test_a_nan_at_a_trained_token_is_not_hidden_by_a_mask(name, stream):
    pack = off_policy_pack()
    trained = int(pack["weight_T"].nonzero()[0])
    pack[stream][trained] = math.nan
    loss_T, _, stats = evaluate(name, pack)
    assert stats.isnan().any()
    if (name, stream) != ("none", "engine_logp_T"):  # whose loss does not read it
        assert loss_T[trained].isnan()


def test_a_ratio_that_overflows_is_masked_without_poisoning_the_gradient():
    pack = off_policy_pack()
    pack["trainer_logp_T"] = pack["trainer_logp_T"].float()
    pack["engine_logp_T"] = pack["engine_logp_T"].float()
    trained = int(pack["weight_T"].nonzero()[0])
    pack["engine_logp_T"][trained] = -200.0  # exp(197) is infinite in float32
    loss_T, gradient_T, stats = evaluate("mis", pack)
    assert loss_T[trained] == gradient_T[trained] == 0
    assert loss_T.isfinite().all()
    assert gradient_T.isfinite().all()
    assert stats.isfinite().all()


@every_loss
def test_an_empty_pack_costs_nothing(name):
    empty = {stream: values[:0] for stream, values in off_policy_pack().items()}
    loss_T, gradient_T, stats = evaluate(name, empty)
    assert len(loss_T) == len(gradient_T) == 0
    assert not stats.any()


@every_loss
def test_float32_in_float32_out(name):
    pack = {stream: v.float() if v.is_floating_point() else v for stream, v in off_policy_pack().items()}
    loss_T, _, stats = evaluate(name, pack)
    assert (loss_T.dtype, stats.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(loss_T.double(), evaluate(name, off_policy_pack())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mis", "ppo_clip"])
def test_losses_through_the_ratio_have_the_gradient_of_their_value(name):
    pack = off_policy_pack()
    trainer_logp_T = pack.pop("trainer_logp_T").requires_grad_()
    assert torch.autograd.gradcheck(lambda logp_T: LOSSES[name](logp_T, **pack).loss_T.sum(), trainer_logp_T)


def test_components_have_the_gradient_of_their_value():
    pack = off_policy_pack()
    logp_T = pack["trainer_logp_T"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, pack["weight_T"]).loss_T.sum(), logp_T)
    kl = lambda x: reference_kl(x, pack["engine_logp_T"], pack["weight_T"]).loss_T.sum()  # noqa: E731
    assert torch.autograd.gradcheck(kl, logp_T)


@every_loss
@pytest.mark.parametrize(("trainer_temperature", "expected_kl"), [(0.5, 0.0), (1.0, 0.0149396)])
def test_the_mismatch_shows_a_trainer_at_the_wrong_temperature(name, trainer_temperature, expected_kl):
    # At temperature 0.5 the engine samples q = (1/2, 1/4, 1/4), so its logits are ln(q) / 2. At temperature 1 they give
    # p = sqrt(q) / (sqrt(1/2) + 1) = (0.4142136, 0.2928932, 0.2928932).
    # KL(q || p) = 0.5 ln(0.5 / 0.4142136) + 0.5 ln(0.25 / 0.2928932) = 0.0941132 - 0.0791736 = 0.0149396
    q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    tokens = torch.tensor([0, 0, 1, 2])  # as often as q says, so that sample means are exact expectations
    trainer_logp_T = (0.5 * q.log() / trainer_temperature).log_softmax(0)[tokens]
    ones = torch.ones(4, dtype=torch.float64)
    stats = policy_loss(name)(trainer_logp_T, q.log()[tokens], ones, ones, torch.tensor([0, 0, 1, 1])).stats
    for estimate in ("mismatch_k1", "mismatch_k3"):
        total, count = stats[estimate].tolist()
        assert total / count == pytest.approx(expected_kl, abs=1e-6)
