"""Attention over long documents by cuDNN's kernel, one after the other; short ones by torch's variable-length kernel.

Legend: T tokens of a pack, L those of a document, H query heads, G key and value heads, D width of a head.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from palestra.model.context import Scores
from palestra.model.documents import Documents
from palestra.model.varlen import attend_some

LONG_TOKENS = 8192  # from here on the faster kernel is worth a call of its own (docs/log.md)
_MULTIPLE = 1024  # cuDNN makes a plan for each length: with padding, of which no token sees anything, they are few
WIDEST = 128  # heads that its backward takes


def attend(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scores: Scores, long_tokens: int = LONG_TOKENS
) -> Tensor:
    """[T, H, D], without windows, caps or sinks. Half precision."""
    if documents.longest < long_tokens:
        return attend_some(q_THD, k_TGD, v_TGD, documents.ends, documents.longest, scores)
    outs = []
    for first, last, is_long in _runs(documents.lengths, long_tokens):
        start, end = sum(documents.lengths[:first]), sum(documents.lengths[:last])
        q, k, v = (x[start:end] for x in (q_THD, k_TGD, v_TGD))
        if is_long:
            outs.append(_attend_one(q, k, v, scores.scaling))
        else:
            ends = documents.ends[first : last + 1] - documents.ends[first]
            outs.append(attend_some(q, k, v, ends, max(documents.lengths[first:last]), scores))
    return torch.cat(outs)


def _runs(lengths: tuple[int, ...], long_tokens: int) -> Iterator[tuple[int, int, bool]]:
    """First and last + 1 of documents to be taken together: a long one is alone."""
    alike = groupby(enumerate(lengths), key=lambda one: (one[1] >= long_tokens, one[0] if one[1] >= long_tokens else 0))
    for (is_long, _), members in alike:
        indices = [index for index, _ in members]
        yield indices[0], indices[-1] + 1, is_long


def _attend_one(q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scaling: float) -> Tensor:
    num, times = len(q_LHD), q_LHD.shape[1] // k_LGD.shape[1]
    k_LHD, v_LHD = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (k_LGD, v_LGD))
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -num % _MULTIPLE)).transpose(0, 1).unsqueeze(0) for x in (q_LHD, k_LHD, v_LHD))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out_1HLD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out_1HLD[0].transpose(0, 1)[:num]
