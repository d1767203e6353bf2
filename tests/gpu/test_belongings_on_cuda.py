"""On a CUDA device: what a trainer has there goes to pinned memory, the device's is free meanwhile, and comes back."""

import pytest
import torch
from torch import nn

from palestra.train.belongings import Belongings, state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH = 4096


def _stepped(turns: int) -> tuple[list[torch.Tensor], list[int]]:
    """Weights after three steps, the first `turns` of them followed by somebody else's turn; bytes free in those."""
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    belongings = Belongings(lambda: state_of(model, optimizer), device, engine_share=0.99)
    free = []
    for step in range(3):
        model(torch.full((2, WIDTH), step + 1.0, device=device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < turns:
            belongings.put_away()
            free.append(torch.cuda.mem_get_info()[0])
            torch.full((free[-1] // 2,), 7, dtype=torch.uint8, device=device)  # somebody writes where it was
            torch.cuda.empty_cache()
            belongings.bring_back()
    return [parameter.detach().cpu() for parameter in model.parameters()], free


def test_the_devices_memory_is_free_meanwhile_and_the_steps_are_the_same():
    expected, _ = _stepped(0)
    torch.cuda.empty_cache()
    unused = torch.cuda.mem_get_info()[0]  # libraries have what they keep by now
    state = 3 * 2 * WIDTH * WIDTH * 4  # weights and two moments
    found, free = _stepped(2)
    assert all(unused - left < state / 4 for left in free), (unused, free, state)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
