"""A real trainer, fed with recorded batches, makes the same steps again."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from palestra.config import RunConfig
from palestra.launch import replay
from palestra.launch.start import write_config
from palestra.wire.batches import Batch
from palestra.wire.rundir import Attempt, RunDir
from palestra.wire.runlog import read_metrics

NUM_STEPS, NUM_SAMPLES, LENGTH = 3, 4, 12
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
CONFIG = {
    "model": {
        "build": {
            "architecture": "Qwen3ForCausalLM",
            "alphabet": "abcdefgh",
            "config": {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64},
        },
        "dtype": "float32",
    },
    "sampling": {"max_tokens": 16},
    "engine": {"max_model_len": 32},
    "train": {"steps": NUM_STEPS, "lr": 1e-3, "max_pack_tokens": 64, "batch_deadline_s": 240},
    "env": {"mix": [{"id": "never-loaded"}]},
}


def batch(step: int, rng: np.random.Generator) -> Batch:
    size = NUM_SAMPLES * LENGTH
    weight = np.tile(np.r_[np.zeros(4), np.ones(LENGTH - 4)], NUM_SAMPLES).astype(np.float32)
    nothing = np.zeros(size, np.float32)
    return Batch(
        step=step,
        attempt=1,
        num_packs=1,
        max_pack_tokens=64,
        token_ids=rng.integers(4, 12, size),
        engine_logprobs=-2.4 * weight,
        advantage=np.repeat(rng.normal(size=NUM_SAMPLES), LENGTH).astype(np.float32),
        rl_weight=weight,
        ce_weight=nothing,
        ref_weight=nothing,
        reference_logprobs=nothing,
        lengths=np.full(NUM_SAMPLES, LENGTH),
        rollout=np.arange(NUM_SAMPLES),
        temperature=np.ones(NUM_SAMPLES, np.float32),
        pack=np.zeros(NUM_SAMPLES, np.int64),
        version=np.full(NUM_SAMPLES, step),
    )


@pytest.fixture
def recorded(tmp_path: Path) -> RunDir:
    """A run directory with a config and batches, as a run leaves them."""
    config = RunConfig.model_validate({**CONFIG, "log": {"name": "run", "outputs": tmp_path}})
    run, rng = RunDir(config.run_dir), np.random.default_rng(0)
    write_config(run, config)
    addresses = {"supervisor": "", "orchestrator": "", "engines": (), "staging": ""}
    run.write_attempt(Attempt(number=1, resumed_from=None, started_at=0.0, **addresses))
    for step in range(NUM_STEPS):
        run.batches.write(batch(step, rng))
    return run


@pytest.mark.slow
def test_a_replay_of_a_replay_is_identical_and_a_changed_batch_is_found(recorded: RunDir):
    first = replay.replay(recorded)
    rows = read_metrics(first)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert len({row["train/grad_norm"] for row in rows}) == NUM_STEPS
    assert (first.export / "config.json").exists()
    shutil.copy(first.metrics, recorded.metrics)
    shutil.copytree(first.model, recorded.model)
    shutil.rmtree(first.path)

    recorded.batches.write(batch(2, np.random.default_rng(99)))
    differences = replay.compare(read_metrics(recorded), read_metrics(replay.replay(recorded)))
    of_loss = next(one for one in differences if one.metric == "train/rl/loss")
    assert of_loss.num_steps == NUM_STEPS
    assert {one.first_step for one in differences} <= {None, 2}  # steps 0 and 1: the same bits
    assert of_loss.first_step == 2
    assert of_loss.largest > 0
