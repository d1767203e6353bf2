"""What the routers of a mixture of experts do: which experts they choose, how evenly, and what evens them out.

Legend: T tokens of this rank, K experts of a token, E experts, L layers with experts.

Routers are the modules that transformers itself names as those with `router_logits`; they return logits [T, E], weights
[T, K] and chosen experts [T, K].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

_BIAS = "e_score_correction_bias"  # what a family adds to the scores for the choice alone


class Routers:
    """Listens to all routers of a model; of a dense one there are none, and nothing is heard."""

    def __init__(self, model: PreTrainedModel):
        recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", None)
        self._routers = [module for module in model.modules() if kind is not None and isinstance(module, kind)]
        self._biased = list(_biased(model, self._routers))
        self._heard: list[tuple[Tensor, Tensor, Tensor]] = []
        self._is_listening = False
        for router in self._routers:
            router.register_forward_hook(self._hear)
        self.forget()

    def __len__(self) -> int:
        return len(self._routers)

    def forget(self) -> None:
        """Begin to count anew."""
        self._load: list[Tensor] = []
        self._entropy = torch.zeros(2, dtype=torch.float64)

    @contextmanager
    def listening(self, is_real_T: Tensor) -> Iterator[None]:
        """Around one forward; what a backward computes again is not heard twice, nor padding."""
        self._heard, self._is_listening = [], True
        try:
            yield
        finally:
            self._is_listening = False
        self._heard = [
            (logits[is_real_T], weights[is_real_T], index[is_real_T]) for logits, weights, index in self._heard
        ]
        if self._heard:
            self._count()

    def _hear(self, router: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._is_listening:
            self._heard.append(outputs)

    @torch.no_grad()
    def _count(self) -> None:
        loads = [torch.bincount(index.flatten(), minlength=logits.shape[-1]) for logits, _, index in self._heard]
        self._load = [a + b for a, b in zip(self._load, loads, strict=True)] if self._load else loads
        for _, weights, _ in self._heard:
            share_TK = weights.double() / weights.double().sum(-1, keepdim=True)
            entropy_T = -torch.special.xlogy(share_TK, share_TK).sum(-1)
            self._entropy = self._entropy.to(entropy_T.device)
            self._entropy += torch.stack([entropy_T.sum(), entropy_T.new_tensor(len(entropy_T))])

    def balance_loss(self) -> Tensor:
        """Of the last forward: E x sum over experts of (share of choices x mean probability), summed over tokens and
        averaged over layers: T if all experts are used alike. The probabilities are the logits' softmax, whatever the
        family makes of them.

        Source: Fedus et al. 2021, arXiv:2101.03961, equation 4.
        """
        losses = []
        for logits_TE, _, index_TK in self._heard:
            num = logits_TE.shape[-1]
            chosen_E = torch.bincount(index_TK.flatten(), minlength=num) / max(index_TK.numel(), 1)
            losses.append(num * (chosen_E * logits_TE.float().softmax(-1).sum(0)).sum())
        return torch.stack(losses).mean()

    def load(self, group: dist.ProcessGroup) -> Tensor:
        """[L, E] tokens of each expert since `forget`, over all ranks of `group`. A collective."""
        load_LE = torch.stack(self._load).double()
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
    """A router, or the block it is in: whichever has the bias."""
    for router in routers:
        block = next(module for module in model.modules() if router in module.children())
        yield from [module for module in (router, block) if isinstance(getattr(module, _BIAS, None), Tensor)][:1]


def max_violation(load_LE: Tensor) -> Tensor:
    """[L]: (largest load - mean load) / mean load of each layer; 0 if all experts have the same."""
    mean_L = load_LE.mean(1)
    return (load_LE.amax(1) - mean_L) / mean_L
