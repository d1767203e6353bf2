"""Experts on several ranks: tokens travel to the ranks that own their experts, and back.

Legend: T tokens of this rank, K experts of a token, S = T x K choices, R rows that arrive here, D model, E experts,
P ranks of the group; every rank owns E / P experts in a row. Ranks of a tensor axis, which have the same tokens, each
have a part of them computed.

Registered with transformers, so that it works for every family whose experts go through that registry. What computes
the rows is one of transformers' own implementations, given the owned experts in place of all: activation, gate, biases
and the layout of the weights stay the family's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from palestra.config.schema import nearest_divisors
from palestra.model.expert_adapters import adapted_experts, expert_modules, is_adapted
from palestra.model.tensor import ALONE, Axis

NAME = "palestra_experts"


@dataclass(frozen=True)
class Dispatch:
    """Who owns the experts: the ranks of `group`, in order. `compute` is an implementation of transformers. `tensor`
    are ranks with the same tokens."""

    group: dist.ProcessGroup
    compute: str
    tensor: Axis = ALONE

    @property
    def num_ranks(self) -> int:
        return dist.get_world_size(self.group)


def split_experts(model: PreTrainedModel, mesh: DeviceMesh, *, compute: str, tensor: Axis = ALONE) -> None:
    """Leave this rank the experts that it owns; `mesh` has one axis.

    Errors: ValueError, if there are not as many for every rank.
    """
    modules: list[Any] = list(expert_modules(model))
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.shape[0] % mesh.size():
                raise ValueError(
                    f"train.expert_parallel={mesh.size()} does not divide the model's {parameter.shape[0]} experts; "
                    f"set it to {nearest_divisors(parameter.shape[0], mesh.size())}"
                )
            owned = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(owned, requires_grad=parameter.requires_grad))
        module.dispatch = Dispatch(mesh.get_group(), compute, tensor)
    model.config._experts_implementation = NAME


class _Owned:
    """A family's experts module with the owned experts in place of all; everything else is the module's."""

    def __init__(self, module: Any, num_ranks: int):
        self._module = module
        self.num_experts = int(module.num_experts) // num_ranks

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return found.to_local() if isinstance(found, DTensor) else found


@torch.compiler.disable  # the rows of each rank are known only when they arrive
def routed_experts(module: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What the chosen experts make of each token, weighted. A collective of the module's `dispatch`.

    Shapes: hidden_TD [T, D], index_TK and weight_TK [T, K]; returns [T, D].
    """
    tensor: Axis = module.dispatch.tensor
    out_tD = _routed(module, *(tensor.part(x) for x in (hidden_TD, index_TK, weight_TK)))
    return tensor.gather(out_tD, len(hidden_TD))


def _routed(module: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    dispatch: Dispatch = module.dispatch
    owned = _Owned(module, dispatch.num_ranks)
    order_S = index_TK.flatten().argsort(stable=True)
    sent_P, arriving_P, expert_R = _announce(index_TK, owned.num_experts, dispatch)
    rows_RD = _exchange(hidden_TD[order_S // index_TK.shape[1]], arriving_P, sent_P, dispatch)
    rows_RD = _compute(owned, rows_RD, expert_R, dispatch.compute)
    back_SD = _exchange(rows_RD, sent_P, arriving_P, dispatch)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    chosen_TKD = back_SD[place_S].unflatten(0, index_TK.shape)
    return (chosen_TKD * weight_TK[..., None]).sum(1).to(hidden_TD.dtype)


@torch.no_grad()
def _announce(index_TK: Tensor, num_owned: int, dispatch: Dispatch) -> tuple[list[int], list[int], Tensor]:
    """Rows to and from each rank, and which of the owned experts [R] each arriving row is for. The host waits for the
    device once, for how many they are."""
    ranks, index_S = dispatch.num_ranks, index_TK.flatten()
    counts_E = index_S.new_zeros(ranks * num_owned).scatter_add_(0, index_S, torch.ones_like(index_S))
    sent_PE = counts_E.view(ranks, num_owned)
    arriving_PE = torch.empty_like(sent_PE)
    dist.all_to_all_single(arriving_PE, sent_PE, group=dispatch.group)
    sent_P, arriving_P = torch.stack([sent_PE.sum(1), arriving_PE.sum(1)]).tolist()
    expert_E = torch.arange(num_owned, device=index_TK.device).repeat(ranks)
    return sent_P, arriving_P, expert_E.repeat_interleave(arriving_PE.flatten(), output_size=sum(arriving_P))


def _exchange(rows: Tensor, out_splits: list[int], in_splits: list[int], dispatch: Dispatch) -> Tensor:
    return all_to_all_single_autograd(rows.contiguous(), out_splits, in_splits, dispatch.group)


def _compute(owned: _Owned, rows_RD: Tensor, expert_R: Tensor, compute: str) -> Tensor:
    """Every row by its one expert. A rank that no row came to computes one of zeros: all ranks have gradients."""
    num = len(expert_R)
    if num == 0:
        rows_RD, expert_R = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])]), expert_R.new_zeros(1)
    ones_R1 = torch.ones_like(expert_R, dtype=rows_RD.dtype)[:, None]
    return _implementation(owned, compute)(owned, rows_RD, expert_R[:, None], ones_R1)[:num]


def _implementation(owned: _Owned, compute: str) -> Callable[..., Tensor]:
    if is_adapted(owned._module):
        return adapted_experts
    own = type(owned._module).forward.__wrapped__  # what transformers' registry falls back to
    return own if compute == "eager" else ALL_EXPERTS_FUNCTIONS[compute]


ALL_EXPERTS_FUNCTIONS.register(NAME, routed_experts)
