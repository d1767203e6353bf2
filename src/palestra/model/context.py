"""Context parallelism: ranks that hold parts of one pack, and attend as one.

Legend: T tokens of a pack (padded), C ranks of the context, t = T / C tokens of this rank, K scored tokens, k those of
them whose hidden state this rank holds, H query heads, G key and value heads, D width of a head.

`Ulysses` exchanges tokens for heads around every attention (Jacobs et al. 2023, arXiv:2309.14509): each rank attends
over the whole pack with H / C of the heads. `Ring` keeps all heads and sends keys and values around (Liu et al. 2023,
arXiv:2310.01889), with the pack cut into 2C pieces of which each rank has one from either end, so that all have equal
work under a causal mask. Everything else in a layer sees each token alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single_autograd

from palestra.config.schema import nearest_divisors
from palestra.model.ring import pieces_of, ring_attention

if TYPE_CHECKING:
    from palestra.model.documents import Documents

Attend = Callable[[Tensor, Tensor, Tensor, "Documents", "Scores"], Tensor]


@dataclass(frozen=True)
class Scores:
    """How queries and keys make weights: sliding window in tokens, cap on the scores, sinks [H]; None: without."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


class Context:
    """One rank that holds whole packs. `kernels` has the names of those that attend over them, fastest first."""

    rank, size, pieces = 0, 1, 1
    deals_heads = False

    def __init__(self, kernels: tuple[str, ...] = ("padded",)):
        self.kernels = kernels

    def part(self, num_tokens: int) -> Tensor:
        """Positions [t] of this rank's tokens, of `num_tokens`, a multiple of `pieces`."""
        return self.part_of(self.rank, num_tokens)

    def part_of(self, rank: int, num_tokens: int) -> Tensor:
        return torch.arange(num_tokens)

    def attend(
        self, whole: Attend, q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, documents: "Documents", scores: Scores
    ) -> Tensor:
        """[t, H, D]; `whole` does it over a whole pack."""
        return whole(q_tHD, k_tGD, v_tGD, documents, scores)

    def mine(self, owner_K: Tensor) -> Tensor | slice:
        """What picks those that this rank owns."""
        return slice(None)

    def collect(self, mine_k: Tensor, owner_K: Tensor) -> Tensor:
        """[K] on every rank from what each has for the tokens that it owns, in their order. Every rank goes on to
        compute the same from it, so a gradient is taken from this rank's own computation only."""
        return mine_k

    def total(self, part: Tensor) -> Tensor:
        """The sum of what each rank has, without a gradient."""
        return part

    def require(self, *, heads: int) -> None:
        """Errors: ValueError for a model that cannot be split so."""


WHOLE = Context()


class _Split(Context):
    def __init__(self, group: dist.ProcessGroup, kernels: tuple[str, ...] = ("padded",)):
        super().__init__(kernels)
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def mine(self, owner_K: Tensor) -> Tensor | slice:
        return owner_K == self.rank

    def collect(self, mine_k: Tensor, owner_K: Tensor) -> Tensor:
        return _Collect.apply(mine_k, owner_K, self)

    def total(self, part: Tensor) -> Tensor:
        whole = part.detach().clone()
        dist.all_reduce(whole, group=self.group)
        return whole


class _Collect(Function):
    @staticmethod
    def forward(ctx: Any, mine_k: Tensor, owner_K: Tensor, context: _Split) -> Tensor:
        counts = torch.bincount(owner_K, minlength=context.size).tolist()
        padded = mine_k.new_zeros(max(counts))
        padded[: len(mine_k)] = mine_k
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=context.group)
        found_K = mine_k.new_empty(len(owner_K))
        for rank, part in enumerate(gathered):
            found_K[owner_K == rank] = part[: counts[rank]]
        ctx.save_for_backward(context.mine(owner_K))
        return found_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (is_mine_K,) = ctx.saved_tensors
        return grads[0][is_mine_K], None, None


class Ulysses(_Split):
    deals_heads = True

    def __init__(self, group: dist.ProcessGroup, kernels: tuple[str, ...] = ("padded",)):
        super().__init__(group, kernels)
        self.pieces = self.size

    def part_of(self, rank: int, num_tokens: int) -> Tensor:
        length = num_tokens // self.size
        return torch.arange(rank * length, (rank + 1) * length)

    def attend(
        self, whole: Attend, q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, documents: "Documents", scores: Scores
    ) -> Tensor:
        q_ThD, k_TgD, v_TgD = (self._to_heads(x) for x in (q_tHD, self._spread(k_tGD), self._spread(v_tGD)))
        sinks = scores.sinks
        if sinks is not None:
            sinks = sinks.chunk(self.size)[self.rank]
        out_ThD = whole(q_ThD, k_TgD, v_TgD, documents, Scores(scores.scaling, scores.window, scores.softcap, sinks))
        return self._to_tokens(out_ThD)

    def require(self, *, heads: int) -> None:
        if heads % self.size:
            raise ValueError(
                f"train.context_parallel={self.size} does not divide the model's {heads} attention heads; set it to "
                f"{nearest_divisors(heads, self.size)}, or set train.context_kind=ring"
            )

    def _spread(self, x_tGD: Tensor) -> Tensor:
        """Heads repeated until every rank gets as many: each is still that of the same queries."""
        heads = x_tGD.shape[1]
        times = math.lcm(heads, self.size) // heads
        return x_tGD.repeat_interleave(times, dim=1) if times > 1 else x_tGD

    def _to_heads(self, x_tHD: Tensor) -> Tensor:
        """[t, H, D] to [T, H / C, D]."""
        parts = x_tHD.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        return self._exchange(parts).flatten(0, 1)

    def _to_tokens(self, x_ThD: Tensor) -> Tensor:
        """[T, H / C, D] to [t, H, D]."""
        parts = self._exchange(x_ThD.unflatten(0, (self.size, -1)).contiguous())
        return parts.transpose(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """[C, ...]: the r-th part goes to rank r."""
        return all_to_all_single_autograd(parts, None, None, self.group)


class Ring(_Split):
    def __init__(self, group: dist.ProcessGroup, kernels: tuple[str, ...] = ("padded",)):
        super().__init__(group, kernels)
        self.pieces = 2 * self.size

    def part_of(self, rank: int, num_tokens: int) -> Tensor:
        length = num_tokens // self.pieces
        return torch.cat([torch.arange(i * length, (i + 1) * length) for i in pieces_of(rank, self.size)])

    def attend(
        self, whole: Attend, q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, documents: "Documents", scores: Scores
    ) -> Tensor:
        documents.taken.add("ring")
        return ring_attention(
            q_tHD,
            k_tGD,
            v_tGD,
            lengths=documents.lengths,
            group=self.group,
            scaling=scores.scaling,
            window=scores.window,
            softcap=scores.softcap,
            sinks=scores.sinks,
        )
