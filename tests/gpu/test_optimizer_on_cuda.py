"""On a CUDA device: Muon in bfloat16 against that of the CPU, moments in host memory against those on the device."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from palestra.config.schema import Train
from palestra.train.moments import local
from palestra.train.optimizer import Optimizer, make_optimizer, set_lr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = {"optimizer": "muon", "weight_decay": 0.1}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)


def _model(device: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 32))
    inputs = torch.randn(50, 64)
    model = model.to(device)
    if device == "cuda":
        fully_shard(model, mesh=init_device_mesh("cuda", (1, 1), mesh_dim_names=("replicate", "shard")))
    return model, inputs.to(device)


def _train(model: nn.Module, inputs: torch.Tensor, optimizer: Optimizer) -> list[torch.Tensor]:
    for _ in range(3):
        set_lr(optimizer, 0.01)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [local(parameter.detach()).cpu() for parameter in model.parameters()]


def test_it_is_the_cpus_within_bfloat16():
    found = {}
    for device in ("cpu", "cuda"):
        model, inputs = _model(device)
        found[device] = _train(model, inputs, make_optimizer(model, [model], Train.model_validate(SETTINGS)))
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_moments_in_host_memory_are_pinned_and_change_nothing(algorithm):
    found = []
    for offload in (False, True):
        model, inputs = _model("cuda")
        settings = Train.model_validate({**SETTINGS, "optimizer": algorithm, "offload_optimizer": offload})
        optimizer = make_optimizer(model, [model], settings)
        found.append(_train(model, inputs, optimizer))
        optimizer.load_state_dict(optimizer.state_dict())
        moments = [local(one) for state in optimizer.state.values() for name, one in state.items() if name != "step"]
        assert all(moment.is_cuda != offload for moment in moments)
        assert all(moment.is_pinned() == offload for moment in moments)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
