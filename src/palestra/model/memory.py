"""Refuse a model that does not fit, before it is loaded."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from palestra.core.errors import UserError
from palestra.model.expert_adapters import expert_modules

GIB = 1024**3
_STATE_BYTES = 4 + 4  # master, gradient


def require_memory(
    num_parameters: int,
    *,
    num_gathered: int,
    dtype: torch.dtype,
    num_shards: int,
    device: torch.device,
    moment_bytes: int = 8,
    frozen: bool = False,
    num_repeated: int = 0,
) -> None:
    """Errors: UserError with the numbers, if loading or training state alone would not fit.

    Counts: weights, gradients and `moment_bytes` of a parameter, of this rank's shard, and the `num_gathered` weights
    that it computes with at once. Activations come on top. `frozen` weights have neither masters nor gradients nor
    moments; the adapters beside them are not counted. `num_repeated` of a copy are there more than
    once, as a tensor axis does not split them.
    """
    state = (num_parameters + num_repeated) * (dtype.itemsize if frozen else _STATE_BYTES + moment_bytes) // num_shards
    in_use = num_gathered * dtype.itemsize if dtype != torch.float32 or num_shards > 1 else 0
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        _require(num_parameters, state + in_use, torch.cuda.mem_get_info(device)[0], f"on {device}")
    else:
        _require(num_parameters, (state + in_use) * local_ranks, available_bytes(), "on this host")


def gathered_at_once(model: PreTrainedModel, layers: Iterable[nn.Module], *, owners: int, tensors: int) -> int:
    """Parameters that a rank computes with at once, at the least: what is no layer's, and two of the largest layers. Of
    experts those that it owns among `owners` ranks; of all else in a layer its part among `tensors`."""
    outside, sizes = model.num_parameters(), []
    for layer in layers:
        whole = sum(parameter.numel() for parameter in layer.parameters())
        experts = sum(parameter.numel() for module in expert_modules(layer) for parameter in module.parameters())
        outside -= whole
        sizes.append((whole - experts) // tensors + experts // owners)
    return outside + sum(sorted(sizes)[-2:])


def _require(num_parameters: int, needed: int, available: int, where: str) -> None:
    if needed > available:
        raise UserError(
            f"the model has {num_parameters / 1e9:.2f} billion parameters and needs {needed / GIB:.1f} GiB {where} "
            f"(weights, gradients and optimizer state, without activations), but {available / GIB:.1f} GiB are free; "
            "raise train.shard, free memory or use a smaller model"
        )


def available_bytes() -> int:
    """Host memory that can still be taken, within the control group's limit."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            return min(free, *_control_group_free())
    return 1 << 62  # not Linux: unknown


def _control_group_free() -> list[int]:
    v2, v1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    frees = [1 << 62]
    for limit, used in (
        (v2 / "memory.max", v2 / "memory.current"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes"),
    ):
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
            frees.append(int(text) - int(used.read_text()) + _reclaimable(limit.parent))
    return frees


def _reclaimable(group: Path) -> int:
    """Page cache counts as used but is given back."""
    stat = group / "memory.stat"
    rows = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
