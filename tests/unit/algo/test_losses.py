"""Values and gradients against numbers computed by hand.

Every expected list is written out. `gradient` is d(sum of loss) / d(trainer logp). Where a loss is differentiated
through r, d(-w r A)/d(logp) = -w r A, so value and gradient are the same number.
"""

import math

import pytest
import torch
from torch import Tensor

from palestra.algo.losses import LOSSES, cross_entropy, effective_sample_share, policy_loss, reference_kl

Q = 0.2  # the engine's probability of every token, unless a test says otherwise


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(loss, ratios, advantage, *, weight=None, rollout=None, engine=None, **options):
    """(loss, gradient, stats) of a loss for given ratios r, rounded for comparison."""
    engine_logp_T = tensor([Q] * len(ratios) if engine is None else engine).log()
    trainer_logp_T = (engine_logp_T + tensor(ratios).log()).requires_grad_()
    weight_T = tensor([1.0] * len(ratios) if weight is None else weight)
    rollout_T = torch.tensor(list(range(len(ratios))) if rollout is None else rollout)
    term = policy_loss(loss, options)(trainer_logp_T, engine_logp_T, tensor(advantage), weight_T, rollout_T)
    term.loss_T.sum().backward()
    stats = {name: tuple(parts.tolist()) for name, parts in term.stats.items()}
    return term.loss_T.tolist(), trainer_logp_T.grad.tolist(), stats


def test_masked_importance_sampling_inside_and_outside_the_band():
    # r = 0.4 and 6 are outside [0.5, 5]: 0. Else -w r A: -0.6, 2 x 2 = 4, -0.5 x 1 x 3 = -1.5
    expected = [0, -0.6, 4, 0, -1.5]
    loss, gradient, stats = run("mis", [0.4, 0.6, 2, 6, 1], [1, 1, -2, 1, 3], weight=[1, 1, 1, 1, 0.5])
    assert loss == pytest.approx(expected)
    assert gradient == pytest.approx(expected)
    assert stats["below_band"] == stats["above_band"] == (1, 5)
    assert stats["masked_tokens"] == (2, 5)
    assert stats["masked_rollouts"] == (0, 5)
    assert stats["ratio"] == pytest.approx((10.0, 5))  # 0.4 + 0.6 + 2 + 6 + 1
    assert stats["ratio_squared"] == pytest.approx((41.52, 5))  # 0.16 + 0.36 + 4 + 36 + 1


def test_masked_importance_sampling_masks_a_rollout_whole_over_its_two_samples():
    # tokens 0, 1 are the first sample of rollout 0 and 4, 5 its second; token 5 falls below the floor
    rollout = [0, 0, 1, 1, 0, 0]
    loss, gradient, stats = run("mis", [1, 2, 1, 2, 1, 1e-6], [1] * 6, rollout=rollout)
    assert loss == gradient == pytest.approx([0, 0, -1, -2, 0, 0])
    assert stats["masked_rollouts"] == (1, 2)
    assert stats["masked_tokens"] == (4, 6)
    # the control: 1e-4 is above the floor, so it alone is masked
    loss, _, stats = run("mis", [1, 2, 1, 2, 1, 1e-4], [1] * 6, rollout=rollout)
    assert loss == pytest.approx([-1, -2, -1, -2, -1, 0])
    assert stats["masked_rollouts"] == (0, 2)


def test_masked_importance_sampling_looks_at_trained_tokens_only():
    loss, _, stats = run("mis", [1e-9, 1], [1, 1], weight=[0, 1], rollout=[0, 0])
    assert loss == pytest.approx([0, -1])
    assert stats["masked_tokens"] == (0, 1)


def test_truncated_importance_sampling():
    # coefficients min(r, 2) A: 0.5, -2, 4. logp = ln 0.1, ln 0.4, ln 0.8 = -2.302585, -0.916291, -0.223144
    loss, gradient, stats = run("tis", [0.5, 2, 4], [1, -1, 2])
    assert gradient == pytest.approx([-0.5, 2, -4])
    assert loss == pytest.approx([1.1512925, -1.8325815, 0.8925742])
    assert stats["above_band"] == (1, 3)


