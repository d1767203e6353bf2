"""Optimizers, and the learning rate as a pure function of the step."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from palestra.algo.schedules import ScheduleName, lr_multiplier
from palestra.config.schema import Train, WarmUp


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


def adamw(model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """Decay pulls on matrices only, not on norms and biases. The learning rate is set at every step."""
    groups = [
        {"params": some, "weight_decay": decay}
        for on_mesh in by_mesh(parameter for parameter in model.parameters() if parameter.requires_grad)
        for some, decay in (
            ([p for p in on_mesh if p.dim() > 1], weight_decay),
            ([p for p in on_mesh if p.dim() <= 1], 0),
        )
        if some
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one operation can take together: those of experts may be on a mesh of their own."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
