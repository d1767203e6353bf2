"""One real engine for all tests that need one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.engines import Engine, TinyTrainer, engine_of_a_run
from tests.models import save_qwen3


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tied embeddings and a character tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("tiny-qwen3")
    save_qwen3(directory)
    return directory


@pytest.fixture(scope="session")
def engine_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM with the tiny Qwen3, started as a run starts it. Not yet healthy: `EngineClient.wait_healthy`."""
    directory = tmp_path_factory.mktemp("engine")
    with engine_of_a_run(tiny_model, directory) as engine:
        yield engine


@pytest.fixture(scope="session")
def trainer(tiny_model: Path) -> Iterator[TinyTrainer]:
    """What trains the tiny Qwen3. Versions go on from test to test, as the engine's do."""
    from transformers import AutoModelForCausalLM

    trainer = TinyTrainer(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"))
    yield trainer
    shutil.rmtree(trainer.directory, ignore_errors=True)
