"""Optimizers, and the learning rate as a pure function of the step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from palestra.algo.schedules import ScheduleName, lr_multiplier
from palestra.config.schema import Train, WarmUp
from palestra.train.moments import Home, local
from palestra.train.muon import Muon, Stored, matrices_of


@dataclass(frozen=True)
class LearningRate:
    """Nothing of it needs saving: a resumed run asks for the rate of its step."""

    peak: float
    schedule: ScheduleName
    num_steps: int
    warmup_steps: int
    decay_steps: int = 0

    def at(self, step: int) -> float:
        return self.peak * lr_multiplier(
            step,
            schedule=self.schedule,
            num_steps=self.num_steps,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
        )


def training_rate(train: Train) -> LearningRate:
    return LearningRate(
        peak=train.lr,
        schedule=train.schedule,
        num_steps=train.steps,
        warmup_steps=train.lr_warmup_steps,
        decay_steps=train.lr_decay_steps,
    )


def warmup_rate(warmup: WarmUp) -> LearningRate:
    return LearningRate(
        peak=warmup.lr,
        schedule=warmup.schedule,
        num_steps=warmup.steps,
        warmup_steps=min(warmup.lr_warmup_steps, warmup.steps),
    )


class Optimizer(torch.optim.Optimizer):
    """AdamW and Muon side by side, on shards of any mesh, moments in device or host memory.

    Each group names its `algorithm`. Groups do not depend on how the ranks are laid out, so a checkpoint is resumed on
    another layout. All arithmetic is on this rank's shards; parameters of one group may be on different meshes.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        matrices: Mapping[nn.Parameter, Stored] = MappingProxyType({}),
        offload: bool = False,
        muon_dtype: torch.dtype | None = None,
    ):
        """`matrices`: how the parameters of groups of Muon's hold theirs. A collective where there are any."""
        super().__init__(groups, {"lr": 0.0})
        self._home = Home(on_host=offload)
        self._muon = Muon(matrices, self._home, dtype=muon_dtype)
        for group in self.param_groups:
            for parameter in group["params"]:
                self._moments(group, parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A collective. Nothing calls a closure: gradients are there."""
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                trained = [parameter for parameter in group["params"] if parameter.grad is not None]
                self._muon.step(group, {one: self._moments(group, one)["momentum_buffer"] for one in trained})
            else:
                self._adamw(group)
        self._home.settle()

    def _adamw(self, group: dict[str, Any]) -> None:
        """Fused, bucket by bucket."""
        for bucket in self._home.buckets([parameter for parameter in group["params"] if parameter.grad is not None]):
            states = [self._moments(group, parameter) for parameter in bucket]
            moments = [local(state[name]) for name in ("exp_avg", "exp_avg_sq") for state in states]
            with self._home.borrow(moments, local(bucket[0]).device) as here:
                adamw(
                    [local(parameter) for parameter in bucket],
                    [local(parameter.grad) for parameter in bucket if parameter.grad is not None],
                    here[: len(bucket)],
                    here[len(bucket) :],
                    [],
                    [state["step"] for state in states],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

    def _moments(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state and group["algorithm"] == "muon":
            state["momentum_buffer"] = self._home.zeros_like(parameter)
        elif not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = self._home.zeros_like(parameter)
            state["exp_avg_sq"] = self._home.zeros_like(parameter)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but into the moments that are there: those in host memory stay there."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name, moment in self._moments(group, parameter).items():
                    if (value := state_dict["state"][key][name]) is not moment:
                        moment.copy_(value)
            group.update({name: value for name, value in saved.items() if name != "params"})


def make_optimizer(model: nn.Module, layers: Sequence[nn.Module], train: Train) -> Optimizer:
    """What `train.optimizer` says; the learning rate is set at every step. A collective.

    Muon trains the matrices of `layers`, the decoder's; AdamW all others: embeddings, head, norms, biases.
    Decay pulls on matrices only, not on norms and biases.
    """
    matrices = matrices_of(layers) if train.optimizer == "muon" else {}
    others = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p not in matrices]
    decayed = [p for name, p in others if p.dim() > 1 and not name.endswith("bias")]
    plain = [p for name, p in others if p.dim() <= 1 or name.endswith("bias")]
    muon = {"algorithm": "muon", "weight_decay": train.weight_decay, **train.muon.model_dump()}
    adam = {"algorithm": "adamw", "betas": train.betas, "eps": 1e-8}
    groups = [
        {"params": list(matrices), **muon},
        {"params": decayed, "weight_decay": train.weight_decay, **adam},
        {"params": plain, "weight_decay": 0.0, **adam},
    ]
    return Optimizer([group for group in groups if group["params"]], matrices=matrices, offload=train.offload_optimizer)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
