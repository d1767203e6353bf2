"""Attention over packed documents, registered with transformers so that every family can use it by name.

Legend: T tokens of a pack, t those on this rank, H query heads, G key and value heads, D width of a head.

A pack is one row [1, T] of documents end to end. No token sees another document and no T x T mask exists. The layout
travels as a keyword argument through the model's forward; `kernels.py` has what computes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from palestra.model.context import Scores
from palestra.model.documents import Documents
from palestra.model.kernels import attend_whole

NAME = "palestra_packed"


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


AttentionInterface.register(NAME, packed_attention)
