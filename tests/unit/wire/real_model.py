"""vLLM's own models in the test's process, on the CPU, as they are before vLLM makes anything of their weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from tests.one_rank import join_alone

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, as vLLM's layers are imported
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model


@contextmanager
def configured(model: Path) -> Iterator[VllmConfig]:
    """One at a time: vLLM's groups are the process's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = EngineArgs(model=str(model), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True)
        config = arguments.create_engine_config()
        join_alone()
        with set_current_vllm_config(config):
            parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
            parallel_state.initialize_model_parallel(1)
            try:
                yield config
            finally:
                parallel_state.destroy_model_parallel()
                parallel_state._WORLD = None


def model_of(config: VllmConfig) -> nn.Module:
    config.compilation_config.static_forward_context.clear()  # of the one before
    torch.set_default_dtype(torch.bfloat16)
    try:
        return initialize_model(config)
    finally:
        torch.set_default_dtype(torch.float32)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(_bytes(ours[name]), _bytes(tensor))
        for name, tensor in theirs.items()
        if tensor.numel()
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def change_some(weights: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One element in fifty of every tensor."""
    found = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in found.values():
        flat = tensor.view(-1)
        at = torch.randperm(flat.numel(), generator=generator)[: max(1, flat.numel() // 50)]
        flat[at] = torch.randn(len(at), generator=generator).to(flat.dtype)
    return found
