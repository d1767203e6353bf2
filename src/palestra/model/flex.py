"""Attention over the documents of a pack by torch's flex kernels: also with caps, sinks, and values of another width
than the keys. No scores are in memory, and blocks in which no query sees a key are not computed.

Legend: T tokens of a pack, H query heads, G key and value heads, D width of a head, B blocks of tokens.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from palestra.model.context import Scores
from palestra.model.documents import Documents

BLOCK_TOKENS = 128


def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """[T, H, D]. On a CPU without gradients, by torch's reference of the same operator."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_TGD, v_TGD))
    out_1HTD, aux = _operator(q.is_cuda)(
        q,
        k,
        v,
        score_mod=None if scores.softcap is None else _cap(scores.softcap),
        block_mask=_mask_of(documents, scores.window),
        scale=scores.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if scores.sinks is not None:  # a key without a value takes its share of the softmax
        share_1HT = torch.sigmoid(aux.lse - scores.sinks.to(aux.lse.dtype)[:, None])
        out_1HTD = out_1HTD * share_1HT[..., None].to(out_1HTD.dtype)
    return out_1HTD[0].transpose(0, 1)


@cache
def _operator(is_cuda: bool) -> Callable[..., Any]:
    return torch.compile(flex_attention) if is_cuda else flex_attention


def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _mask_of(documents: Documents, window: int | None) -> BlockMask:
    """Made once per pack and window: layers share it."""
    if window not in documents.masks:
        documents.masks[window] = block_mask(documents.ends, len(documents.slot), window or documents.longest)
    return documents.masks[window]


def block_mask(ends: Tensor, num: int, window: int) -> BlockMask:
    """From the ends of the documents [N + 1], the last of them `num`: without a T x T mask or a wait at any time."""
    document_T = torch.bucketize(torch.arange(num, device=ends.device), ends, right=True, out_int32=True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = (query >= key) & (query - key < window)
        return is_near & (document_T[query] == document_T[key])

    some_BB, all_BB = _seen_blocks(document_T, window)
    counts, indices = _ordered(some_BB & ~all_BB)
    full_counts, full_indices = _ordered(all_BB)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=visible,
        seq_lengths=(num, num),
    )


def _seen_blocks(document_T: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Of [queries, keys] in blocks: where some query may see a key, and where every query sees all keys."""
    num, device = len(document_T), document_T.device
    first_B = torch.arange(0, num, BLOCK_TOKENS, device=device)
    last_B = (first_B + BLOCK_TOKENS - 1).clamp(max=num - 1)
    lowest_B, highest_B = document_T[first_B], document_T[last_B]
    nearest_BB = first_B[:, None] - last_B
    farthest_BB = last_B[:, None] - first_B
    some_BB = (last_B[:, None] >= first_B) & (lowest_B[:, None] <= highest_B) & (nearest_BB < window)
    is_one_document = (
        (lowest_B[:, None] == highest_B[:, None]) & (lowest_B == highest_B) & (lowest_B[:, None] == lowest_B)
    )
    is_whole_B = last_B - first_B == BLOCK_TOKENS - 1
    all_BB = is_one_document & (nearest_BB >= 0) & (farthest_BB < window) & is_whole_B[:, None] & is_whole_B
    return some_BB, all_BB


def _ordered(chosen_BB: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row, and their places before those of the others: [1, 1, B] and [1, 1, B, B]."""
    places_BB = chosen_BB.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_BB.sum(-1, dtype=torch.int32)[None, None], places_BB.int()[None, None]
