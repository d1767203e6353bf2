"""Models taken apart: numbers that were computed by hand, and what autograd really keeps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from palestra.config.schema import Lora
from palestra.core.errors import UserError
from palestra.model import attention
from palestra.model.anatomy import Anatomy, Attention, newton_schulz_flops, pairs
from palestra.model.dissect import dissect
from palestra.model.documents import documents_of
from palestra.model.lora import add_adapter
from palestra.model.policy import Policy
from palestra.train.muon import matrices_of, orthogonalize

SHAPES = Path(__file__).parents[3] / "recipes/intellect-3/GLM-4.5-Air.config.json"

QWEN = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
GLM = QWEN | {
    "model_type": "glm4_moe",
    "tie_word_embeddings": False,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": False,
    "use_qk_norm": False,
}
ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32  # q, k and v, o
NORMS = 2 * 32


def anatomy_of(fields: dict, dtype: torch.dtype = torch.float32, lora: Lora | None = None) -> Anatomy:
    return dissect(AutoConfig.for_model(**fields), dtype, lora)


def test_a_family_that_cannot_be_packed_is_refused_in_words():
    with pytest.raises(
        UserError, match="MambaForCausalLM has layers of kind linear_attention; packed training supports"
    ):
        anatomy_of({"model_type": "mamba", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1})


def test_a_dense_model():
    found = anatomy_of(QWEN)
    layer = found.layers[0]
    assert layer.products == layer.matrices == ATTENTION + 3 * 32 * 64
    assert layer.parameters == layer.met == layer.products + NORMS + 2 * 8  # and norms of queries and keys
    assert (found.head, found.root, found.is_tied) == (100 * 32, 100 * 32 + 32, True)
    assert found.parameters == 3 * layer.parameters + found.root
    assert (found.num_experts, found.num_experts_per_token) == (0, 0)
    assert layer.attention == Attention(heads=4, qk_width=8, v_width=8, window=None)


def test_a_token_meets_its_experts_the_shared_one_and_the_router():
    dense, sparse, _ = anatomy_of(GLM).layers
    expert, router = 3 * 32 * 16, 32 * 8
    assert dense.products == ATTENTION + 3 * 32 * 64
    assert sparse.experts == 8 * expert
    assert sparse.parameters == ATTENTION + 9 * expert + router + NORMS
    assert sparse.products == ATTENTION + 3 * expert + router
    assert sparse.matrices == ATTENTION + 9 * expert + router  # what Muon trains
    assert sparse.routed_bytes == 2 * 32 * 4


def test_flops_of_orthogonalising_are_those_of_torchs_count():
    """Of one step of every matrix, each expert's gate, up and down for itself; as one stack they would be others."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GLM))
    layer, found = model.model.layers[1], anatomy_of(GLM).layers[1].orthogonal_flops
    counted = 0
    for parameter, stored in matrices_of([layer]).items():
        for rows, columns in stored.matrices(parameter.shape):
            with FlopCounterMode(display=False) as counter:
                orthogonalize(parameter.detach()[(None,) * (3 - parameter.dim()) + (..., rows, columns)], steps=1)
            counted += counter.get_total_flops()
    assert found == counted
    assert found != sum(newton_schulz_flops(*p.shape[-2:]) for p in matrices_of([layer]))  # the control


def test_flops_of_documents():
    found = anatomy_of(QWEN)
    seen = 3 * 2 * 4 * (8 + 8) * (pairs(5) + pairs(7))
    assert pairs(5) + pairs(7) == 15 + 28
    assert found.forward_flops([5, 7]) == 2 * 12 * (found.products + found.head) + seen
    assert found.forward_flops([5, 7], num_scored=3) == 2 * (12 * found.products + 3 * found.head) + seen
    assert found.train_flops([5, 7]) == 3 * found.forward_flops([5, 7])


def test_documents_are_cheaper_than_one_row_of_them():
    """The control: attention that crosses documents would cost more."""
    found = anatomy_of(QWEN)
    assert found.forward_flops([50, 50]) < found.forward_flops([100])


@pytest.mark.parametrize(("length", "window", "seen"), [(4, None, 10), (4, 1, 4), (4, 2, 7), (3, 8, 6)])
def test_pairs(length, window, seen):
    assert pairs(length, window) == seen == sum(min(i + 1, window or length) for i in range(length))


def test_sliding_windows_and_latent_attention_are_read():
    gemma = QWEN | {"model_type": "gemma2", "num_hidden_layers": 2, "sliding_window": 4, "query_pre_attn_scalar": 8}
    assert [layer.attention.window for layer in anatomy_of(gemma).layers] == [4, None]
    latent = GLM | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    }
    latent = {key: value for key, value in latent.items() if key != "head_dim"}
    assert anatomy_of(latent).layers[0].attention == Attention(heads=4, qk_width=16, v_width=12)


@pytest.mark.slow
def test_the_models_of_the_report():
    found = anatomy_of(json.loads(SHAPES.read_text()), torch.bfloat16)
    assert len(found.layers) == 46
    assert found.layers[0].experts == 0 < found.layers[1].experts
    assert found.parameters == pytest.approx(106e9, rel=0.01)
    assert found.active == pytest.approx(12e9, rel=0.07)


