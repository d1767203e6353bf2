"""How much memory a model needs: parameters where they are cheaply known, then bytes by process.

Estimates, for a plan and for refusing what cannot fit. Legend: D model, L layers, V vocabulary, E experts.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palestra.config import RunConfig
from palestra.config.model_fields import experts_field, model_fields
from palestra.config.schema import Build
from palestra.launch.budget import CHANGED, GRADIENT_BYTES, MASTER_BYTES, MOMENT_BYTES, PLACE_BYTES
from palestra.wire.weights.manifest import KEPT_VERSIONS, MAX_CHAIN

GIB = 1024**3
_BYTES = {"float32": 4, "bfloat16": 2}
KEPT_COPIES = 2  # on a GPU that trainer and engine share: as `train.publish`, which imports torch
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
    return sum(math.prod(entry["shape"]) for entry in _header(path).values())


def _header(path: Path) -> dict[str, Any]:
    """Of a safetensors file, its tensors; none for a file that is something else."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            return {}
        try:
            header = json.loads(file.read(size))
        except ValueError:
            return {}
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


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


def of_trainer(config: RunConfig, parameters: int | None, *, on_gpu: bool) -> Memory:
    """All ranks together: each copy of the weights is spread over its shard ranks. Never more than `budget` counts, so
    that what `palestra plan` says fits is not refused."""
    train, copies = config.train, config.train.replicate
    known = parameters or 0
    trained, what = (known, "weights") if config.model.lora is None else (adapter_parameters(config) or 0, "adapters")
    frozen = 0 if config.model.lora is None else known * _BYTES[config.model.dtype]
    moments = train.moment_bytes if on_gpu else MOMENT_BYTES[train.optimizer]  # the host's memory is no other there
    parts = (
        ("ranks", train.num_ranks * _TORCH_BYTES),
        ("frozen weights", frozen * copies),
        (f"{what}, gradients, optimizer", trained * (MASTER_BYTES + GRADIENT_BYTES + moments) * copies),
        ("weights in use", train.num_ranks * _gathered_bytes(config, known)),
    )
    return Memory(parts, unknown=parameters is None)


def _gathered_bytes(config: RunConfig, parameters: int) -> int:
    """At least so many are gathered on each rank at once: of two layers, only what the rank computes with."""
    model = config.model
    fields = model.build.config if model.build is not None else model_fields(Path(model.path or "").expanduser())
    layers = (fields or {}).get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1 or model.dtype == "float32":
        return 0
    others = config.train.tensor_parallel * config.train.expert_parallel
    return parameters * _BYTES[model.dtype] * min(2, layers) // (layers * others)


def of_copies(config: RunConfig, parameters: int) -> int:
    """What a trainer keeps on its GPU for an engine there: a version that it holds, and one on its way."""
    is_kept = config.is_rl and config.sync.kind == "ipc"
    return KEPT_COPIES * parameters * _BYTES[config.engine_dtype] if is_kept else 0


def of_state(config: RunConfig, parameters: int) -> int:
    """What a trainer keeps between two steps on its device: masters and moments, or the frozen model of adapters."""
    if config.model.lora is not None:
        return parameters * _BYTES[config.model.dtype]
    return parameters * (4 + config.train.moment_bytes)


def of_staging(config: RunConfig, parameters: int | None) -> int:
    """Room for the versions that lie there at once."""
    sync, itemsize = config.sync, _BYTES[config.model.dtype]
    whole = (parameters or GIB // 4) * itemsize
    if config.model.lora is not None:
        adapters = adapter_parameters(config)
        return KEPT_VERSIONS * (whole if adapters is None else adapters * itemsize)
    if sync.kind == "ipc":
        return 0  # handles of what is on the GPU
    if sync.is_sent:
        return 2 * whole  # the first, and one for an engine that joins later
    return int(whole * (_with_differences(itemsize, sync.full_every) if sync.difference else KEPT_VERSIONS))


def _with_differences(itemsize: int, full_every: int) -> float:
    """In whole versions, at the worst moment: engines hold the last difference from one whole version, and the next
    whole one lies there with what was told from it since."""
    each = CHANGED[1] * (itemsize + PLACE_BYTES) / itemsize
    older = min(MAX_CHAIN + each, (full_every - 1) * each)
    return 1 + older + 1 + (KEPT_VERSIONS - 2) * each


def adapter_parameters(config: RunConfig) -> int | None:
    """Of `model.lora`, from the shapes of a directory in Hugging Face layout; None for anything else."""
    directory, lora = Path(config.model.path or "").expanduser(), config.model.lora
    if lora is None or config.model.build is not None or not directory.is_dir():
        return None
    shapes = [shape for path in directory.glob("*.safetensors") for shape in _adapted(_header(path), lora.targets)]
    return sum(lora.rank * sum(shape) for shape in shapes) or None


def _adapted(header: dict[str, Any], targets: str | tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Matrices of layers, without what decides where tokens go; of experts where they are named."""
    for tensor, entry in header.items():
        name = tensor.removesuffix(".weight")
        if name == tensor or ".layers." not in name or len(entry["shape"]) != 2:
            continue
        if ".experts." in name:
            is_adapted = "experts" in targets
        else:
            is_named = targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in targets)
            is_adapted = is_named and "router" not in name and not name.endswith("gate")
        if is_adapted:
            yield tuple(entry["shape"])


def of_python() -> Memory:
    return Memory((("process", _PYTHON_BYTES),))
