"""Attention over packed documents, registered with transformers so that every family can use it by name.

Legend: T tokens of a pack, t those on this rank, H query heads, G key and value heads, D width of a head,
S slots of the padded layout, n documents of a group, L the longest of them.

A pack is one row [1, T] of documents end to end. No token sees another document and no T x T mask exists: on CUDA in
half precision one variable-length kernel runs over the row; otherwise documents of similar length are laid out side by
side as [n, L], run as a batch, and put back. The layout travels as a keyword argument through the model's forward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface

from palestra.model.context import Scores
from palestra.model.documents import Documents
from palestra.model.ring import is_half_on_cuda

NAME = "palestra_packed"


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


@torch.compiler.disable  # the layout of the documents changes with every pack, and its kernels are whole
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Shapes:  query [1, H, t, D], key and value [1, G, t, D]; returns [1, t, H, D].
    Honours: scaling, grouped heads, sliding windows (w tokens, itself included), soft caps and sinks (`s_aux` [H]).
    Errors:  ValueError for what it does not: masks, dropout, biases, sparse indices, attention that is not causal.
    """
    _refuse(module, attention_mask, dropout, others)
    if documents is None:
        raise ValueError(f"attention {NAME!r} needs documents=documents_of(lengths) among the model's arguments")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    q_tHD, k_tGD, v_tGD = (x[0].transpose(0, 1) for x in (query, key, value))
    return documents.context.attend(attend_whole, q_tHD, k_tGD, v_tGD, documents, scores).unsqueeze(0), None


def attend_whole(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """Over the documents of a whole pack, [T, H, D]."""
    if scores.is_plain and is_half_on_cuda(q_THD) and q_THD.shape[-1] == v_TGD.shape[-1]:
        return _varlen(q_THD, k_TGD, v_TGD, documents, scores)
    q_S, k_S, v_S = (_Spread.apply(x, documents) for x in (q_THD, k_TGD, v_TGD))
    outs, start = [], 0
    for num, longest in documents.groups:
        block = slice(start, start := start + num * longest)
        q, k, v = (x[block].unflatten(0, (num, longest)).transpose(1, 2) for x in (q_S, k_S, v_S))
        out = _fused(q, k, v, scores) if scores.is_plain else _explicit(q, k, v, scores)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return _Collect.apply(torch.cat(outs), documents)


def _refuse(module: nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    for name in ("position_bias", "indices", "block_indices", "cache"):
        if others.get(name) is not None:
            raise ValueError(f"attention {NAME!r} does not know {name!r}, which {type(module).__name__} asks for")
    if not (getattr(module, "is_causal", True) and others.get("is_causal") is not False):
        raise ValueError(f"{type(module).__name__} is not causal; packed training is for causal models")
    if attention_mask is not None:
        raise ValueError(f"attention {NAME!r} takes `documents`, not a mask of shape {tuple(attention_mask.shape)}")
    if dropout:
        raise ValueError(f"attention dropout {dropout} makes trainer and engine differ; set attention_dropout to 0")


def _varlen(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    window = scores.window
    out = varlen_attn(
        q_THD.contiguous(),
        k_TGD.contiguous(),
        v_TGD.contiguous(),
        documents.ends,
        documents.ends,
        documents.longest,
        documents.longest,
        scale=scores.scaling,
        window_size=(window - 1 if window is not None and window < documents.longest else -1, 0),
        enable_gqa=q_THD.shape[1] != k_TGD.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


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


AttentionInterface.register(NAME, packed_attention)