def test_adapters_lie_beside_what_is_there():
    plain, adapted = anatomy_of(QWEN), anatomy_of(QWEN, lora=Lora(rank=4))
    ends = 2 * 32 + 2 * (32 + 16) + 2 * 32 + 3 * (32 + 64)  # in and out of q, k and v, o, and three of the MLP
    assert [layer.adapters for layer in adapted.layers] == 3 * [4 * ends]
    split = 32 + 2 * 16 + 2 * 64  # B of q, k, v, gate and up
    assert adapted.layers[0].split_adapters == 4 * (split + 32 + 64)  # and A of o and down
    for ours, theirs in zip(adapted.layers, plain.layers, strict=True):
        same = ("parameters", "matrices", "met", "products", "split", "sums", "input_bytes")
        assert all(getattr(ours, name) == getattr(theirs, name) for name in same)
    assert anatomy_of(GLM, lora=Lora(targets=("q_proj",))).adapters == 3 * 16 * 64


def test_adapters_of_experts_are_met_by_a_token_as_its_experts_are():
    found = anatomy_of(GLM, lora=Lora(rank=8, targets=("o_proj", "experts")))
    one = 8 * (32 + 2 * 16) + 8 * (16 + 32)  # gate and up, which share an A; down
    assert [layer.expert_adapters for layer in found.layers] == [0, 8 * one, 8 * one]
    assert [layer.adapters for layer in found.layers] == 3 * [8 * 64]
    assert found.adapters == 3 * 8 * 64 + 2 * 8 * one
    assert found.met_adapters == 3 * 8 * 64 + 2 * 2 * one
    plain = anatomy_of(GLM)
    assert found.parameters == plain.parameters
    assert found.layers[1].experts == plain.layers[1].experts
    assert found.published_adapters - found.adapters == 2 * 8 * 8 * 32  # the A that gate and up share, once more


@pytest.mark.parametrize("lora", [None, Lora(rank=8)], ids=["all weights", "adapters"])
def test_flops_are_those_that_torch_counts(lora):
    """Of products; the first layer's have fewer gradients of hidden states where all below is frozen."""
    num, fields = 64, dict[str, Any](QWEN, num_hidden_layers=8)
    anatomy = anatomy_of(fields, lora=lora)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation="eager").eval()
    if lora is not None:
        add_adapter(model, lora, dtype=torch.float32)
        model.to_empty(device="cpu")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, num, dtype=torch.int64), use_cache=False).logits.sum().backward()
    squares = sum(3 * 2 * layer.attention.heads * 16 * (num * num - pairs(num)) for layer in anatomy.layers)
    assert counter.get_total_flops() - squares == pytest.approx(anatomy.train_flops([num]), rel=0.05)


# --- what a forward pass keeps


@dataclass
class Saved:
    count: int = 0


def saved_in_layers(fields: dict, lengths: list[int], lora: Lora | None = None) -> int:
    """Bytes that autograd keeps in a real forward pass over the layers, without parameters; each storage once."""
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    if lora is not None:
        add_adapter(model, lora, dtype=torch.float32)
        model.to_empty(device="cpu")
    known = {parameter.untyped_storage()._cdata: None for parameter in model.parameters()}
    saved, inside = Saved(), []
    documents = documents_of(lengths)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if inside and storage._cdata not in known:
            known[storage._cdata] = storage
            saved.count += storage.nbytes()
        return tensor

    for layer in Policy(model, head_chunk_tokens=1).decoder_layers:
        layer.register_forward_pre_hook(lambda *_: inside.append(1))
        layer.register_forward_hook(lambda *_: inside.clear())
    ids = torch.zeros(1, sum(lengths), dtype=torch.int64)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, position_ids=documents.positions, use_cache=False, documents=documents)
    return saved.count


KEPT = [(QWEN, None), (QWEN, Lora(rank=8)), (GLM, None), (GLM, Lora(rank=8, targets=("o_proj", "experts")))]


@pytest.mark.parametrize(("fields", "lora"), KEPT, ids=["dense", "dense, adapted", "experts", "experts, adapted"])
def test_what_autograd_keeps_is_what_the_anatomy_says(fields, lora):
    told = 256 * sum(layer.saved_bytes for layer in anatomy_of(fields, lora=lora).layers)
    assert saved_in_layers(fields, [128, 128], lora) == pytest.approx(told, rel=0.06)


def test_adapters_keep_no_wider_precision_than_the_model():
    """Their masters are float32, but they compute in the precision of the forward pass."""
    lora = Lora(rank=8, targets=("o_proj", "experts"))
    for half, single in zip(
        anatomy_of(GLM, torch.bfloat16, lora).layers, anatomy_of(GLM, lora=lora).layers, strict=True
    ):
        assert half.saved_bytes < 0.75 * single.saved_bytes


def test_what_is_kept_without_the_products_is_less():
    for layer in anatomy_of(GLM).layers:
        assert layer.input_bytes < layer.input_bytes + layer.product_bytes < layer.saved_bytes
