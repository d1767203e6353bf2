"""Low-rank adapters of routed experts: two factors for each expert, beside its matrices in the family's own module.

Legend: T tokens, K experts of a token, S = T x K choices, D model, E experts, R rank, I inputs and O outputs of one
matrix. An expert computes x (W_OI + scale B_OR A_RI)^T; gate and up, which are one matrix here, share an A.

They are parameters of the module that has the experts, with a value for each expert first, so that what shards experts,
and gives them to the ranks that own them, does it with them too. The product with W stays; that with the factors is
added to it, so that no expert's matrix is ever written, and none has a gradient. What the module does between its
products follows transformers' protocol for experts, as its own grouped implementation does.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_mm

TARGET = "experts"  # in `model.lora.targets`
NAME = "palestra_adapted_experts"
A, B = "_lora_A", "_lora_B"  # end the names of the factors of the matrix that they lie beside
TWICE_PUBLISHED = f".gate_up_proj{A}"


def expert_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Those whose forward goes through transformers' registry."""
    return (module for module in model.modules() if hasattr(module, "_is_expert_parallel"))


def why_not(layers: nn.Module) -> str | None:
    """What stands against adapters of the experts in these layers."""
    modules: list[Any] = list(expert_modules(layers))
    if not modules:
        return "no experts that go through transformers' registry"
    if modules[0].is_transposed:
        return "experts in one transposed matrix, of which engines load adapters in a layout of their own"
    return None


def adapt_experts(model: PreTrainedModel, layers: nn.Module, *, rank: int, scale: float) -> None:
    """On the meta device, before sharding."""
    compute = model.config._experts_implementation
    modules: list[Any] = list(expert_modules(layers))
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                num, outputs, inputs = parameter.shape
                for end, shape in ((A, (num, rank, inputs)), (B, (num, outputs, rank))):
                    module.register_parameter(f"{name}{end}", nn.Parameter(torch.empty(shape, device="meta")))
        module.adapter_scale, module.adapter_compute = scale, compute
    model.config._experts_implementation = NAME


def is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "adapter_scale")


def adapted_experts(module: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What the chosen experts make of each token, weighted, [T, D]."""
    index_S, order_S = index_TK.flatten().sort(stable=True)
    rows = _Rows(module, index_S, module.num_experts)
    up_SO = rows.linear("gate_up_proj" if module.has_gate else "up_proj", hidden_TD[order_S // index_TK.shape[1]])
    out_SD = rows.linear("down_proj", module._apply_gate(up_SO) if module.has_gate else module.act_fn(up_SO))
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    chosen_TKD = out_SD[place_S].unflatten(0, index_TK.shape)
    return (chosen_TKD * weight_TK[..., None]).sum(1).to(hidden_TD.dtype)


class _Rows:
    """Rows that are sorted by their experts."""

    def __init__(self, module: Any, index_S: Tensor, num_experts: int):
        self._module, self._index_S = module, index_S
        each_E = torch.arange(num_experts, device=index_S.device)
        self._ends_E = torch.searchsorted(index_S, each_E, right=True, out_int32=True)

    def linear(self, name: str, x_SI: Tensor) -> Tensor:
        weight, a_ERI, b_EOR = (getattr(self._module, f"{name}{end}") for end in ("", A, B))
        low_SR = self._product(x_SI, a_ERI)
        out_SO = self._product(x_SI, weight) + self._module.adapter_scale * self._product(low_SR, b_EOR)
        return out_SO + getattr(self._module, f"{name}_bias")[self._index_S] if self._module.has_bias else out_SO

    def _product(self, x_SI: Tensor, weight_EOI: Tensor) -> Tensor:
        if self._module.adapter_compute == "batched_mm":
            return torch.bmm(weight_EOI[self._index_S], x_SI[..., None])[..., 0]
        return _grouped_mm(x_SI, weight_EOI.mT, self._ends_E)


def folded(weight_EOI: Tensor, a_ERI: Tensor, b_EOR: Tensor, scale: float) -> Tensor:
    """In float32."""
    return weight_EOI.float() + scale * (b_EOR.float() @ a_ERI.float())


def as_published(model: PreTrainedModel, prefix: str, factors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A matrix of two dimensions for each projection of each expert, under the names of the family's checkpoints, which
    engines pack. `factors` are those of one module, whole, by name; gate and up have the same A."""
    for end in (A, B):
        stacked = {name.removesuffix(end): factor for name, factor in factors.items() if name.endswith(end)}
        if end == A and "gate_up_proj" in stacked:
            stacked["gate_up_proj"] = torch.cat([stacked["gate_up_proj"]] * 2, dim=1)
        named = {f"{prefix}.{name}": factor for name, factor in stacked.items()}
        for name, tensor in revert_weight_conversion(model, named).items():
            yield f"{name.removesuffix('.weight')}.{end[1:]}.weight", tensor


ALL_EXPERTS_FUNCTIONS.register(NAME, adapted_experts)
