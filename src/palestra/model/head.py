"""Log-probabilities and entropies of chosen tokens, without the logits of all of them in memory.

Legend: K tokens to score, V vocabulary, D model, C tokens of one chunk.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from palestra.core.errors import UserError


@dataclass(frozen=True)
class LogitMap:
    """What a family does between its head's product and its logits: `cap * tanh(scale * x / cap)`."""

    scale: float = 1.0
    cap: float = 0.0  # 0: no cap

    def __call__(self, product: Tensor) -> Tensor:
        logits = product if self.scale == 1.0 else product * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def derivative(self, logits: Tensor) -> Tensor | float:
        """d logits / d product, from the logits."""
        return self.scale * (1 - (logits / self.cap) ** 2) if self.cap else self.scale


def logit_map_of(config: PretrainedConfig) -> LogitMap:
    """As the families' configurations name it (Granite, Cohere, Falcon-H1, Gemma); the start-up check proves it."""
    scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitMap(scale=scale, cap=getattr(config, "final_logit_softcapping", None) or 0.0)


class _TokenLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        target_K: Tensor,
        temperature_K: Tensor,
        logit_map: LogitMap,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            _read_fused(_product(hidden_CD, weight_VD), target_C, temperature_C, logit_map)
            for hidden_CD, target_C, temperature_C in zip(
                *(x.split(chunk_tokens) for x in (hidden_KD, target_K, temperature_K)), strict=True
            )
        ]
        logz_K, logp_K, entropy_K = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_KD, weight_VD, target_K, temperature_K, logz_K)
        ctx.logit_map, ctx.chunk_tokens = logit_map, chunk_tokens
        ctx.mark_non_differentiable(entropy_K)
        return logp_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_VD, target_K, temperature_K, logz_K = ctx.saved_tensors
        grad_hidden_KD = torch.empty_like(hidden_KD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=logz_K.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(target_K), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            per_token = (logz_K[chunk], target_K[chunk], temperature_K[chunk], grads[0][chunk])
            grad_CV = _push_back_fused(
                _product(hidden_KD[chunk], weight_VD), *per_token, ctx.logit_map, weight_VD.dtype
            )
            grad_hidden_KD[chunk] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV.T, hidden_KD[chunk])
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_KD, grad_weight, None, None, None, None


def _read(
    product_CV: Tensor, target_C: Tensor, temperature_C: Tensor, logit_map: LogitMap
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithm of the sum, log-probability of the target, entropy."""
    logits_CV = logit_map(product_CV)
    if torch.compiler.is_compiling():
        logits_CV = logits_CV / temperature_C[:, None]
    else:  # a caller holds the product: no other as large beside it
        logits_CV = logits_CV.div_(temperature_C[:, None])
    logz_C = logits_CV.logsumexp(-1)
    logp_C = logits_CV.gather(1, target_C[:, None])[:, 0] - logz_C
    probability_CV = (logits_CV - logz_C[:, None]).exp_()
    return logz_C, logp_C, logz_C - (probability_CV * logits_CV).sum(-1)


def _push_back(
    product_CV: Tensor,
    logz_C: Tensor,
    target_C: Tensor,
    temperature_C: Tensor,
    grad_C: Tensor,
    logit_map: LogitMap,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the product: (1 at the target - probability) x slope."""
    logits_CV, target_C1 = logit_map(product_CV), target_C[:, None]
    slope_CV = (grad_C / temperature_C)[:, None] * logit_map.derivative(logits_CV)
    probability_CV = (logits_CV / temperature_C[:, None]).sub_(logz_C[:, None]).exp_()
    slope_C1 = slope_CV.expand_as(probability_CV).gather(1, target_C1)
    at_target_C1 = (1 - probability_CV.gather(1, target_C1)) * slope_C1
    grad_CV = probability_CV.mul_(slope_CV).neg_().to(dtype)
    return grad_CV.scatter_(1, target_C1, at_target_C1.to(dtype))


class _Fused:
    """A chunk's function, on a GPU with a compiler in few passes over the logits; the same arithmetic."""

    def __init__(self, chunk: Callable[..., Any]):
        self._chunk = chunk
        self._compiled: Callable[..., Any] | None = None  # made when it is needed: loading a compiler takes seconds

    def __call__(self, product_CV: Tensor, *others: Any) -> Any:
        if self._compiled is self._chunk or not product_CV.is_cuda:
            return self._chunk(product_CV, *others)
        from torch._dynamo.exc import TorchDynamoException

        self._compiled = self._compiled or torch.compile(self._chunk)
        for tensor in (product_CV, *(other for other in others if isinstance(other, Tensor))):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # the last chunk is a shorter one
        try:
            return self._compiled(product_CV, *others)
        except TorchDynamoException as error:
            print(f"the head is slower than it could be, it cannot be compiled: {error}"[:500], file=sys.stderr)
            self._compiled = self._chunk
            return self._chunk(product_CV, *others)


_read_fused, _push_back_fused = _Fused(_read), _Fused(_push_back)


def _add_product(into_VD: Tensor, grad_VC: Tensor, hidden_CD: Tensor) -> None:
    """Without another [V, D] where the precision is one."""
    if grad_VC.dtype == into_VD.dtype:
        into_VD.addmm_(grad_VC, hidden_CD)
    else:
        into_VD += grad_VC @ hidden_CD


def _product(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """[C, V] in float32 or wider; half-precision inputs are multiplied exactly and summed in float32."""
    if hidden_CD.dtype in (torch.float32, torch.float64):
        return hidden_CD @ weight_VD.T
    if hidden_CD.is_cuda:
        return torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32)
    return hidden_CD.float() @ weight_VD.float().T


def token_logprobs(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    target_K: Tensor,
    temperature_K: Tensor,
    logit_map: LogitMap,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, at each token's temperature, in float32 or wider.

    Never holds more than `chunk_tokens` rows of logits; the backward pass computes them again. The entropy is a reading
    and carries no gradient. Errors: UserError for hidden states of another precision than the head.
    """
    if hidden_KD.dtype != weight_VD.dtype:
        raise UserError(
            f"the model's hidden states are {hidden_KD.dtype}, its head {weight_VD.dtype}; set one model.dtype"
        )
    logp_K, entropy_K = _TokenLogprobs.apply(hidden_KD, weight_VD, target_K, temperature_K, logit_map, chunk_tokens)
    return logp_K, entropy_K
