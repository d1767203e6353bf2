"""Weights out of the policy, named and laid out as Hugging Face checkpoints are: vLLM and transformers read them."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from palestra.core.errors import InfrastructureError
from palestra.model.files import TOKENIZER_FILES, layer_of, tokenizer_directory
from palestra.model.lora import fold, iterate_adapter, whole, write_adapter
from palestra.model.policy import Policy

SHARD_BYTES = 4 << 30


def iterate_weights(policy: Policy, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer once, whole, layer by layer; only one layer is gathered at a time.

    Parameters come in `dtype`, buffers as they are. Tied tensors come once, under the name of the first. Adapters come
    inside the weights that they are added to. A collective: every rank must iterate to the end.
    """
    for group in by_layer(policy.model.state_dict(keep_vars=True)):
        plain = group if policy.adapter is None else fold(group, policy.adapter)
        yield from layout(policy, {name: whole_as(tensor, dtype) for name, tensor in plain.items()})


def layout(policy: Policy, layer: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """As a checkpoint has it. What was handed out is let go of: two layers are never whole at once."""
    tensors = revert_weight_conversion(policy.model, layer)
    del layer
    for name in list(tensors):
        yield name, tensors.pop(name)


def by_layer(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors by layer, in the model's order."""
    groups: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        groups.setdefault(layer_of(name), {})[name] = tensor
    return list(groups.values())


def published(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Its shape and type, without values."""
    is_cast = isinstance(tensor, torch.nn.Parameter)
    return torch.empty(tensor.shape, dtype=dtype if is_cast else tensor.dtype, device="meta")


@torch.no_grad()
def whole_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A collective, if it is sharded."""
    if not isinstance(tensor, torch.nn.Parameter):
        return tensor
    return whole(tensor.to(dtype))


def save_huggingface(policy: Policy, directory: Path, *, dtype: torch.dtype, source: str, writes: bool = True) -> None:
    """Write config, weights and the tokenizer of `source` to `directory`, whole or not at all; an adapter lies in
    `adapter/` in peft's layout, and is inside the weights too.

    A collective; one rank `writes`. Errors: InfrastructureError, if the disk is full.
    """
    adapter = dict(iterate_adapter(policy.model, dtype=torch.float32))
    tensors = iterate_weights(policy, dtype=dtype)
    if not writes:
        for _ in tensors:
            pass
        return
    beside = directory.with_name(f".{directory.name}.{os.getpid()}")
    for left in directory.parent.glob(f".{directory.name}.*"):  # by exports that were killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        _write_weights(tensors, beside)
        _write_config(policy, beside, dtype)
        copy_tokenizer(source, beside)
        if policy.adapter is not None:
            write_adapter(beside / "adapter", adapter, policy.adapter, source)
        shutil.rmtree(directory, ignore_errors=True)
        beside.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise InfrastructureError(f"could not export to {directory}: {error}; free space and resume") from error


def _write_weights(tensors: Iterator[tuple[str, Tensor]], directory: Path) -> None:
    """One file, or several and their index; how many there are, and so their names, is known at the end."""
    weight_map: dict[str, int] = {}
    total_bytes = number = 0
    for number, shard in enumerate(_shards(tensors)):
        save_file(shard, directory / f"part-{number}", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, number)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    names = [f"model-{index + 1:05d}-of-{number + 1:05d}.safetensors" for index in range(number + 1)]
    if number == 0:
        names = ["model.safetensors"]
    for index, name in enumerate(names):
        (directory / f"part-{index}").rename(directory / name)
    if number:
        files = {tensor: names[index] for tensor, index in weight_map.items()}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """At most SHARD_BYTES each, or one larger tensor; copies on the CPU."""
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor.detach().cpu().contiguous().clone()
        num_bytes += tensor.nbytes
    yield shard


def _write_config(policy: Policy, directory: Path, dtype: torch.dtype) -> None:
    config = policy.model.config
    config.architectures = [type(policy.model).__name__]
    config.dtype = dtype
    config.save_pretrained(directory)


def copy_tokenizer(source: str, directory: Path) -> None:
    """The tokenizer's own files, byte for byte, with the generation config."""
    origin = tokenizer_directory(source)
    for pattern in TOKENIZER_FILES:
        for path in origin.glob(pattern):
            target = directory / path.relative_to(origin)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
