"""Prompt lengths for a wanted ratio, and the batches that the trainer is calibrated with."""

import pytest

from palestra.config import load
from palestra.launch.bench.calibrate import SHORTEST_PROMPT, made_batches, prompt_for
from palestra.launch.bench.lengths import LengthLaw
from palestra.launch.bench.loop import RECIPE


@pytest.mark.parametrize(("ratio", "tokens"), [(0.5, 90), (1.0, 40), (2.0, 15)])
def test_the_prompt_that_gives_a_ratio(ratio: float, tokens: int):
    """Training takes 2 s and 0.2 s for each token of a prompt, generating 10 s: 90 tokens make 20 s, 40 10, 15 5."""
    measured = [2.0, 2.0, 11.0, 13.0]  # prompts of 0 and 50: 2 and 12 s
    found = prompt_for(ratio, generate_s=10.0, rollouts=10, prompts=[0, 0, 50, 50], train_s=measured)
    assert found == tokens


def test_a_ratio_out_of_reach_gives_the_shortest_prompt():
    found = prompt_for(8.0, generate_s=10.0, rollouts=10, prompts=[0, 50], train_s=[2.0, 12.0])
    assert found == SHORTEST_PROMPT


def test_made_batches_differ_in_their_prompts_only():
    config = load(RECIPE, ["algo.groups_per_step=2", "algo.group_size=4"]).config
    short, long = made_batches(config, [4, 54], law=LengthLaw(median=8))
    assert (short.step, long.step) == (0, 1)
    assert long.num_tokens - short.num_tokens == 8 * 50
    assert short.rl_weight.sum() == long.rl_weight.sum() > 0
    assert sorted((long.lengths - 50).tolist()) == sorted(short.lengths.tolist())
