"""Low-rank adapters by peft: put them on a model, and take them out again, alone or folded into the weights.

Legend: R rank, I inputs and O outputs of a linear layer. With adapter A_RI and B_OR it computes
x (W_OI + scale B_OR A_RI)^T. B begins as zeros: version 0 is the model itself.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from palestra.config.schema import Lora
from palestra.core.errors import UserError
from palestra.model.expert_adapters import TARGET, A, B, adapt_experts, as_published, why_not
from palestra.model.expert_adapters import folded as folded_experts
from palestra.model.places import Places
from palestra.wire.weights.files import ADAPTER_CONFIG, ADAPTER_TENSORS

if TYPE_CHECKING:  # half a second that runs without adapters do not wait for
    from peft import LoraConfig

_NAME = "default"  # peft's own for the only adapter
_A, _B, _BASE = f".lora_A.{_NAME}.", f".lora_B.{_NAME}.", ".base_layer."


@dataclass(frozen=True)
class Adapter:
    """What is the same in every version. `targets` end the names of the adapted layers."""

    lora: Lora
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.lora.alpha / (math.sqrt(self.lora.rank) if self.lora.use_rslora else self.lora.rank)

    def config_json(self, base: str) -> bytes:
        """peft's description, which vLLM reads too."""
        config = _peft_config(self.lora, self.targets)
        config.base_model_name_or_path, config.inference_mode = base, True
        return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted).encode() + b"\n"


def add_adapter(model: PreTrainedModel, lora: Lora, *, dtype: torch.dtype) -> Adapter:
    """Freeze the model, in `dtype`: it needs no masters. Trainable float32 adapters beside its linear layers.

    On the meta device, before sharding; `begin_adapter` fills them.
    Errors: UserError for targets that the model does not have, or that cannot be adapted.
    """
    from peft import inject_adapter_in_model

    adapter = Adapter(lora, targets_of(model, lora))
    model.requires_grad_(False)
    layers = _layers(model)  # not the model: of some families peft would adapt experts in its place
    if dense := tuple(_adapted(layers, adapter.targets)):
        inject_adapter_in_model(_peft_config(lora, dense), layers, low_cpu_mem_usage=True)
    if TARGET in adapter.targets:
        adapt_experts(model, layers, rank=lora.rank, scale=adapter.scale)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return adapter


@torch.no_grad()
def begin_adapter(model: nn.Module, *, seed: int, device: torch.device) -> None:
    """The same on every rank, however it is sharded: A as peft draws it, from a generator of its own, and B zero."""
    generator, places = torch.Generator().manual_seed(seed), Places(model)
    for name, parameter in list(model.named_parameters()):
        if _A in name or name.endswith(A):
            bound = 1 / math.sqrt(parameter.shape[-1])  # Kaiming's, with a = sqrt(5)
            places.give(name, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator), device)
        elif is_adapter(name):
            places.give(name, torch.zeros(parameter.shape), device)


def is_adapter(name: str) -> bool:
    """Of a parameter."""
    return _A in name or _B in name or name.endswith((A, B))


def plain_name(name: str) -> str:
    """Of a weight, without the adapter that lies beside it."""
    return name.replace(_BASE, ".")


def _peft_config(lora: Lora, targets: tuple[str, ...]) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(targets),
        use_rslora=lora.use_rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def targets_of(model: PreTrainedModel, lora: Lora) -> tuple[str, ...]:
    """Ends of names. Errors: UserError for those that the model does not have, or that cannot be adapted."""
    linear = list(_linear_layers(_layers(model)))
    if lora.targets == "all-linear":
        return tuple(sorted({name.rpartition(".")[2] for name in linear}))
    for target in lora.targets:
        if target == TARGET:
            if why := why_not(_layers(model)):
                raise UserError(f"model.lora.targets: {type(model).__name__} has {why}; leave {TARGET} out")
        elif not any(_ends_with(name, target) for name in linear):
            raise UserError(f"model.lora.targets: {_why_not(model, target)}")
    return lora.targets


def _why_not(model: PreTrainedModel, target: str) -> str:
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in _linear_layers(_layers(model))}))
    parameters = [name for name, _ in model.named_parameters()]
    if any(
        f".experts.{target}." in f"{name}." or f".{target}." in f"{name}." for name in parameters if "expert" in name
    ):
        return (
            f"{target} are routed experts of {type(model).__name__}, which are adapted together or not at all: say "
            f"{TARGET} (engines have a kernel for them on GPUs only), or choose among {leaves}"
        )
    return f"{type(model).__name__} has no linear layer {target} in its decoder layers; choose among {leaves}"


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _linear_layers(layers: nn.Module) -> Iterator[str]:
    """Names in `layers`, without what decides where tokens go, and without experts that are modules each."""
    for name, module in layers.named_modules():
        is_left_out = ".experts." in name or "router" in name or name.endswith("gate")
        if isinstance(module, nn.Linear) and not is_left_out:
            yield name


def _adapted(layers: nn.Module, targets: tuple[str, ...]) -> list[str]:
    return [name for name in _linear_layers(layers) if any(_ends_with(name, target) for target in targets)]


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def iterate_adapter(model: PreTrainedModel, *, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors under peft's names, whole. A collective: every rank must iterate to the end."""
    of_experts: dict[str, Tensor] = {}  # of the module that is being read
    for name, tensor in model.state_dict().items():
        prefix, _, leaf = name.rpartition(".")
        if name.endswith((A, B)):
            of_experts[leaf] = whole(tensor).to(dtype)
            if len(of_experts) == 4:  # both factors of both matrices
                yield from ((f"base_model.model.{n}", t) for n, t in as_published(model, prefix, of_experts))
                of_experts = {}
        elif is_adapter(name):
            yield f"base_model.model.{name.replace(f'.{_NAME}.', '.')}", whole(tensor).to(dtype)


@torch.no_grad()
def fold(group: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a layer with the adapter inside the weights, under the names they have without one; float32.

    A collective: adapters are gathered, and with each the weight that it is added to.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in group.items():
        if is_adapter(name):
            continue
        plain = plain_name(name)
        folded[plain] = tensor
        if (a := group.get(f"{name}{A}")) is not None:
            factors = whole(tensor), whole(a), whole(group[f"{name}{B}"])
            folded[plain] = nn.Parameter(folded_experts(*factors, adapter.scale), requires_grad=False)
        if (a := group.get(name.replace(_BASE, _A))) is not None and _BASE in name and name.endswith("weight"):
            delta_OI = whole(group[name.replace(_BASE, _B)]).float() @ whole(a).float()
            folded[plain] = nn.Parameter(whole(tensor).float() + adapter.scale * delta_OI, requires_grad=False)
    return folded


def whole(tensor: Tensor) -> Tensor:
    """A collective, if it is sharded. No gradient flows into it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def write_adapter(directory: Path, tensors: dict[str, Tensor], adapter: Adapter, base: str) -> None:
    """In peft's layout."""
    directory.mkdir()
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / ADAPTER_TENSORS)
    (directory / ADAPTER_CONFIG).write_bytes(adapter.config_json(base))
