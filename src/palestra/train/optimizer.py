"""Optimizers, and the learning rate as a pure function of the step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from palestra.algo.schedules import ScheduleName, lr_multiplier
from palestra.config.schema import Train, WarmUp
from palestra.model.policy import Policy
from palestra.train.muon import Muon


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


def make_optimizers(policy: Policy, train: Train) -> list[torch.optim.Optimizer]:
    """Every trainable parameter is in one of them. Learning rates are set at every step, the same for all."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    made: list[torch.optim.Optimizer] = []
    if train.optimizer == "muon":
        groups = _matrices(policy)
        matrices = {id(parameter) for group in groups for parameter in group["params"]}
        trained = [parameter for parameter in trained if id(parameter) not in matrices]
        made.append(Muon(groups, weight_decay=train.weight_decay, **train.muon.model_dump()))
    made.append(adamw(trained, betas=train.betas, weight_decay=train.weight_decay))
    for optimizer in made if train.offload_optimizer else ():
        keep_on_host(optimizer)
    return made


def adamw(parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """Decay pulls on matrices only, not on norms and biases."""
    groups = [
        {"params": some, "weight_decay": decay}
        for on_mesh in by_mesh(parameters)
        for some, decay in (
            ([p for p in on_mesh if p.dim() > 1], weight_decay),
            ([p for p in on_mesh if p.dim() <= 1], 0.0),
        )
        if some
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def _matrices(policy: Policy) -> list[dict[str, Any]]:
    """Muon's: the matrices of the decoder's layers. Embeddings, head, norms and biases are AdamW's.

    Experts whose gates and ups a family keeps as one parameter, one above the other, are two matrices each.
    """
    groups: dict[tuple[int, int], list[nn.Parameter]] = {}
    for layer in policy.decoder_layers:
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter.dim() >= 2 and not name.endswith("bias"):
                    groups.setdefault(_parts(module, name), []).append(parameter)
    return [{"params": some, "parts": parts, "parts_dim": dim} for (parts, dim), some in groups.items()]


def _parts(module: nn.Module, name: str) -> tuple[int, int]:
    """How many matrices a parameter is made up of, and along which dimension."""
    is_stacked = name == "gate_up_proj" and getattr(module, "is_concatenated", False)
    return 2 if is_stacked else 1, -1 if getattr(module, "is_transposed", False) else -2


def keep_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Its state is on the device during its steps only: activations get the room."""

    def fetch(*_: Any) -> None:
        _move_state(optimizer, to_host=False)

    def put_away(*_: Any) -> None:
        _move_state(optimizer, to_host=True)

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(put_away)


def _move_state(optimizer: torch.optim.Optimizer, *, to_host: bool) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = value.to("cpu" if to_host else parameter.device, non_blocking=not to_host)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one operation can take together: those of experts may be on a mesh of their own."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
