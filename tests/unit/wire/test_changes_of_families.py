"""Whatever the family, vLLM's own model takes changes to the bit, by its own way to put them in place."""

import warnings
from pathlib import Path

import pytest
import torch

from palestra.model.export import iterate_weights
from palestra.wire.weights.changes import Past
from tests.unit.model import tiny
from tests.unit.wire.real_model import change_some, configured, model_of, same

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, as vLLM's layers are imported
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    from palestra.wire.weights.in_place import require_in_place

FAMILIES = [  # tied, biased, with experts, their biases and a router's, with sinks
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "Qwen3MoeForCausalLM",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engines_model_takes_changes_to_the_bit(family: str, tmp_path: Path):
    path = tiny.build(tmp_path, family)
    tiny.shake(path)
    weights = {name: tensor.clone() for name, tensor in iterate_weights(tiny.unsharded(path), dtype=torch.bfloat16)}
    changed, past = change_some(weights, torch.Generator().manual_seed(0)), Past(rank=0, num_ranks=1)
    assert len(list(past.keep(iter(weights.items()), "0"))) == len(weights)
    with configured(path) as config, torch.no_grad():
        model, expected = model_of(config), model_of(config)
        model.load_weights(iter(weights.items()))  # type: ignore[operator]
        expected.load_weights(iter(changed.items()))  # type: ignore[operator]
        require_in_place(model)
        assert not same(model.state_dict(), expected.state_dict())
        patches = [
            CheckpointWeightPatch(patch.name, patch.shape, patch.values_C.dtype, patch.values_C, patch.at_C)
            for patch in past.step(changed.items(), "1").patches
        ]
        load_checkpoint_weight_patches(model, patches)
        assert same(model.state_dict(), expected.state_dict())
