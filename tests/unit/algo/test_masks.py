"""Masks over whole rollouts against numbers computed by hand. Where a token is kept, the loss's own gradient stands."""

import math

import pytest
import torch

from palestra.algo.losses import LOSSES, RolloutMasks, policy_loss, with_masks


def run(masks: RolloutMasks, ratios, advantage, rollout, *, loss="none", weight=None):
    """(gradient, stats)."""
    engine_logp_T = torch.full((len(ratios),), math.log(0.01), dtype=torch.float64)
    trainer_logp_T = (engine_logp_T + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    term = with_masks(policy_loss(loss), masks)(
        trainer_logp_T,
        engine_logp_T,
        torch.tensor(advantage, dtype=torch.float64),
        torch.tensor([1.0] * len(ratios) if weight is None else weight, dtype=torch.float64),
        torch.tensor(rollout),
    )
    term.loss_T.sum().backward()
    return trainer_logp_T.grad.tolist(), {name: tuple(parts.tolist()) for name, parts in term.stats.items()}


def test_the_geometric_mean_of_a_rollout_is_judged_over_its_two_samples():
    # rollout 0, tokens 0, 1 and 4: (0.5 x 2 x 0.125)^(1/3) = 0.5; rollout 1: sqrt(4 x 9) = 6; rollout 2: 1.2
    ratios, rollout = [0.5, 2, 4, 9, 0.125, 1.2], [0, 0, 1, 1, 0, 2]
    gradient, stats = run(RolloutMasks(geometric_low=0.6, geometric_high=5.0), ratios, [1.0] * 6, rollout)
    assert gradient == [0, 0, 0, 0, 0, -1]
    assert stats["masked_geometric"] == (2, 3)
    assert stats["masked_by_rollout"] == (5, 6)
    # wider bounds keep both; one side alone masks one
    assert run(RolloutMasks(geometric_low=0.4, geometric_high=7.0), ratios, [1.0] * 6, rollout)[0] == [-1] * 6
    assert run(RolloutMasks(geometric_low=0.6), ratios, [1.0] * 6, rollout)[0] == [0, 0, -1, -1, 0, -1]


def test_length_does_not_tighten_the_geometric_bound():
    # 100 tokens of ratio 1.1: the product is 13,781, the geometric mean 1.1
    gradient, _ = run(RolloutMasks(geometric_high=1.2), [1.1] * 100, [1.0] * 100, [0] * 100)
    assert gradient == [-1] * 100


def test_only_what_is_worse_than_the_others_and_left_behind_is_masked():
    # mean(-log r): rollouts 0 and 1 have (ln 2 + ln 8) / 2 = 1.386; rollout 2 has -ln 4
    ratios, rollout = [0.5, 0.125, 0.5, 0.125, 4, 4], [0, 0, 1, 1, 2, 2]
    advantage = [-1.0, -1, 1, 1, -1, -1]
    gradient, stats = run(RolloutMasks(negative_mismatch=1.3), ratios, advantage, rollout)
    assert gradient == [0, 0, -1, -1, 1, 1]
    assert stats["masked_negative"] == (1, 3)
    assert stats["masked_by_rollout"] == (2, 6)
    assert run(RolloutMasks(negative_mismatch=1.4), ratios, advantage, rollout)[0] == [1, 1, -1, -1, 1, 1]


def test_untrained_tokens_have_no_say():
    ratios, rollout, weight = [0.001, 1, 1], [0, 0, 0], [0.0, 1, 1]
    gradient, stats = run(RolloutMasks(geometric_low=0.9), ratios, [1.0] * 3, rollout, weight=weight)
    assert gradient == [0, -1, -1]
    assert stats["masked_by_rollout"] == (0, 2)


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_keeps_its_statistics_and_its_gradient_elsewhere(name: str):
    ratios, rollout = [0.9, 0.9, 1.05, 1.05], [0, 0, 1, 1]
    masks = RolloutMasks(geometric_low=0.95)
    plain, plain_stats = run(RolloutMasks(), ratios, [1.0, 1, 2, 2], rollout, loss=name)
    masked, stats = run(masks, ratios, [1.0, 1, 2, 2], rollout, loss=name)
    assert masked == [0, 0, *plain[2:]]
    assert {key: stats[key] for key in plain_stats} == plain_stats


def test_a_nan_is_not_hidden_by_a_mask():
    gradient, _ = run(RolloutMasks(0.9, 1.1, 0.1), [math.nan, 2.0], [1.0, 1.0], [0, 1], loss="mis")
    assert math.isnan(gradient[0])
    assert gradient[1] == 0


def test_masks_that_are_off_are_not_there():
    loss = policy_loss("mis")
    assert with_masks(loss, RolloutMasks()) is loss
