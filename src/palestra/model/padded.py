"""Attention over the documents of a pack anywhere: documents of similar length side by side as [n, L], run as a batch,
and put back.

Legend: T tokens of a pack, H query heads, G key and value heads, D width of a head, S slots of the padded layout,
n documents of a group, L the longest of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from palestra.model.context import Scores
from palestra.model.documents import Documents


class _Spread(Function):
    """[T, ...] to slots [S, ...]; padding holds a copy of token 0 that nothing real looks at."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x_T[documents.source]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.documents.slot], None


class _Collect(Function):
    """Slots [S, ...] back to [T, ...]; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_S: Tensor, documents: Documents) -> Tensor:
        ctx.documents, ctx.num_slots = documents, x_S.shape[0]
        return x_S[documents.slot]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        slots = grads[0].new_zeros(ctx.num_slots, *grads[0].shape[1:])
        return slots.index_copy_(0, ctx.documents.slot, grads[0]), None


def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """[T, H, D]. With a cap or sinks the scores of a group are in memory."""
    sizes = [num * longest for num, longest in documents.groups]
    # Split, not sliced: the gradient of a slice is as large as all slots.
    blocks = zip(*(_Spread.apply(x, documents).split(sizes) for x in (q_THD, k_TGD, v_TGD)), strict=True)
    outs = []
    for (num, longest), block in zip(documents.groups, blocks, strict=True):
        q, k, v = (x.unflatten(0, (num, longest)).transpose(1, 2) for x in block)
        out = _fused(q, k, v, scores) if scores.is_plain else _explicit(q, k, v, scores)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return _Collect.apply(torch.cat(outs), documents)


def _fused(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    longest, window = q.shape[2], scores.window
    mask = None if window is None or window >= longest else _visible(longest, window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _explicit(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """With the scores in memory, [n, H, L, L] of one group in float32 or wider."""
    heads, longest = q.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    score = (q @ k.transpose(2, 3)).to(wide) * scores.scaling
    if scores.softcap is not None:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    score = score.masked_fill(~_visible(longest, scores.window or longest, q.device), float("-inf"))
    if scores.sinks is not None:  # a key without a value: takes its share of the softmax and adds nothing
        sink = scores.sinks.to(wide).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        score = torch.cat([score, sink], dim=-1)
    return score.softmax(-1)[..., :longest].to(v.dtype) @ v


def _visible(longest: int, window: int, device: torch.device) -> Tensor:
    """[L, L], true where the query (row) may look at the key (column)."""
    distance = torch.arange(longest, device=device)[:, None] - torch.arange(longest, device=device)
    return (distance >= 0) & (distance < window)