def test_cispo_clips_the_weight_on_both_sides_and_drops_no_token():
    # clip(r, 0.7, 3) A: 0.7, -2, 6
    _, gradient, stats = run("cispo", [0.5, 2, 4], [1, -1, 2], low=0.7, high=3.0)
    assert gradient == pytest.approx([-0.7, 2, -6])
    assert stats["below_band"] == stats["above_band"] == (1, 3)
    # the default has no lower bound and 5 above
    assert run("cispo", [0.01, 8], [1, 1])[1] == pytest.approx([-0.01, -5])


def test_gspo_has_one_ratio_per_rollout_over_its_two_samples():
    # rollout 0: sqrt(0.5 x 8) = 2 > 1.5; rollout 1: sqrt(0.6 x 1.35) = 0.9, inside [0.5, 1.5]
    ratios, rollout = [0.5, 0.6, 1.35, 8], [0, 1, 1, 0]
    # A = 1: min(2, 1.5) is clipped and constant; A = 2: -0.9 x 2 through s
    loss, gradient, stats = run("gspo", ratios, [1, 2, 2, 1], rollout=rollout, low=0.5, high=1.5)
    assert loss == pytest.approx([-1.5, -1.8, -1.8, -1.5])
    assert gradient == pytest.approx([0, -1.8, -1.8, 0])
    assert stats["above_band"] == (2, 4)
    # A = -1: min(-2, -1.5) = -2 is not clipped
    loss, gradient, _ = run("gspo", ratios, [-1, 2, 2, -1], rollout=rollout, low=0.5, high=1.5)
    assert loss == gradient == pytest.approx([2, -1.8, -1.8, 2])


def test_gspo_leaves_untrained_tokens_out_of_the_mean():
    loss, gradient, _ = run("gspo", [4, 1, 100], [1] * 3, weight=[1, 1, 0], rollout=[0] * 3, low=0.5, high=3.0)
    assert loss == gradient == pytest.approx([-2, -2, 0])  # sqrt(4 x 1) = 2
    assert run("gspo", [1.2, 9], [1, 1], weight=[1, 0], rollout=[0, 1], low=0.5, high=1.5)[0] == pytest.approx(
        [-1.2, 0]
    )


def test_ppo_clip_stops_only_in_the_direction_of_the_advantage():
    loss, gradient, stats = run("ppo_clip", [0.5, 0.5, 1.1, 2, 2], [1, -1, 1, 1, -1])
    # min(0.5, 0.8), min(-0.5, -0.8), min(1.1, 1.1), min(2, 1.2), min(-2, -1.2)
    assert loss == pytest.approx([-0.5, 0.8, -1.1, -1.2, 2])
    assert gradient == pytest.approx([-0.5, 0, -1.1, 0, 2])
    assert stats["below_band"] == stats["above_band"] == (2, 5)
    # asymmetric: 2 is inside [0.8, 2.5]
    assert run("ppo_clip", [2], [1], high=2.5)[1] == pytest.approx([-2])


def test_dppo_masks_by_divergence_not_by_ratio():
    # (p, q) = (0.5, 0.3) and (0.1, 0.3): |p - q| = 0.2 > 0.15, masked where A pushes further away.
    # (0.01, 0.001): ten times as likely, yet only 0.009 apart, so it learns with r = 10.
    # (0.03, 0.001): r = 30, capped at 20.
    p, q = [0.5, 0.5, 0.1, 0.1, 0.01, 0.03], [0.3, 0.3, 0.3, 0.3, 0.001, 0.001]
    ratios = [a / b for a, b in zip(p, q, strict=True)]
    advantage = [1, -1, 1, -1, 1, 1]
    _, gradient, stats = run("dppo", ratios, advantage, engine=q)
    assert gradient == pytest.approx([0, 5 / 3, -1 / 3, 0, -10, -20])
    assert stats["masked_above"] == stats["masked_below"] == (1, 6)
    assert stats["divergence"] == pytest.approx((0.838, 6))  # 4 x 0.2 + 0.009 + 0.029
    # the control: clipping the ratio stops both rare tokens
    assert run("ppo_clip", ratios, advantage, engine=q)[1][4:] == [0, 0]


