"""The experts that an engine chose, used in the trainer's forward.

Legend: T tokens of a pack, t those of them on this rank, L layers of the decoder, K experts of a token in a layer, E
experts.

Engine and trainer compute the same numbers up to rounding, and a router turns a last bit into another expert. Here the
trainer's routers choose as the engine's did. Their weights are still their own scores, of the experts that are given,
so that gradients reach the routers.

There is one mechanism for every family: while a router of transformers runs, the `topk` by which it chooses K of E
experts is answered with the given ones, and with the router's own numbers at them. What a family makes of these
(softmax before or after, sigmoid, biases, groups, a scale) stays its own code. `policy.check_replay` proves it of a
model.

Source: Ma et al. 2025, arXiv:2510.11370 (rollout routing replay).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from palestra.core.errors import InfrastructureError, UserError

NOT_KNOWN = torch.zeros((0, 0, 0), dtype=torch.int16)
"""Routes of a pack of which none are known: routers choose for themselves."""

_TOPK = (torch.topk, Tensor.topk)


class Replay:
    """Gives the `routers` of a model their experts; each comes with the number of its layer, of `num_layers` in the
    decoder. Without routers, nothing.

    What was given last stays: a backward that computes layers again has the same choices.
    """

    def __init__(self, routers: Sequence[tuple[int, Any]] = (), num_layers: int = 0):
        self.routers, self.num_layers = tuple(routers), num_layers
        self._chosen = {int(router.top_k) for _, router in routers}
        self._given_tLK, self._is_real_t, self._is_counting = NOT_KNOWN, torch.zeros(0, dtype=torch.bool), False
        for layer, router in routers:
            router.forward = _Given(self, layer, router)
        self.forget()

    def __bool__(self) -> bool:
        return bool(self.routers)

    def forget(self) -> None:
        """Begin to count anew."""
        self._counts = torch.zeros(3, dtype=torch.int64)

    @contextmanager
    def giving(self, routes_tLK: Tensor, is_real_t: Tensor) -> Iterator[None]:
        """Around one forward, which is counted; -1 is for a router to choose itself.

        Errors: InfrastructureError for the choices of another model.
        """
        if self and routes_tLK.numel():
            num_layers, chosen = routes_tLK.shape[1:]
            if num_layers != self.num_layers or self._chosen != {chosen}:
                raise InfrastructureError(
                    f"the engine recorded {chosen} experts in each of {num_layers} layers, but the trainer's model has "
                    f"{self.num_layers} layers and chooses {sorted(self._chosen)}: they are not the same model"
                )
        self._given_tLK, self._is_real_t, self._is_counting = routes_tLK, is_real_t, True
        self._counts = self._counts.to(is_real_t.device)
        self._counts[2] += is_real_t.sum() * len(self.routers)
        try:
            yield
        finally:
            self._is_counting = False

    def drawn(self, num_tokens: int) -> Tensor:
        """[T, L, K] experts at random, the same at each call; K and E are those of the first router."""
        _, router = self.routers[0]
        shape = num_tokens, self.num_layers, router.num_experts
        score_TLE = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return score_TLE.argsort(-1)[..., : router.top_k].to(torch.int16)

    def given(self, layer: int) -> Tensor | None:
        """[t, K]; None where nothing is known."""
        return self._given_tLK[:, layer].long() if self._given_tLK.numel() else None

    def count(self, is_other_t: Tensor, is_known_t: Tensor) -> None:
        """Of one router: where its experts were given, and where they are others than it would have chosen."""
        if self._is_counting:
            self._counts[:2] += torch.stack([(where_t & self._is_real_t).sum() for where_t in (is_other_t, is_known_t)])

    def counts(self, group: dist.ProcessGroup) -> tuple[int, int, int]:
        """Pairs of token and router since `forget`, over all ranks of `group`: those given others than the router would
        have chosen, those given any, all. A collective."""
        total = self._counts.clone()
        dist.all_reduce(total, group=group)
        other, known, every = total.tolist()
        return other, known, every


class _Given:
    """A router's forward, with its experts given where they are known."""

    def __init__(self, replay: Replay, layer: int, router: Any):
        self._replay, self._layer, self._router, self._plain = replay, layer, router, router.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given_tK = self._replay.given(self._layer)
        if given_tK is None:
            return self._plain(*args, **kwargs)
        with _Choice(given_tK, self._router.num_experts) as choice:
            outputs = self._plain(*args, **kwargs)
        if choice.num_made != 1:
            raise UserError(
                f"train.router_replay: {type(self._router).__name__} does not choose experts by one topk, so that they "
                "cannot be given to it; set train.router_replay=false"
            )
        self._replay.count(choice.is_other_t, choice.is_known_t)
        return outputs


class _Choice(TorchFunctionMode):
    """The topk of K among E scores of each token has the given experts. Where these are the router's own, they are in
    its own order: no number changes then. Topk of other shapes, of groups of experts, are left as they are."""

    def __init__(self, given_tK: Tensor, num_experts: int):
        super().__init__()
        self._given_tK, self._num_experts, self.num_made = given_tK, num_experts, 0
        self.is_known_t = (given_tK >= 0).all(-1)
        self.is_other_t = torch.zeros_like(self.is_known_t)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in _TOPK or found.indices.shape != self._given_tK.shape:
            return found
        scores_tE = args[0] if args else (kwargs or {})["input"]
        if scores_tE.shape[-1] != self._num_experts:
            return found
        self.num_made += 1
        is_same_t = (found.indices.sort(-1).values == self._given_tK.sort(-1).values).all(-1)
        self.is_other_t = self.is_known_t & ~is_same_t
        index_tK = torch.where(self.is_other_t[:, None], self._given_tK, found.indices)
        return torch.return_types.topk((scores_tE.gather(-1, index_tK), index_tK))
