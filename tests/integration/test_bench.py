"""The smallest bench against the real engine: the bare client, then the loop on the same engine, read back."""

import asyncio
import math

import numpy as np
import pytest

from palestra.config import load
from palestra.env.chat import load_tokenizer
from palestra.launch.bench import readings
from palestra.launch.bench.lead import Pass, asks_of
from palestra.launch.bench.loop import RECIPE
from palestra.launch.bench.parts import Bench, Part

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PASSES = 5  # each takes a moment, in which the machine may stand still
SMALL = [
    "model.build.config.hidden_size=64",
    "model.build.config.intermediate_size=128",
    "model.build.config.num_hidden_layers=2",
    "model.build.config.num_attention_heads=2",
    "model.build.config.num_key_value_heads=1",
    "algo.groups_per_step=4",
    "algo.group_size=4",
    "train.steps=4",
    "train.max_pack_tokens=256",
    "engine.max_in_flight=8",
    "engine.max_model_len=128",
    "engine.kv_cache_gib=0.25",
    "sampling.max_tokens=96",
    'env.mix=[{id="palestra.launch.bench.environment:ForcedLengths", name="forced", '
    "args={prompt_tokens=8, median_tokens=6}}]",
]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    bench = Bench(load(RECIPE, SMALL).config, tmp_path_factory.mktemp("bench"))
    return bench.loop(bench.variant("small"), alone=[Pass(8, 0, 4)] * PASSES)


def test_the_numbers_of_a_real_run(part: Part):
    within = readings.window(part.rows, skip=1, leave=0)
    reading = readings.read(part.rows, part.entries, rollouts_per_step=16, within=within)
    assert [(alone.num_replies, alone.in_flight) for alone in part.alone] == [(16, 8)] * PASSES
    alone = max(part.alone, key=lambda alone: alone.saturated_tokens_per_s)
    assert 0 < readings.engine_utilisation(reading, alone) < 1.5
    assert 0 <= reading.trainer_idle < 1
    assert reading.stall_s > 0.02  # vLLM sleeps so long in a pause
    assert math.isfinite(readings.stall_decode_steps(reading, alone))
    assert 0 < reading.packing_fill <= 1
    assert readings.closure(part.entries) < 0.01
    assert len(readings.generate_walls_s(part.spans)) == 4


def test_the_loop_trained_replies_of_the_lengths_that_the_bare_client_asked_for(part: Part):
    asks = asyncio.run(asks_of(part.config, load_tokenizer(part.config.model_dir), 8))
    for step in range(4):
        batch = part.run.batches.read(step, attempt=1)
        for rollout_id in np.unique(batch.rollout):
            sampled = batch.rl_weight[np.repeat(batch.rollout, batch.lengths) == rollout_id].sum()
            if rollout_id < len(asks):
                assert sampled == asks[rollout_id].num_tokens