def test_dppo_with_the_binary_kl():
    # q ln(q/p) + (1-q) ln((1-q)/(1-p)):
    #   p 0.5, q 0.3: 0.3 ln 0.6 + 0.7 ln 1.4 = -0.1532477 + 0.2355306 = 0.0822829
    #   p 0.1, q 0.3: 0.3 ln 3 + 0.7 ln (7/9) = 0.3295837 - 0.1759201 = 0.1536636
    options = {"engine": [0.3, 0.3], "divergence": "kl", "delta_low": 0.1, "delta_high": 0.1}
    _, gradient, stats = run("dppo", [5 / 3, 1 / 3], [1, -1], **options)
    assert stats["divergence"] == pytest.approx((0.2359465, 2), abs=1e-7)
    assert gradient == pytest.approx([-5 / 3, 0])  # 0.082 <= 0.1 < 0.154


def test_dppo_with_the_binary_kl_is_finite_at_certainty():
    _, gradient, _ = run("dppo", [1.0, 0.5], [1, 1], engine=[1.0, 1.0], divergence="kl")
    assert gradient == pytest.approx([-1, -0.5])


def test_without_correction_the_ratio_counts_as_one():
    # -w A: whatever r is. logp = ln 0.1, ln 0.4, ln 0.8 = -2.302585, -0.916291, -0.223144
    loss, gradient, stats = run("none", [0.5, 2, 4], [1, -1, 2], weight=[1, 1, 0.5])
    assert gradient == pytest.approx([-1, 1, -1])
    assert loss == pytest.approx([2.3025851, -0.9162907, 0.2231436])
    assert stats["ratio"] == pytest.approx((6.5, 3))
    # the control: the default weighs the same tokens by 0.5, 2 and 4
    assert run("mis", [0.5, 2, 4], [1, -1, 2], weight=[1, 1, 0.5])[1] == pytest.approx([-0.5, 2, -4])


def test_cross_entropy():
    logp_T = tensor([0.5, 0.25, 0.1]).log().requires_grad_()
    term = cross_entropy(logp_T, tensor([1.0, 2.0, 0.0]))
    term.loss_T.sum().backward()
    assert term.loss_T.tolist() == pytest.approx([math.log(2), 4 * math.log(2), 0])
    assert logp_T.grad.tolist() == [-1, -2, 0]
    assert term.stats["nll"].tolist() == pytest.approx([3 * math.log(2), 2])


def test_reference_kl():
    # d = ln 0.5 and ln 2: 0.5 - 1 + 0.6931472 and 2 - 1 - 0.6931472; gradient w (1 - exp d) = 0.5 and -1
    trainer_T = tensor([0.5, 0.25]).log().requires_grad_()
    term = reference_kl(trainer_T, tensor([0.25, 0.5]).log(), tensor([1.0, 2.0]))
    term.loss_T.sum().backward()
    assert term.loss_T.tolist() == pytest.approx([0.1931472, 2 * 0.3068528], abs=1e-7)
    assert trainer_T.grad.tolist() == pytest.approx([0.5, -2])
    assert term.stats["reference_k1"].tolist() == pytest.approx([0, 2])
    assert term.stats["reference_k3"].tolist() == pytest.approx([0.5, 2])


def test_mismatch_estimators_and_effective_sample_share():
    # k1 = -ln 2, ln 2; k3 = 2 - 1 - ln 2, 0.5 - 1 + ln 2: together 0.5
    _, _, stats = run("mis", [2, 0.5], [1, 1], low=0.1)
    assert stats["mismatch_k1"] == pytest.approx((0, 2))
    assert stats["mismatch_k3"] == pytest.approx((0.5, 2))
    parts = {name: tensor(stat) for name, stat in run("mis", [3, 1], [1, 1])[2].items()}
    assert effective_sample_share(parts) == pytest.approx(0.8)  # (3 + 1)^2 / (2 x (9 + 1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {}, "choose one of mis, tis, cispo, gspo, dppo, ppo_clip, none"),
        ("mis", {"cap": 2.0}, "has no option cap; it has low=0.5, high=5.0, floor=1e-05"),
        ("ppo_clip", {"low": 1.3}, "low must be less than high"),
        ("mis", {"low": "0.5"}, r"algo\.loss_args\.low='0\.5' is not a number"),
        ("dppo", {"divergence": "js"}, "choose one of tv, kl"),
    ],
)
def test_a_wrong_name_or_option_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(name, options)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match=r"each must be a flat \[T\]"):
        LOSSES[name](torch.zeros(3), torch.zeros(1), torch.zeros(3), torch.ones(3), torch.zeros(3, dtype=torch.int64))
