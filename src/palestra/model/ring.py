"""Attention over a pack that lies in parts on several ranks: keys and values go round, queries stay. The next ones are
on their way while a rank computes with those that it has.

Legend: t tokens of a rank, H query heads, G key and value heads, D width of a head, W width of a value,
q and k queries and keys of one block, g = H / G queries that share a key.

The pack is cut into 2C pieces; rank r has pieces r and 2C - 1 - r. A piece sees an earlier one through the one document
that reaches from one into the other, if there is any: that block is a rectangle. Within a piece each document is a
triangle. Blocks are merged by the logarithms of their sums; the backward pass takes the merged ones, so that the
gradient of each block is exact by itself. A sink is one more key, whose block has only a sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from palestra.model.varlen import is_half_on_cuda, told_of_groups

_MOST_SCORES = 1 << 24  # in memory at once, where no kernel does it


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """One from either end: early pieces see few keys, late ones many."""
    return rank, 2 * size - 1 - rank


@dataclass(frozen=True)
class Block:
    """Queries and keys of one document, as ranges of the parts of their ranks. `offset` is how far the first query lies
    behind the first key; a query sees the keys up to its own place and, of those, the last `window`."""

    q: tuple[int, int]
    k: tuple[int, int]
    offset: int
    window: int

    def visible(self, rows: tuple[int, int], device: torch.device) -> Tensor:
        """[rows, k]"""
        distance = torch.arange(*rows, device=device)[:, None] + self.offset
        distance = distance - torch.arange(self.k[1] - self.k[0], device=device)
        return (distance >= 0) & (distance < self.window)


@lru_cache(maxsize=256)
def blocks_of(
    lengths: tuple[int, ...], size: int, q_rank: int, k_rank: int, window: int | None
) -> tuple[tuple[Block, ...], ...]:
    """Every block in which queries of one rank see keys of the other, by pair of pieces."""
    ends = (0, *accumulate(lengths))
    length = ends[-1] // (2 * size)
    found = []
    for q_slot, q_piece in enumerate(pieces_of(q_rank, size)):
        for k_slot, k_piece in enumerate(pieces_of(k_rank, size)):
            shift = (q_slot - q_piece) * length, (k_slot - k_piece) * length
            ranges = _document_blocks(ends, q_piece * length, k_piece * length, length, window or ends[-1])
            blocks = tuple(
                Block((q0 + shift[0], q1 + shift[0]), (k0 + shift[1], k1 + shift[1]), q0 - k0, window or ends[-1])
                for q0, q1, k0, k1 in ranges
            )
            if blocks:
                found.append(blocks)
    return tuple(found)


def _document_blocks(
    ends: tuple[int, ...], q_start: int, k_start: int, length: int, window: int
) -> Iterator[tuple[int, int, int, int]]:
    """In places of the pack, without what no query of the block sees and what sees no key of it."""
    if k_start > q_start:
        return
    for start, end in pairwise(ends):
        q0, q1 = max(start, q_start), min(end, q_start + length)
        k0, k1 = max(start, k_start), min(end, k_start + length)
        k0 = max(k0, q0 - window + 1)
        q1 = min(q1, k1 - 1 + window)
        if q0 < q1 and k0 < k1:
            yield q0, q1, k0, k1


def ring_attention(
    q_tHD: Tensor,
    k_tGD: Tensor,
    v_tGW: Tensor,
    *,
    lengths: tuple[int, ...],
    group: dist.ProcessGroup,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[t, H, W]. A collective of `group`, forward and backward. `sinks` is [H]."""
    if sinks is None:  # the neutral one takes no share
        sinks = q_tHD.new_full((q_tHD.shape[1],), float("-inf"))
    return _Ring.apply(q_tHD, k_tGD, v_tGW, sinks, _Blocks(lengths, group, scaling, window, softcap))


