"""Attention over the documents of a pack by torch's variable-length kernel: half precision on CUDA.

Legend: T tokens, N documents, H query heads, G key and value heads, D width of a head.
"""

from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from palestra.model.context import Scores
    from palestra.model.documents import Documents


def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: "Documents", scores: "Scores") -> Tensor:
    """[T, H, D], without caps or sinks."""
    return attend_some(q_THD, k_TGD, v_TGD, documents.ends, documents.longest, scores)


def attend_some(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, ends: Tensor, longest: int, scores: "Scores") -> Tensor:
    """`ends` [N + 1] from 0, int32, on the device."""
    from torch.nn.attention.varlen import varlen_attn

    window = scores.window
    out = varlen_attn(
        q_THD.contiguous(),
        k_TGD.contiguous(),
        v_TGD.contiguous(),
        ends,
        ends,
        longest,
        longest,
        scale=scores.scaling,
        window_size=(window - 1 if window is not None and window < longest else -1, 0),
        **told_of_groups(q_THD, k_TGD),
    )
    assert isinstance(out, Tensor)
    return out


def is_half_on_cuda(x: Tensor) -> bool:
    """Whether the kernel takes it."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def told_of_groups(q_THD: Tensor, k_TGD: Tensor) -> dict[str, Any]:
    """An argument of the kernel; torch 2.11 sees by itself that heads share keys."""
    return {"enable_gqa": q_THD.shape[1] != k_TGD.shape[1]} if _asks_for_groups() else {}


@cache
def _asks_for_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters
