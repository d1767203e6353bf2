"""On a GPU in half precision: the kernel of the ring, on one rank that has all of the pack, equals its plain code."""

import pytest
import torch
import torch.distributed as dist

from palestra.model.ring import ring_attention
from tests.one_rank import join_alone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("lengths", [(156,), (70, 3, 40, 33, 9, 1), (79, 3, 40, 33, 1), (1, 77, 1, 77)])
def test_the_rings_kernel_equals_its_plain_code(lengths, key_heads, window):
    """In some of these packs one token of a document comes first in a piece."""
    join_alone()
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(sum(lengths), heads, 64) for heads in (4, key_heads, key_heads)]
    half = [torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
    found, settings = [], {"scaling": 0.1, "window": window, "softcap": None, "sinks": None}
    for inputs in (half, [x.float() for x in half]):  # float32 has no kernel
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = ring_attention(*inputs, lengths=lengths, group=dist.group.WORLD, **settings)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.float(), other, atol=5e-2, rtol=5e-2)
