"""CUDA's handles as a table of tensors: what a process without a GPU can say of them."""

from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.weight_transfer import ipc_engine

from palestra.wire.weights import handles

DEVICE = torch.device("cuda", 3)


def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """Memory that handles point into, by address."""
    memory: dict[int, torch.Tensor] = {}

    def reduce_tensor(tensor: torch.Tensor) -> tuple[None, tuple]:
        assert tensor.is_contiguous()
        memory[len(memory)] = tensor
        return None, (torch.Tensor, tuple(tensor.shape), len(memory) - 1, 0, None, tensor.dtype, 0, b"handle")

    def rebuild(_kind, shape, address, _offset, _storage, dtype, device, _handle) -> torch.Tensor:
        assert device == DEVICE.index
        if address not in memory:
            raise RuntimeError("invalid device pointer")
        assert (tuple(memory[address].shape), memory[address].dtype) == (shape, dtype)
        return memory[address]

    monkeypatch.setattr(ipc_engine, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(handles, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-one"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    return memory