@dataclass(frozen=True)
class _Blocks:
    lengths: tuple[int, ...]
    group: dist.ProcessGroup
    scaling: float
    window: int | None
    softcap: float | None

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def of(self, step: int) -> tuple[tuple[Block, ...], ...]:
        """What this rank computes when the keys that it holds have gone `step` ranks on."""
        rank = dist.get_rank(self.group)
        return blocks_of(self.lengths, self.size, rank, (rank - step) % self.size, self.window)

    def uses_kernel(self, q: Tensor, v: Tensor) -> bool:
        return is_half_on_cuda(q) and self.softcap is None and q.shape[-1] == v.shape[-1]

    def pass_on(self, *tensors: Tensor) -> "_Passing":
        """To the next rank, from the one before: begin to. None of them may change until they have arrived."""
        rank = dist.get_rank(self.group)
        after, before = (dist.get_global_rank(self.group, (rank + way) % self.size) for way in (1, -1))
        received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        sent = [tensor.contiguous() for tensor in tensors]
        sends = [dist.P2POp(dist.isend, tensor, after, self.group) for tensor in sent]
        receives = [dist.P2POp(dist.irecv, tensor, before, self.group) for tensor in received]
        return _Passing(dist.batch_isend_irecv([*sends, *receives]), sent, received)


@dataclass(frozen=True)
class _Passing:
    works: list[dist.Work]
    sent: list[Tensor]  # kept until it has arrived
    received: list[Tensor]

    def arrived(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


class _Ring(Function):
    @staticmethod
    def forward(ctx: Any, q_tHD: Tensor, k_tGD: Tensor, v_tGW: Tensor, sinks_H: Tensor, blocks: _Blocks) -> Tensor:
        out_tHW, lse_tH = _round(
            q_tHD,
            k_tGD,
            v_tGW,
            sinks_H,
            list(blocks.lengths),
            blocks.group.group_name,
            blocks.scaling,
            blocks.window,
            blocks.softcap,
        )
        ctx.save_for_backward(q_tHD, k_tGD, v_tGW, sinks_H, out_tHW, lse_tH)
        ctx.blocks = blocks
        return out_tHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, out_tHW, lse_tH = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=lse_tH.dtype) for x in (q, k, v))
        saved = (q, grads[0].contiguous(), out_tHW, lse_tH)
        for step in range(blocks.size):
            coming = blocks.pass_on(k, v) if step + 1 < blocks.size else None
            for pair in blocks.of(step):
                _backward(saved, k, v, pair, blocks, (grad_q, grad_k, grad_v))
            if coming is not None:
                k, v = coming.arrived()
            if blocks.size > 1:  # with their keys; at last home
                grad_k, grad_v = blocks.pass_on(grad_k, grad_v).arrived()
        share_tH = (sinks_H.to(lse_tH.dtype) - lse_tH).exp()
        grad_sinks = -(share_tH * (grads[0].to(lse_tH.dtype) * out_tHW).sum(-1)).sum(0)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks.to(sinks_H.dtype), None


