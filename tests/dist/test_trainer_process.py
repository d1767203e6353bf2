"""The trainer as a process: what it says, in which order, and what it leaves behind."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from palestra.config.schema import RunConfig
from palestra.wire.messages import Done, Exported, Failed, Ready, StepTrained, TrainerSaved, WarmedUp, WeightsStaged
from palestra.wire.rundir import RunDir, read_manifests
from palestra.wire.runlog import read_ledger, read_metrics, read_summary
from tests.dist.orchestrated import closure, kinds, play
from tests.unit.model import tiny
from tests.unit.train.batches import make_batch

pytestmark = pytest.mark.slow

LENGTHS, PACKS = [9, 4, 17, 5, 12, 6, 4, 8], [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("data") / "rows.jsonl", random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 6))) for _ in range(200)]
    path.write_text("".join(json.dumps({"prompt": word, "completion": word[::-1]}) + "\n" for word in words))
    return path


def _config(out: Path, model: Path | str, sources: Path, *, rl: bool = True, warmup: int = 0, **train) -> RunConfig:
    return RunConfig.model_validate(
        {
            "log": {"name": "run", "outputs": out},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"sources": [{"path": str(sources)}], "warmup": {"steps": warmup, "samples_per_step": 16}},
            "train": {"steps": 4, "lr": 1e-3, "max_pack_tokens": 128, "samples_per_step": 16, **train},
            "engine": {"max_model_len": 64},
            "sampling": {"max_tokens": 32},
            "env": {"mix": [{"id": "scripted"}] if rl else []},
        }
    )


def _write_batches(config: RunConfig, steps: range) -> None:
    for step in steps:
        batch = make_batch(LENGTHS, packs=PACKS, step=step, seed=step)
        RunDir(config.run_dir).batches.write(batch)


async def test_a_run_and_its_continuation(tmp_path, model, sources):
    """Warm-up, four steps, a save on the way; resumed from it, the export is the same to the bit."""
    config = _config(tmp_path, model, sources, warmup=3)
    _write_batches(config, range(4))
    code, heard, reported = await play(config, save_at=[2])
    assert (code, kinds(reported)) == (0, ["Ready", "Done"])
    step = ["StepTrained", "WeightsStaged"]
    saved = next(message for message in heard if isinstance(message, TrainerSaved))
    assert saved == TrainerSaved(version=2, directory=str(config.run_dir / "checkpoints/000002/trainer"))
    assert heard.index(saved) > kinds(heard).index("StepTrained") + 3  # of step 1; the steps after it do not wait
    heard.remove(saved)
    assert kinds(heard) == [*["WarmedUp"] * 3, "WeightsStaged", "TrainerReady", *step * 4, "Exported"]
    assert [message.step for message in heard if isinstance(message, WarmedUp | StepTrained)] == [0, 1, 2, 0, 1, 2, 3]
    assert closure(heard) < 0.01
    parts = heard[5].ledgers[0].parts_s
    assert {"start", "load", "warmup", "stage", "probe", "wait_for_batch", "read_batch"} <= parts.keys()
    assert {"plan", "forward_backward", "optimizer"} <= parts.keys()
    _check_probes([message.staged.probe for message in heard if isinstance(message, WeightsStaged)])
    assert "v000004" in (left := [path.name for path in (config.run_dir / "staging").iterdir()])
    assert len(left) <= 2
    first = load_file(config.run_dir / "weights" / "model.safetensors")

    code, heard, reported = await play(config, number=2, resumed_from=2)
    assert code == 0
    assert kinds(heard) == ["WeightsStaged", "TrainerReady", *step, *step, "Exported"]
    assert heard[0].staged.version == 2
    second = load_file(config.run_dir / "weights" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def _check_probes(probes) -> None:
    """Each remembers the one before, over the same tokens."""
    assert probes[0].previous_logprobs is None
    for before, after in pairwise(probes):
        assert after.previous_logprobs == before.logprobs != after.logprobs
        assert after.token_ids == before.token_ids


async def test_two_ranks_say_what_one_says(tmp_path, model, sources):
    config = _config(tmp_path, model, sources, shard=2, steps=2)
    _write_batches(config, range(2))
    code, heard, reported = await play(config)
    assert (code, reported) == (0, [Ready(process="trainer"), Done(process="trainer")])
    assert kinds(heard) == ["WeightsStaged", "TrainerReady", *["StepTrained", "WeightsStaged"] * 2, "Exported"]
    assert isinstance(heard[-1], Exported)
    for rank, name in enumerate(("trainer", "trainer-1")):
        assert closure(heard, rank) < 0.01
        assert {message.ledgers[rank].process for message in heard if isinstance(message, StepTrained)} == {name}
    AutoModelForCausalLM.from_pretrained(heard[-1].directory)


async def test_the_users_error_is_exit_code_2_and_names_the_fix(tmp_path, sources):
    config = _config(tmp_path, tmp_path / "nothing", sources)
    code, heard, reported = await play(config)
    assert (code, heard) == (2, [])
    assert isinstance(reported[0], Failed)
    assert reported[0].is_user_error
    assert "does not exist; give a directory" in reported[0].error


async def test_a_batch_of_another_step_is_exit_code_1(tmp_path, model, sources):
    config = _config(tmp_path, model, sources, steps=1)
    batch = make_batch(LENGTHS, step=3)
    files = RunDir(config.run_dir).batches
    files.write(batch).rename(files.path(0))
    code, _, reported = await play(config)
    assert code == 1
    assert kinds(reported) == ["Ready", "Failed"]
    assert not reported[1].is_user_error
    assert "batch of step 3, but the trainer holds version 0" in reported[1].error


async def test_a_supervised_run_and_its_continuation(tmp_path, model, sources):
    config = _config(tmp_path, model, sources, rl=False, steps=5, lr=5e-3, checkpoint_every=2)
    run = RunDir(config.run_dir)
    code, heard, reported = await play(config)
    assert (code, heard) == (0, [])
    assert kinds(reported) == ["Progress"] * 5 + ["Done"]
    assert [manifest.version for manifest in read_manifests(run)] == [4, 5]
    losses = [row["train/ce/loss"] for row in read_metrics(run)]
    assert losses[-1] < losses[0]
    summary = read_summary(run)
    assert summary is not None
    assert summary["steps"] == 5
    assert summary["ledger_closure"] < 0.01
    assert len(read_ledger(run)) == 6
    first = load_file(run.export / "model.safetensors")

    code, _, reported = await play(config, number=2, resumed_from=4)
    assert (code, kinds(reported)) == (0, ["Progress", "Done"])
    second = load_file(run.export / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


async def test_without_anything_to_train_on(tmp_path, model, sources):
    config = _config(tmp_path, model, sources, rl=False)
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": ()})})
    code, _, reported = await play(config)
    assert code == 2
    assert "nothing to train on" in reported[0].error
