"""What is published of adapters of experts, put together by vLLM's own classes as its engines do on GPUs."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palestra.config.schema import Lora
from palestra.model.export import iterate_weights
from palestra.model.load import load_policy
from palestra.model.lora import iterate_adapter
from tests.one_rank import ranks_of_one
from tests.unit.model import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, as vLLM's layers are imported
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

LORA = Lora(rank=8, alpha=20, use_rslora=True, targets=("q_proj", "experts"))
MODULE = "model.layers.1.mlp.experts"
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("models"), "Glm4MoeForCausalLM")


@pytest.fixture(scope="module")
def policy(model_path):
    ranks = ranks_of_one()
    policy = load_policy(
        str(model_path),
        dtype=torch.float32,
        experts="grouped_mm",
        head_chunk_tokens=64,
        meshes=ranks.meshes,
        device=ranks.device,
        lora=LORA,
    )
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.to_local().normal_()
    return policy


def parts() -> list[str]:
    """Of an adapter to four experts, in the order in which vLLM packs them."""
    mapping = RoutedExperts.build_expert_params_mapping(*PROJECTIONS, num_experts=4)
    return [name.rstrip(".") for _, name, _, _ in mapping]


def test_vllm_packs_each_experts_factors_as_they_are_trained(policy, model_path: Path):
    """Its packed pairs, times its own scale, are the change of each expert's weights."""
    base = load_file(model_path / "model.safetensors")
    folded = dict(iterate_weights(policy, dtype=torch.float32))
    helper = PEFTHelper.from_dict(json.loads(policy.adapter.config_json("base")))
    tensors = dict(iterate_adapter(policy.model, dtype=torch.float32))
    model = LoRAModel.from_lora_tensors(1, tensors, helper, device="cpu", dtype=torch.float32)
    names = [f"model.layers.1.mlp.{name}" for name in parts()]
    packed = PackedLoRALayerWeights.pack_moe([model.loras[name] for name in names], MODULE).optimize()
    for place, projection in enumerate(PROJECTIONS):
        a_ERI, b_EOR = packed.lora_a[place], packed.lora_b[place]
        assert a_ERI.shape[:2] == (4, 8)
        for expert in range(4):
            name = f"{MODULE}.{expert}.{projection}.weight"
            change = folded[name] - base[name]
            torch.testing.assert_close(b_EOR[expert] @ a_ERI[expert], change, atol=1e-4, rtol=1e-4)
            assert change.abs().max() > 0.1
            other = b_EOR[expert] @ a_ERI[(expert + 1) % 4]
            assert (other - change).abs().max() > 0.1  # the control


def test_vllm_knows_every_name_that_is_published(policy):
    """Those of the parts of its fused layers."""
    published = {
        name.removeprefix("base_model.model.") for name, _ in iterate_adapter(policy.model, dtype=torch.float32)
    }
    expected = {
        f"model.layers.{layer}.mlp.{name}.lora_{which}.weight" for layer in (1, 2) for name in parts() for which in "AB"
    }
    assert {name for name in published if ".experts." in name} == expected