@torch.library.custom_op("palestra::ring", mutates_args=())
def _round(
    q_tHD: Tensor,
    k_tGD: Tensor,
    v_tGW: Tensor,
    sinks_H: Tensor,
    lengths: list[int],
    group_name: str,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """[t, H, W] and the logarithms of the sums [t, H]. One operation for torch: layers that compute again what is cheap
    keep what it returns."""
    group: Any = _resolve_process_group(group_name)  # type: ignore[arg-type]
    blocks = _Blocks(tuple(lengths), group, scaling, window, softcap)
    wide = torch.promote_types(q_tHD.dtype, torch.float32)
    out_tHW = q_tHD.new_zeros(*q_tHD.shape[:2], v_tGW.shape[-1], dtype=wide)
    lse_tH = sinks_H.to(wide).expand(*q_tHD.shape[:2]).clone()
    k, v = k_tGD, v_tGW
    for step in range(blocks.size):
        coming = blocks.pass_on(k, v) if step + 1 < blocks.size else None
        for pair in blocks.of(step):
            for rows, out, lse in _forward(q_tHD, k, v, pair, blocks):
                _merge(out_tHW[rows], lse_tH[rows], out, lse)
        if coming is not None:
            k, v = coming.arrived()
    return out_tHW.to(q_tHD.dtype), lse_tH


def _merge(out_rHW: Tensor, lse_rH: Tensor, more_rHW: Tensor, more_lse_rH: Tensor) -> None:
    """In place: the softmax over both sets of keys."""
    both_rH = torch.logaddexp(lse_rH, more_lse_rH)
    out_rHW.mul_((lse_rH - both_rH).exp()[..., None]).add_(more_rHW * (more_lse_rH - both_rH).exp()[..., None])
    lse_rH.copy_(both_rH)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, pair: tuple[Block, ...], blocks: _Blocks
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their values and the logarithms of their sums, over the keys of these blocks alone."""
    if blocks.uses_kernel(q, v):
        yield _kernel_forward(q, k, v, pair, blocks)
        return
    for block in pair:
        k_kHD, v_kHW = (_repeated(x[slice(*block.k)], q.shape[1]) for x in (k, v))
        for rows in _chunks(block, q.shape[1]):
            score_Hqk = _scores(q[rows], k_kHD, block, rows, blocks)[0]
            lse_Hq = score_Hqk.logsumexp(-1)
            weight_Hqk = (score_Hqk - lse_Hq[..., None]).exp()
            yield rows, torch.einsum("hqk,khw->qhw", weight_Hqk, v_kHW.to(weight_Hqk.dtype)), lse_Hq.T


def _backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    pair: tuple[Block, ...],
    blocks: _Blocks,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Adds to the gradients of queries, keys and values what these blocks have of them."""
    q, grad_out, out, lse = saved
    grad_q, grad_k, grad_v = grads
    if blocks.uses_kernel(q, v):
        _kernel_backward(saved, k, v, pair, blocks, grads)
        return
    heads = q.shape[1]
    for block in pair:
        keys = slice(*block.k)
        k_kHD, v_kHW = (_repeated(x[keys], heads).to(lse.dtype) for x in (k, v))
        for rows in _chunks(block, heads):
            score_Hqk, slope_Hqk = _scores(q[rows], k_kHD, block, rows, blocks)
            weight_Hqk = (score_Hqk - lse[rows].T[..., None]).exp()
            grad_out_qHW = grad_out[rows].to(lse.dtype)
            carried_Hq = (grad_out_qHW * out[rows]).sum(-1).T
            grad_weight_Hqk = torch.einsum("qhw,khw->hqk", grad_out_qHW, v_kHW)
            grad_score_Hqk = weight_Hqk * (grad_weight_Hqk - carried_Hq[..., None]) * slope_Hqk * blocks.scaling
            grad_q[rows] += torch.einsum("hqk,khd->qhd", grad_score_Hqk, k_kHD)
            grad_k[keys] += _summed(torch.einsum("hqk,qhd->khd", grad_score_Hqk, q[rows].to(lse.dtype)), k.shape[1])
            grad_v[keys] += _summed(torch.einsum("hqk,qhw->khw", weight_Hqk, grad_out_qHW), v.shape[1])


def _scores(q_qHD: Tensor, k_kHD: Tensor, block: Block, rows: slice, blocks: _Blocks) -> tuple[Tensor, Tensor | float]:
    """[H, q, k] in float32 or wider, -inf where a query does not look; and the slope of the cap there."""
    wide = torch.promote_types(q_qHD.dtype, torch.float32)
    score_Hqk = torch.einsum("qhd,khd->hqk", q_qHD.to(wide), k_kHD.to(wide)) * blocks.scaling
    slope: Tensor | float = 1.0
    if blocks.softcap is not None:
        capped = torch.tanh(score_Hqk / blocks.softcap)
        score_Hqk, slope = blocks.softcap * capped, 1 - capped**2
    visible = block.visible((rows.start - block.q[0], rows.stop - block.q[0]), q_qHD.device)
    return score_Hqk.masked_fill(~visible, float("-inf")), slope


def _chunks(block: Block, heads: int) -> Iterator[slice]:
    most = max(1, _MOST_SCORES // (heads * (block.k[1] - block.k[0])))
    for start in range(block.q[0], block.q[1], most):
        yield slice(start, min(start + most, block.q[1]))


def _repeated(x_kGD: Tensor, heads: int) -> Tensor:
    return x_kGD.repeat_interleave(heads // x_kGD.shape[1], dim=1)


def _summed(x_kHD: Tensor, groups: int) -> Tensor:
    return x_kHD.unflatten(1, (groups, -1)).sum(2)


# --- with torch's variable-length kernel: half precision on CUDA, without cap. Not tried on a GPU yet.


@lru_cache(maxsize=256)
def _kernel_ranges(pair: tuple[Block, ...], device: torch.device) -> tuple[Any, ...]:
    """The documents of one pair of pieces lie end to end, for queries and for keys. Made once for all layers, as the
    host waits for each copy to the device."""
    q, k = (slice(pair[0].q[0], pair[-1].q[1]), slice(pair[0].k[0], pair[-1].k[1]))
    ends = [
        torch.tensor([0, *accumulate(end - start for start, end in ranges)], dtype=torch.int32, device=device)
        for ranges in ([block.q for block in pair], [block.k for block in pair])
    ]
    longest = [max(end - start for start, end in ranges) for ranges in ([b.q for b in pair], [b.k for b in pair])]
    return q, k, *ends, *longest


def _kernel_window(pair: tuple[Block, ...]) -> tuple[list[int], bool]:
    """The kernel counts from the last query at the last key, so all blocks of a pair must lie alike: in one piece all
    are triangles, of which a token alone is one, too; of two pieces there is one block, a rectangle."""
    block = pair[0]
    num_q, num_k = block.q[1] - block.q[0], block.k[1] - block.k[0]
    is_causal = any(b.offset < b.k[1] - b.k[0] - 1 for b in pair)
    reach = block.window - 1 - block.offset + num_k - num_q
    seen_whole = all(b.offset + b.q[1] - b.q[0] <= b.window for b in pair)
    return [-1 if seen_whole else reach, 0 if is_causal else -1], is_causal


def _kernel_forward(
    q: Tensor, k: Tensor, v: Tensor, pair: tuple[Block, ...], blocks: _Blocks
) -> tuple[slice, Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    rows, keys, q_ends, k_ends, q_longest, k_longest = _kernel_ranges(pair, q.device)
    window, _ = _kernel_window(pair)
    out, lse = varlen_attn(
        q[rows].contiguous(),
        k[keys].contiguous(),
        v[keys].contiguous(),
        q_ends,
        k_ends,
        q_longest,
        k_longest,
        return_aux=AuxRequest(lse=True),
        scale=blocks.scaling,
        window_size=(window[0], window[1]),
        **told_of_groups(q, k),
    )
    return rows, out, lse.T


def _kernel_backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    pair: tuple[Block, ...],
    blocks: _Blocks,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    q, grad_out, out, lse = saved
    rows, keys, *ranges = _kernel_ranges(pair, q.device)
    window, is_causal = _kernel_window(pair)
    k, v = (_repeated(x[keys], q.shape[1]).contiguous() for x in (k, v))
    found = torch.ops.torch_attn._varlen_attn_backward(
        grad_out[rows].contiguous(),
        q[rows].contiguous(),
        k,
        v,
        out[rows].contiguous(),
        lse[rows].T.contiguous(),
        *ranges,
        is_causal,
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        blocks.scaling,
        window,
    )
    groups = grads[1].shape[1]
    grads[0][rows] += found[0]
    grads[1][keys] += _summed(found[1], groups)
    grads[2][keys] += _summed(found[2], groups)
