"""No process holds more of a model than its shard and a layer, also while it loads."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from palestra.config.schema import Build
from palestra.model.build import build_model
from tests.dist.processes import run

GIB = 1 << 30
SLACK = 32 << 20  # the allocator, transformers' modules

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """1.1 GB in float32: 16 layers of 67 MB."""
    directory = tmp_path_factory.mktemp("large") / "model"
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
    more = {"num_key_value_heads": 16, "head_dim": 64, "max_position_embeddings": 256}
    build_model(Build(architecture="Qwen3ForCausalLM", alphabet="abc", config={**shape, **more}), directory)
    return directory


def test_a_mixtures_experts_are_put_together_a_layer_at_a_time(tmp_path):
    """A layer of 103 MB in float32, from a checkpoint in bfloat16, in which experts are there twice for a moment."""
    shape = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 6}
    more = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 256}
    built = Build(
        architecture="Qwen3MoeForCausalLM", alphabet="abc", config={**shape, **more, "decoder_sparse_step": 1}
    )
    build_model(built, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, {"format": "pt"})
    run("loading_worker", tmp_path / "model", tmp_path, timeout_s=900, num_ranks=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        bound = found["shard"] + found["layer"] + SLACK
        assert found["added"] <= bound, found
        assert found["whole"] > bound, f"the control, that keeps every layer: {found}"


def test_loading_takes_a_shard_and_a_layer(model, tmp_path):
    assert sum(file.stat().st_size for file in model.glob("*.safetensors")) >= GIB
    run("loading_worker", model, tmp_path, timeout_s=900, num_ranks=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["shard"] + found["layer"] < GIB
        assert found["added"] <= found["shard"] + found["layer"] + SLACK, found
        assert found["whole"] > found["shard"] + found["layer"] + SLACK, f"the control, that keeps every layer: {found}"
