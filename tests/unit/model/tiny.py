"""Models of a few thousand parameters, with weights large enough that their probabilities are far from uniform."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from palestra.config.schema import Build
from palestra.model.build import build_model
from palestra.model.fill import empty_model, fill
from palestra.model.load import read_config
from palestra.model.policy import Policy

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
QWEN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}
GLM_MOE: dict[str, Any] = {
    **QWEN,
    "tie_word_embeddings": False,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "use_qk_norm": True,
}
GEMMA2 = {**QWEN, "query_pre_attn_scalar": 16, "sliding_window": 4}
GPT_OSS = {**QWEN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "tie_word_embeddings": False}
QWEN_MOE = {**QWEN, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
MINIMAX = {**QWEN, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
GRANITE = {key: value for key, value in QWEN.items() if key != "head_dim"} | {"logits_scaling": 4.0}
FAMILIES = {
    "Qwen3ForCausalLM": QWEN,
    "Qwen3MoeForCausalLM": QWEN_MOE,
    "LlamaForCausalLM": {**QWEN, "attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {**QWEN, "sliding_window": 4},
    "Gemma3ForCausalLM": GEMMA2,
    "MiniMaxM2ForCausalLM": MINIMAX,
    "Glm4MoeForCausalLM": GLM_MOE,
    "Gemma2ForCausalLM": GEMMA2,
    "GptOssForCausalLM": GPT_OSS,
    "GraniteForCausalLM": GRANITE,
    "GraniteSWAForCausalLM": {**GRANITE, "sliding_window": 4},
    "DeepseekV3ForCausalLM": {
        **{key: value for key, value in GLM_MOE.items() if key not in ("head_dim", "use_qk_norm")},
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def build(directory: Path, architecture: str = "Qwen3ForCausalLM", **more: Any) -> Path:
    target = directory / architecture
    build_model(Build(architecture=architecture, alphabet=ALPHABET, config={**FAMILIES[architecture], **more}), target)
    return target


def shake(path: Path) -> None:
    """Biases that are no zeros: a model that is built has those."""
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        if name.endswith("bias"):
            tensors[name] = torch.empty_like(tensors[name]).normal_(0, 0.3, generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def unsharded(path: Path | str, experts: str = "grouped_mm") -> Policy:
    """For one process without a process group."""
    model = empty_model(read_config(str(path)), experts=experts)
    fill(model, Path(path), device=torch.device("cpu"))
    return Policy(model, head_chunk_tokens=7)
