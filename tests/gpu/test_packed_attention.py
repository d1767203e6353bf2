"""On a GPU in half precision: the variable-length kernel equals the padded batches, forward and backward."""

from functools import partial

import pytest
import torch
from torch import nn

from palestra.model import cudnn, head, padded
from palestra.model.attention import packed_attention
from palestra.model.context import Context, Scores
from palestra.model.documents import documents_of
from palestra.model.head import LogitMap, token_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's own compiler has some
]

LENGTHS = [70, 3, 40, 33, 9, 1]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("long_tokens", [1, 35, 1000])
def test_cudnn_for_long_documents_equals_padded_batches(long_tokens, key_heads, width):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(sum(LENGTHS), heads, width) for heads in (4, key_heads, key_heads)]
    half = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    documents, found = documents_of(LENGTHS, "cuda"), []
    for attend, inputs in (
        (partial(cudnn.attend, long_tokens=long_tokens), half),
        (padded.attend, [x.float() for x in half]),
    ):
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = attend(*inputs, documents, Scores(0.1))
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.float(), other, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_equals_padded_batches(window, key_heads):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (4, key_heads, key_heads)]
    half = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    outs, grads = [], []
    for inputs in (half, [x.float() for x in half]):  # float32 takes the padded path
        inputs = [x.clone().requires_grad_() for x in inputs]
        documents = documents_of(LENGTHS, "cuda", Context(("varlen", "padded")))
        out, _ = packed_attention(nn.Module(), *inputs, None, documents=documents, scaling=0.1, sliding_window=window)
        grads.append(torch.autograd.grad(out.float().square().sum(), inputs))
        outs.append(out.float())
    torch.testing.assert_close(*outs, atol=2e-2, rtol=2e-2)
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad.float(), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks", "value_width"),
    [
        (None, None, True, 64),
        (40, None, True, 64),
        (None, 20.0, False, 64),
        (40, 20.0, False, 64),
        (None, None, False, 32),
    ],
)
def test_flex_equals_padded_batches(window, softcap, with_sinks, value_width):
    """Caps, sinks and their gradients, and values of another width: what the variable-length kernel does not know."""
    generator = torch.Generator("cuda").manual_seed(0)
    num, outs, grads = sum(LENGTHS), [], []
    shapes = [(1, 4, num, 64), (1, 2, num, 64), (1, 2, num, value_width), (4,)]
    inputs = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    for kernels in (("flex", "padded"), ("padded",)):
        q, k, v, sinks = (x.clone().requires_grad_() for x in inputs)
        documents = documents_of(LENGTHS, "cuda", Context(kernels))
        options = {"sliding_window": window, "softcap": softcap, "s_aux": sinks if with_sinks else None}
        out, _ = packed_attention(nn.Module(), q, k, v, None, documents=documents, scaling=0.1, **options)
        assert documents.taken == {kernels[0]}
        grads.append(torch.autograd.grad(out.square().sum(), [q, k, v, *([sinks] if with_sinks else [])]))
        outs.append(out)
    torch.testing.assert_close(*outs, atol=5e-3, rtol=5e-3)
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected, atol=2e-2, rtol=2e-2)


def test_half_precision_logits_are_summed_in_float32():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(100, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(100, (40,), generator=generator, device="cuda")
    ones = torch.ones(40, device="cuda")
    logp, _ = token_logprobs(hidden, weight, target, ones, LogitMap(), 16)
    expected, _ = token_logprobs(hidden.float(), weight.float(), target, ones, LogitMap(), 16)
    torch.testing.assert_close(logp, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(scale=0.5, cap=3.0)])
def test_the_compiled_head_is_the_plain_one(monkeypatch, logit_map, capsys):
    """Chunks of two lengths. Control: without its compiled form it says so."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator, device="cuda") for n in (40, 300))
    target = torch.randint(300, (40,), generator=generator, device="cuda")
    temperature = torch.full((40,), 0.7, device="cuda")
    found = []
    for is_plain in (False, True):
        if is_plain:
            monkeypatch.setattr(head, "_read_fused", head._read)
            monkeypatch.setattr(head, "_push_back_fused", head._push_back)
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        logp, entropy = token_logprobs(*inputs, target, temperature, logit_map, 16)
        found.append([logp, entropy, *torch.autograd.grad(logp.sin().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=5e-4, rtol=1e-3)  # a GPU's exp
    assert head._read_fused is head._read
    assert "cannot be compiled" not in capsys.readouterr().err
