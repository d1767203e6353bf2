"""Log-probabilities and entropies of chosen tokens, without the logits of all of them in memory.

Legend: K tokens to score, V vocabulary, D model, C tokens of one chunk.
"""

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
        logz, logps, entropies = [], [], []
        for hidden_CD, target_C, temperature_C in zip(
            *(x.split(chunk_tokens) for x in (hidden_KD, target_K, temperature_K)), strict=True
        ):
            logits_CV = logit_map(_product(hidden_CD, weight_VD)).div_(temperature_C[:, None])
            logz_C = logits_CV.logsumexp(-1)
            logps.append(logits_CV.gather(1, target_C[:, None])[:, 0] - logz_C)
            probability_CV = (logits_CV - logz_C[:, None]).exp_()
            entropies.append(logz_C - (probability_CV * logits_CV).sum(-1))
            logz.append(logz_C)
        ctx.save_for_backward(hidden_KD, weight_VD, target_K, temperature_K, torch.cat(logz))
        ctx.logit_map, ctx.chunk_tokens = logit_map, chunk_tokens
        entropy_K = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_K)
        return torch.cat(logps), entropy_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_VD, target_K, temperature_K, logz_K = ctx.saved_tensors
        grad_hidden_KD = torch.empty_like(hidden_KD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=logz_K.dtype)
        for start in range(0, len(target_K), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            temperature_C1 = temperature_K[chunk, None]
            logits_CV = ctx.logit_map(_product(hidden_KD[chunk], weight_VD))
            grad_CV = (logits_CV / temperature_C1 - logz_K[chunk, None]).exp_().neg_()  # onehot - probability
            grad_CV.scatter_add_(1, target_K[chunk, None], grad_CV.new_ones(len(grad_CV), 1))
            grad_CV *= grads[0][chunk, None] / temperature_C1 * ctx.logit_map.derivative(logits_CV)
            grad_CV = grad_CV.to(weight_VD.dtype)
            grad_hidden_KD[chunk] = grad_CV @ weight_VD
            _add_product(grad_weight_VD, grad_CV.T, hidden_KD[chunk])
        return grad_hidden_KD, grad_weight_VD.to(weight_VD.dtype), None, None, None, None


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
