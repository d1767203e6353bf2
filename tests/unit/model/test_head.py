"""The chunked head equals the full logits, forward and backward."""

import math

import pytest
import torch

from palestra.core.errors import UserError
from palestra.model import head
from palestra.model.head import LogitMap, token_logprobs

NUM, VOCAB, WIDTH = 23, 11, 6


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    target = torch.randint(VOCAB, (NUM,), generator=generator)
    return hidden, weight, target, torch.rand(NUM, generator=generator) + 0.5


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 1000])
@pytest.mark.parametrize(
    "logit_map", [LogitMap(), LogitMap(scale=0.25), LogitMap(cap=3.0), LogitMap(scale=2.0, cap=3.0)]
)
def test_equals_full_logits(chunk_tokens, logit_map):
    hidden, weight, target, temperature = _inputs()
    logits = logit_map(hidden @ weight.T) / temperature[:, None]
    expected = logits.log_softmax(-1)
    expected_logp = expected.gather(1, target[:, None])[:, 0]
    logp, entropy = token_logprobs(hidden, weight, target, temperature, logit_map, chunk_tokens)
    torch.testing.assert_close(logp, expected_logp)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1).detach())
    direction = torch.linspace(-1, 2, NUM)
    grads = torch.autograd.grad((logp * direction).sum(), (hidden, weight))
    expected_grads = torch.autograd.grad((expected_logp * direction).sum(), (hidden, weight))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_a_frozen_head_costs_no_gradient(monkeypatch):
    hidden, weight, target, temperature = _inputs()
    trained, _ = token_logprobs(hidden, weight, target, temperature, LogitMap(), 7)
    expected = torch.autograd.grad(trained.sum(), (hidden, weight))
    monkeypatch.setattr(head, "_add_product", lambda *_: pytest.fail("a gradient that nobody wants"))
    logp, _ = token_logprobs(hidden, weight.detach(), target, temperature, LogitMap(), 7)
    assert torch.equal(torch.autograd.grad(logp.sum(), hidden)[0], expected[0])


def test_by_hand():
    """Two tokens of vocabulary 2: logits (1, 0) at temperature 0.5 are (2, 0)."""
    logp, entropy = token_logprobs(
        torch.tensor([[1.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0]), torch.tensor([0.5]), LogitMap(), 8
    )
    p = math.exp(2) / (math.exp(2) + 1)
    assert logp.item() == pytest.approx(math.log(p))
    assert entropy.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_half_precision_logits_are_summed_in_float32():
    hidden, weight, target, temperature = (x.detach() for x in _inputs())
    half = hidden.bfloat16(), weight.bfloat16()
    logp, _ = token_logprobs(*half, target, temperature, LogitMap(), 7)
    expected, _ = token_logprobs(half[0].float(), half[1].float(), target, temperature, LogitMap(), 7)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, expected)


def test_nothing_to_score():
    hidden, weight, target, temperature = _inputs()
    logp, entropy = token_logprobs(hidden[:0], weight, target[:0], temperature[:0], LogitMap(), 7)
    assert logp.shape == entropy.shape == (0,)
    grad_hidden, grad_weight = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_two_precisions_are_an_error():
    hidden, weight, target, temperature = _inputs()
    with pytest.raises(UserError, match="bfloat16"):
        token_logprobs(hidden.bfloat16(), weight, target, temperature, LogitMap(), 7)
