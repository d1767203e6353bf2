"""Rules that warn before a collapse: each is triggered by a history of its own, and healthy ones trigger none."""

import math
import random

import pytest

from palestra.orchestrate.health import RULES, Health


def healthy(step: int, seed: int = 0) -> dict[str, float]:
    """A run that learns, with the noise of a real one (the quickstart's): entropy falls as the reward rises."""
    noise = random.Random(seed * 1000 + step)
    learned = 1 - math.exp(-step / 60)
    return {
        "train/rl/entropy": 0.35 * (1 - 0.85 * learned) * noise.uniform(0.9, 1.1),
        "train/rl/effective_share": 0.97 - 0.03 * noise.random(),
        "train/rl/mismatch_k3": 0.015 * noise.random(),
        "train/rl/masked_tokens": 0.01 * noise.random(),
        "train/rl/below_band": 0.006 * noise.random(),
        "train/rl/above_band": 0.004 * noise.random(),
        "train/grad_norm": noise.uniform(1.5, 5.7),
        "rollout/truncated": 0.006 * noise.random(),
        "reward/finished": 0.2 + 0.75 * learned + noise.uniform(-0.05, 0.05),
        "groups/zero_signal_share": 0.4 + 0.2 * learned + noise.uniform(-0.1, 0.1),
        "rollout/length_drift": noise.uniform(-0.02, 0.02),
        "age/mean": 1.0,
    }


def warnings(history, health: Health | None = None) -> list[tuple[str, int]]:
    health = health or Health()
    return [(said.rule, said.step) for step, row in enumerate(history) for said in health.note(step, row)]


def spoiled(num_steps: int, start: int, **changes) -> list[dict[str, float]]:
    """A healthy history in which the named metrics are replaced from `start` on; a change is a function of the step."""
    rows = [healthy(step) for step in range(num_steps)]
    for step, row in enumerate(rows):
        row |= {name: change(step) for name, change in changes.items() if step >= start}
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_left_in_peace(seed: int):
    assert warnings([healthy(step, seed) for step in range(200)]) == []


def test_a_run_without_any_of_the_metrics_is_left_in_peace():
    assert warnings([{"train/ce/loss": 1.0}] * 60) == []
    assert warnings([dict.fromkeys(healthy(0), math.nan)] * 60) == []


# rule, metrics from step 60 on, words with the numbers, first step that may speak
COLLAPSES = [
    (
        "entropy",
        {"train/rl/entropy": lambda s: 0.12 * math.exp(-(s - 60) / 8), "reward/finished": lambda s: 0.6},
        ["entropy is collapsing", "lower train.lr"],
    ),
    ("effective_share", {"train/rl/effective_share": lambda s: 0.31}, ["31%", "mean age of 1.0", "train.lr_ess_power"]),
    ("mismatch", {"train/rl/mismatch_k3": lambda s: 0.001 * 1.2 ** (s - 60)}, ["drift apart", "publish/max_abs"]),
    (
        "masked",
        {"train/rl/masked_tokens": lambda s: 0.2, "train/rl/above_band": lambda s: 0.15},
        ["12%", "9.1% above", "algo.pace_age"],
    ),
    ("grad_norm", {"train/grad_norm": lambda s: 80.0 if s == 60 else 3.0}, ["jumped to 80", "max_grad_norm"]),
    ("truncated", {"rollout/truncated": lambda s: min(0.02 * (s - 60), 0.45)}, ["cut off", "sampling.max_tokens"]),
    (
        "zero_signal",
        {"groups/zero_signal_share": lambda s: 0.9},
        ["of the groups all rewards are equal", "harder or easier"],
    ),
    ("length_drift", {"rollout/length_drift": lambda s: -0.004 * (s - 60)}, ["10% shorter", "algo.max_age"]),
]


@pytest.mark.parametrize(("rule", "changes", "words"), COLLAPSES, ids=[rule for rule, _, _ in COLLAPSES])
def test_each_rule_speaks_once_with_numbers_and_advice(rule, changes, words):
    health = Health()
    said = warnings(spoiled(120, 60, **changes), health)
    assert [name for name, _ in said] == [rule]
    assert 60 <= said[0][1] < 100
    assert all(word in health.warnings[0].text for word in words), health.warnings[0].text


def test_every_rule_has_a_collapse_here():
    assert {rule for rule, _, _ in COLLAPSES} == {rule.name for rule in RULES}


def test_entropy_may_fall_while_the_reward_rises():
    """The negative control to the entropy rule: the same fall, earned."""
    rows = spoiled(
        120,
        60,
        **{
            "train/rl/entropy": lambda s: 0.12 * math.exp(-(s - 60) / 8),
            "reward/finished": lambda s: 0.6 + 0.01 * (s - 60),
        },
    )
    assert warnings(rows) == []


def test_in_self_play_the_rewards_of_seats_are_looked_at():
    """The planted fault: the rollouts' own reward, always 0, never rises, and is no news of equal rewards."""
    fall = {"train/rl/entropy": lambda s: 0.12 * math.exp(-(s - 60) / 8), "reward/finished": lambda s: 0.0}

    def told(slope: float) -> list[str]:
        won = [slope * max(step - 60, 0) for step in range(120)]
        rows = [
            {**row, "reward/finished/first": of, "reward/finished/second": -of}
            for row, of in zip(spoiled(120, 60, **fall), won, strict=True)
        ]
        return [rule for rule, _ in warnings(rows)]

    assert told(0.03) == []
    assert told(0.0) == [rule for rule, _ in warnings(spoiled(120, 60, **fall))] == ["entropy"]

    health = Health()
    flat = {"reward/finished": 0.0, "reward/finished/first": 0.5, "reward/finished/second": -0.5}
    warnings([{**flat, "groups/zero_signal_share": 1.0}] * 5, health)
    assert "(mean reward 0.00, first 0.50, second -0.50)" in health.warnings[0].text


def test_one_absurd_step_is_not_a_fall_of_the_effective_sample_size():
    assert warnings(spoiled(120, 60, **{"train/rl/effective_share": lambda s: 0.01 if s == 60 else 0.95})) == []


def test_a_number_that_swings_about_its_bound_is_named_once_and_again_only_after_it_recovered():
    swings = {"train/rl/effective_share": lambda s: 0.48 if s // 10 % 2 else 0.55}
    assert [rule for rule, _ in warnings(spoiled(160, 60, **swings))] == ["effective_share"]
    recovers = {"train/rl/effective_share": lambda s: 0.3 if s < 80 or s >= 110 else 0.95}
    assert [rule for rule, _ in warnings(spoiled(160, 60, **recovers))] == ["effective_share"] * 2
