"""How much memory a model needs: parameters where they are cheaply known, then bytes by process.

Estimates, for a plan and for refusing what cannot fit. Legend: D model, L layers, V vocabulary, E experts.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.config import RunConfig
from palestra.config.model_fields import experts_field
from palestra.config.schema import Build

GIB = 1024**3
_BYTES = {"float32": 4, "bfloat16": 2}
_TRAINED_BYTES = 4 + 4 + 8  # float32 master, gradient, two AdamW moments
_PYTHON_BYTES, _TORCH_BYTES, _VLLM_BYTES = GIB // 8, GIB // 2, 3 * GIB  # of a process before it has a model
_SPECIAL_TOKENS = 4  # pad, bos, eos and unk of a built tokenizer
_MAX_HEADER_BYTES = 100 * 1024**2


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose; `unknown` where the parameters are not known and only the rest is counted."""

    parts: tuple[tuple[str, int], ...]
    unknown: bool = False

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts)


def count_parameters(config: RunConfig) -> int | None:
    """None where only a download or a build would tell."""
    if config.model.build is not None:
        return built_parameters(config.model.build)
    return parameters_in(config.model.path or "")


def parameters_in(path: str) -> int | None:
    """Of a directory in Hugging Face layout; None for anything else."""
    directory = Path(path).expanduser()
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    return sum(map(stored_parameters, files)) if files else None


def stored_parameters(path: Path) -> int:
    """From the header of a safetensors file; 0 for a file that is something else."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            return 0
        try:
            header = json.loads(file.read(size))
        except ValueError:
            return 0
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def built_parameters(build: Build) -> int | None:
    """Of a decoder with gated feed-forward layers, dense or with experts; norms and biases are left out."""
    fields: dict[str, Any] = {"vocab_size": len(build.alphabet) + len(build.words) + _SPECIAL_TOKENS, **build.config}
    if not {"hidden_size", "num_hidden_layers", "num_attention_heads"} <= fields.keys():
        return None
    width, layers, heads = fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or width // heads
    attention = 2 * width * head_dim * (heads + fields.get("num_key_value_heads", heads))
    dense = 3 * width * fields.get("intermediate_size", 4 * width)
    name = experts_field(fields)
    experts = fields[name] if name else 0
    if experts:
        expert = 3 * width * fields.get("moe_intermediate_size", fields.get("intermediate_size", 4 * width))
        sparse = expert * (experts + fields.get("n_shared_experts", 0)) + width * experts
        num_dense = fields.get("first_k_dense_replace", 0)
        feed_forward = num_dense * dense + (layers - num_dense) * sparse
    else:
        feed_forward = layers * dense
    tables = 1 if fields.get("tie_word_embeddings") else 2
    return layers * attention + feed_forward + tables * fields["vocab_size"] * width


def of_engine(config: RunConfig, parameters: int | None) -> Memory:
    weights = (parameters or 0) * _BYTES[config.engine_dtype]
    cache = int(config.engine.kv_cache_gib * GIB)
    parts = (("server", _VLLM_BYTES), ("weights", weights), ("KV cache", cache))
    return Memory(parts, unknown=parameters is None)


def of_trainer(config: RunConfig, parameters: int | None) -> Memory:
    """All ranks together: each copy of the weights is spread over its shard ranks."""
    copies = config.train.replicate
    known = parameters or 0
    trained = _TRAINED_BYTES if config.model.lora is None else _BYTES[config.model.dtype]  # adapters are small
    parts = (
        ("ranks", config.train.num_ranks * _TORCH_BYTES),
        ("weights, gradients, AdamW", known * trained * copies),
        ("weights in use", known * _BYTES[config.model.dtype] * copies if config.model.dtype != "float32" else 0),
    )
    return Memory(parts, unknown=parameters is None)


def of_state(config: RunConfig, parameters: int) -> int:
    """What a trainer keeps between two steps on its device: masters and moments, or the frozen model of adapters."""
    if config.model.lora is not None:
        return parameters * _BYTES[config.model.dtype]
    moments = 0 if config.train.offload_optimizer else 4 if config.train.optimizer == "muon" else 8
    return parameters * (4 + moments)


def of_staging(config: RunConfig, parameters: int | None) -> int:
    """Room for a version in use, one on its way and one being written."""
    return 3 * (parameters or GIB // 4) * _BYTES[config.model.dtype]


def of_python() -> Memory:
    return Memory((("process", _PYTHON_BYTES),))
