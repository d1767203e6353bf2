"""What the routers of a mixture of experts do: which experts they choose, how evenly, and what evens them out.

Legend: T tokens of this rank, K experts of a token, E experts, L layers with experts.

Routers are the modules that transformers itself names as those with `router_logits`; they return logits [T, E], weights
[T, K] and chosen experts [T, K], in an order of their own. A family whose routers return something else has none here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from palestra.core.errors import UserError
from palestra.model.context import WHOLE, Context
from palestra.model.replay import NOT_KNOWN, Replay

_BIAS = "e_score_correction_bias"  # what a family adds to the scores for the choice alone


class Routers:
    """Listens to all routers of a model; of a dense one there are none, and nothing is heard. `not_heard` says in words
    that there are some which the first forward did not understand."""

    not_heard: tuple[str, ...] = ()

    def __init__(self, model: PreTrainedModel):
        recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
        kind, self._logits_at = getattr(recorder, "target_class", None), getattr(recorder, "index", 0)
        self._routers = [module for module in model.modules() if kind is not None and isinstance(module, kind)]
        self._biased = list(_biased(model, self._routers))
        self._heard: list[tuple[Tensor, Tensor, Tensor]] = []
        self._is_listening = False
        self._real_T = torch.zeros(0)
        self.replay = Replay()
        for router in self._routers:
            router.register_forward_hook(self._hear)
        self.forget()

    def __len__(self) -> int:
        return len(self._routers)

    @property
    def modules(self) -> set[nn.Module]:
        """The routers, and what they consist of."""
        return {inner for router in self._routers for inner in router.modules()}

    def accept_routes(self, layers: Sequence[nn.Module]) -> None:
        """From now on routers take the experts that a forward is given; `layers` are all of the decoder.

        Errors: UserError for a model without routers, or whose routers do not say how many experts they choose.
        """
        if not all(hasattr(router, "top_k") and hasattr(router, "num_experts") for router in self._routers or [None]):
            name = type(self._routers[0]).__name__ if self._routers else "a model without experts"
            raise UserError(f"train.router_replay: experts cannot be given to {name}; set train.router_replay=false")
        layer_of = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
        self.replay = Replay([(layer_of[router], router) for router in self._routers], len(layers))

    def forget(self, *, for_loss: bool = False) -> None:
        """Begin to count anew. With `for_loss` what the routers say is kept until the next forward."""
        self.replay.forget()
        self._for_loss = for_loss
        self._load: dict[nn.Module, Tensor] = {}
        self._entropy = torch.zeros(2, dtype=torch.float64)

    @contextmanager
    def listening(self, is_real_T: Tensor, routes_TLK: Tensor = NOT_KNOWN) -> Iterator[None]:
        """Around one forward; what a backward computes again is not heard twice, nor padding."""
        self._heard, self._real_T, self._is_listening = [], is_real_T.double(), not self.not_heard
        try:
            with self.replay.giving(routes_TLK, is_real_T):
                yield
        finally:
            self._is_listening = False

    def _hear(self, router: nn.Module, inputs: Any, outputs: Any) -> None:
        if not self._is_listening:
            return
        try:
            heard = self.in_order(outputs)
        except ValueError as error:
            self._give_up(router, str(error))
            return
        self._count(router, *heard)
        if self._for_loss:
            self._heard.append(heard)

    def in_order(self, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights, experts; families have orders of their own. Errors: ValueError for anything else."""
        found = [out for out in outputs if isinstance(out, Tensor)] if isinstance(outputs, tuple) else []
        if len(found) == 3 and all(out.dim() == 2 for out in found):
            logits_TE = outputs[self._logits_at]
            chosen = [out for out in found if not out.is_floating_point()]
            weights = [out for out in found if out is not logits_TE and out.is_floating_point()]
            if len(chosen) == len(weights) == 1:
                return logits_TE, weights[0], chosen[0]
        raise ValueError("does not return logits [T, E], weights [T, K] and chosen experts [T, K]")

    def _give_up(self, router: nn.Module, why: str) -> None:
        """All ranks do at the same router: their collectives stay the same."""
        self.not_heard = (f"there are no metrics of routers (train/experts/...): {type(router).__name__} {why}",)
        self._routers, self._biased, self._heard, self._is_listening = [], [], [], False
        self.forget(for_loss=self._for_loss)

    @torch.no_grad()
    def _count(self, router: nn.Module, logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor) -> None:
        load_E = self._chosen(index_TK, logits_TE.shape[-1])
        self._load[router] = load_E + self._load.get(router, 0.0)
        share_TK = weights_TK.double() / weights_TK.double().sum(-1, keepdim=True)
        entropy_T = -torch.special.xlogy(share_TK, share_TK).sum(-1) * self._real_T
        self._entropy = self._entropy.to(entropy_T.device)
        self._entropy += torch.stack([entropy_T.sum(), self._real_T.sum()])

    def _chosen(self, index_TK: Tensor, num_experts: int) -> Tensor:
        """[E], how often each was: without waiting for the device, as a count of unknown length would."""
        real_TK = self._real_T[:, None].expand(index_TK.shape)
        return real_TK.new_zeros(num_experts).scatter_add_(0, index_TK.flatten(), real_TK.flatten())

    def balance_loss(self, context: Context = WHOLE) -> Tensor:
        """Of the last forward: E x sum over experts of (share of choices x mean probability), summed over tokens and
        averaged over layers: T if all experts are used alike. The probabilities are the logits' softmax, whatever the
        family makes of them; the shares are those of a whole pack, also where this rank has a part of it. A collective
        of the context. Only after `forget` for it.

        Source: Fedus et al. 2021, arXiv:2101.03961, equation 4.
        """
        load_LE = torch.stack([self._chosen(index_TK, logits_TE.shape[-1]) for logits_TE, _, index_TK in self._heard])
        whole_LE = context.total(load_LE)
        share_LE = (whole_LE / whole_LE.sum(-1, keepdim=True).clamp_min(1)).float()
        losses = []
        for share_E, (logits_TE, _, _) in zip(share_LE, self._heard, strict=True):
            probability_TE = logits_TE.float().softmax(-1) * self._real_T[:, None].float()
            losses.append(len(share_E) * (share_E * probability_TE.sum(0)).sum())
        return torch.stack(losses).mean()

    def load(self, group: dist.ProcessGroup) -> Tensor:
        """[L, E] tokens of each expert since `forget`, over all ranks of `group`. A collective."""
        load_LE = torch.stack([self._load[router] for router in self._routers])
        dist.all_reduce(load_LE, group=group)
        return load_LE

    def weight_entropy(self, group: dist.ProcessGroup) -> tuple[float, float]:
        """Total and count over tokens and layers: the entropy of a token's weights over its chosen experts."""
        total = self._entropy.clone()
        dist.all_reduce(total, group=group)
        return float(total[0]), float(total[1])

    @property
    def biases(self) -> list[Tensor]:
        """[E] each, by layer; none where the family has none."""
        return [getattr(module, _BIAS) for module in self._biased]

    @torch.no_grad()
    def update_biases(self, load_LE: Tensor, rate: float) -> None:
        """Up by `rate` for experts with less than the mean load, down for those with more: the same on every rank.

        Source: Wang et al. 2024, arXiv:2408.15664.
        """
        for bias_E, load_E in zip(self.biases, load_LE, strict=True):
            bias_E += rate * torch.sign(load_E.mean() - load_E).to(bias_E)


def _biased(model: nn.Module, routers: list[nn.Module]) -> Iterator[nn.Module]:
    """A router, or the block it is in: whichever has the bias as a buffer. Parameters are sharded."""
    for router in routers:
        block = next(module for module in model.modules() if router in module.children())
        yield from [module for module in (router, block) if _BIAS in dict(module.named_buffers(recurse=False))][:1]


def max_violation(load_LE: Tensor) -> Tensor:
    """[L]: (largest load - mean load) / mean load of each layer; 0 if all experts have the same."""
    mean_L = load_LE.mean(1)
    return (load_LE.amax(1) - mean_L) / mean_L
