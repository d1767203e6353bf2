"""Adapters that cannot be trained or served are refused before a process starts."""

import json
from typing import Any

import pytest

from palestra.config import RunConfig
from palestra.core.errors import UserError
from palestra.launch.adapters import require_adapters

pytestmark = pytest.mark.slow

MOE = {"model_type": "glm4_moe", "num_hidden_layers": 1, "n_routed_experts": 8, "first_k_dense_replace": 0}
RL: dict[str, Any] = {"env": {"mix": [{"id": "a"}]}}


def config_of(tmp_path, fields: dict, *, device: str = "cuda", lora: dict | None = None, **more) -> RunConfig:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tree = {"log": {"name": "r"}, "model": {"path": str(tmp_path), "lora": lora or {}}, "engine": {"device": device}}
    return RunConfig.model_validate(tree | more)


def test_experts_beside_adapters_are_served_on_gpus_only(tmp_path):
    with pytest.raises(UserError, match=r"has experts \(n_routed_experts=8\)"):
        require_adapters(config_of(tmp_path, MOE, device="cpu", **RL))
    require_adapters(config_of(tmp_path, MOE, **RL))
    require_adapters(config_of(tmp_path, MOE, device="cpu"))  # supervised: nothing is served
    built = {"build": {"architecture": "Glm4MoeForCausalLM", "alphabet": "ab", "config": MOE}, "lora": {}}
    with pytest.raises(UserError, match=r"the model of model\.build has experts"):
        require_adapters(config_of(tmp_path, {}, device="cpu", model=built, **RL))


@pytest.mark.slow
def test_layers_that_the_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"Glm4MoeForCausalLM has no linear layer qkv_proj .*; choose among down_proj"):
        require_adapters(config_of(tmp_path, MOE, lora={"targets": ["o_proj", "qkv_proj"]}))
