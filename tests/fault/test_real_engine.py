"""Faults of a run on the real engine and the real trainer: several in one run, which ends by itself."""

from pathlib import Path

import pytest

from palestra.config import RunConfig
from palestra.wire.runlog import read_ledger, read_metrics, read_restarts
from tests.fault.doomed import Fault
from tests.fault.whole_run import ENVIRONMENTS, FaultyRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GATEWAY, BATCHES = "palestra.orchestrate.gateway:Gateway.call", "palestra.wire.batches:BatchFiles.write"
CHECKPOINTS = "palestra.train.checkpoint:Checkpoints.begin"
FAULTS = [
    Fault(process="env-0", at="palestra.env.play:_scored", nth=30, life=0),  # while scoring
    Fault(process="trainer", at=CHECKPOINTS, when="leave", nth=1, life=0),  # while its files are written
    Fault(process="orchestrator", at=BATCHES, when="leave", nth=5, life=0),  # while shipping
    Fault(process="orchestrator", at=GATEWAY, nth=30, life=1, do="stop", victims=("engine-0",)),  # while generating
    Fault(
        process="orchestrator",
        at="palestra.orchestrate.batcher:make_batch",
        nth=4,
        life=1,
        victims=("trainer", "env-0"),
    ),
]


def config_of(outputs: Path, *, call_s: float) -> RunConfig:
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {**width, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    tree = {
        "log": {"name": "run", "outputs": str(outputs)},
        "model": {
            "dtype": "float32",
            "build": {"architecture": "Qwen3ForCausalLM", "alphabet": alphabet, "config": model},
        },
        "algo": {"groups_per_step": 4, "group_size": 4, "max_age": 4},
        "sampling": {"max_tokens": 12},
        "train": {"steps": 12, "lr": 1e-3, "max_pack_tokens": 256, "checkpoint_every": 2, "batch_deadline_s": 240},
        "engine": {"max_model_len": 64, "max_in_flight": 32, "kv_cache_gib": 0.25, "call_s": call_s},
        "env": {"mix": [{"id": f"{ENVIRONMENTS}:TwoTurns", "name": "two"}], "stall_s": 120},
    }
    return RunConfig.model_validate(tree)


def test_turns_of_the_real_engine_and_the_real_trainer(tmp_path: Path, judge):
    """vLLM's own sleep and wake, as far as a CPU has them: its scheduler stops, its memory stays."""
    config = config_of(tmp_path / "outputs", call_s=240)
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"turns": True})})
    fault = Fault(process="trainer", at="palestra.train.trainer:Trainer.train", nth=7, life=0)
    run = FaultyRun(config, [fault], tmp_path, kind="model")
    run.play(deadline_s=800)
    judge(run, name="turns of the real engine, its trainer killed in one", fired=1)
    entries = [entry for entry in read_ledger(run.run) if entry.process == "engine-0"]
    asleep = [index for index, entry in enumerate(entries) if entry.parts_s.get("asleep", 0) > 0]
    assert asleep, "the trainer had its turns"
    generating, training = ("generate", "forward_backward")
    assert any(entry.parts_s.get(generating, 0) > 0 for entry in entries[asleep[0] + 1 :]), "the engine had its, too"
    rows = [row for row in read_metrics(run.run) if "turns/wake_s" in row]
    assert len(rows) >= config.train.steps // 2
    assert training in {cause for entry in read_ledger(run.run) for cause in entry.parts_s}


def test_five_faults_in_a_run_on_the_real_engine(tmp_path: Path, judge):
    config = config_of(tmp_path / "outputs", call_s=25)  # which ends that the engine stands still
    run = FaultyRun(config, FAULTS, tmp_path, kind="model")
    run.play(deadline_s=800)
    judge(run, name="five faults in a run on the real engine", fired=len(FAULTS))
    died = [restarted.process for restarted in read_restarts(run.run)]
    assert sorted(died) == ["engine-0", "env-0", "env-0", "orchestrator", "trainer", "trainer"]
