"""What of a model tensor parallelism splits, and a proof that it holds.

transformers' configurations say which linear layers are split, and how. Whether all that is needed for right gradients
follows from that is not believed but read off the graph of a forward pass of the family's own code, on the meta device
with this rank's shapes. Going back from where split features are summed, one may only come to where hidden states
enter, to the split layers themselves, and to whole parameters that are used by each rank's heads (norms of queries,
sinks): those have their gradients summed over the ranks. Anything else means a wrong gradient, and is refused.
"""

import copy
import math
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from palestra.config.schema import nearest_divisors
from palestra.core.errors import UserError
from palestra.model.expert_adapters import adapted_experts, expert_modules, is_adapted
from palestra.model.tensor import (
    IN,
    LATENT,
    OUT,
    SPLIT,
    Axis,
    Door,
    Pretended,
    cut_parameters,
    share_latent,
    share_parameters,
    split_linear,
)

NAME, PARTED = "palestra_tensor_shapes", "palestra_parted_shapes"
_PROBE_TOKENS = 6
_ENTRIES = {"_EnterBackward", "_EnterLastBackward", "_PartBackward"}
_EXITS = {"_LeaveBackward", "_GatherBackward"}
_LORA_OF = {OUT: "lora_B", IN: "lora_A"}  # which of an adapter's two is split as the layer that it lies beside
_ATTENTION = ("num_key_value_groups", "head_dim", "is_causal")  # what a family's attention has, any of it


@dataclass(frozen=True)
class Split:
    """By names in the decoder. `shared` are whole parameters, by module, that each rank uses for its own heads, and
    whether they have a value for each head. `heads` are the query heads of one rank, of the layer that has fewest."""

    styles: dict[str, str] = field(default_factory=dict)
    shared: dict[str, dict[str, bool]] = field(default_factory=dict)
    heads: int = 0


def styles_of(model: PreTrainedModel) -> dict[str, str]:
    """The linear layers of the decoder's layers that transformers' plan splits, and how. Experts that go through the
    registry are no linear layers: they are split by `experts`."""
    plan: dict[str, str] = getattr(model.get_decoder().config, "base_model_tp_plan", None) or {}
    found: dict[str, str] = {}
    for name, module in model.get_decoder().named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "")
        if name.startswith("layers.") and isinstance(module, nn.Linear) and (style in SPLIT or style == LATENT):
            found[name] = style
    return found


def split_parameters(model: PreTrainedModel, styles: dict[str, str]) -> Iterator[nn.Parameter]:
    """Those that a rank has a part of."""
    for name, style in styles.items():
        if style in SPLIT:
            for key, parameter in model.get_decoder().get_submodule(name).named_parameters(recurse=False):
                if key != "bias" or SPLIT[style] == OUT:
                    yield parameter


def num_whole(model: PreTrainedModel) -> int:
    """Parameters of the decoder's layers that every rank of a tensor axis has: neither split, nor of experts."""
    layers: Any = model.get_decoder().layers
    apart = {id(parameter) for parameter in split_parameters(model, styles_of(model))}
    apart |= {id(parameter) for module in expert_modules(layers) for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in layers.parameters() if id(parameter) not in apart)


def split_of(config: PretrainedConfig, size: int) -> Split:
    """For `size` ranks. Errors: UserError in words, for a family without a plan, or one that it does not hold for."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=NAME
        ).eval()
    model.config._experts_implementation = NAME
    styles = styles_of(model)
    if not any(style in SPLIT for style in styles.values()):
        raise UserError(
            f"train.tensor_parallel={size}: transformers has no plan for tensor parallelism of {type(model).__name__}; "
            "set it to 1, and raise train.shard, train.context_parallel or train.expert_parallel instead"
        )
    _require_divisors(model, styles, size)
    apply(model, Split(styles), Pretended(0, size))
    probe = _Probe(model)
    try:
        with _Attending(probe):
            ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="meta")
            positions = torch.arange(_PROBE_TOKENS, device="meta").unsqueeze(0)
            out = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return Split(styles, probe.shared(out.grad_fn), probe.heads)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"train.tensor_parallel={size}: {type(model).__name__} cannot be split as transformers' plan says "
            f"({' '.join(str(error).split())[:300]}); set it to 1"
        ) from error


def _require_divisors(model: PreTrainedModel, styles: dict[str, str], size: int) -> None:
    """Errors: UserError with the nearest size that divides all."""
    sizes = _sizes(model, styles)
    for what, number in sizes.items():
        if number % size:
            fits = nearest_divisors(math.gcd(*sizes.values()), size)
            raise UserError(
                f"train.tensor_parallel={size} does not divide the model's {number} {what}; set it to {fits}"
            )


def tensor_divisor(model: PreTrainedModel) -> int:
    """What all sizes of a tensor axis divide; 1 for a family without a plan."""
    return math.gcd(*_sizes(model, styles_of(model)).values()) or 1


def _sizes(model: PreTrainedModel, styles: dict[str, str]) -> dict[str, int]:
    """Heads, where attention is split by them, and features, by what they are."""
    decoder, text = model.get_decoder(), model.config.get_text_config()
    sizes: dict[str, int] = {}
    for name, style in styles.items():
        linear: Any = decoder.get_submodule(name)
        parent = decoder.get_submodule(name.rpartition(".")[0])
        if style == "colwise" and any(hasattr(parent, attribute) for attribute in _ATTENTION):
            sizes["attention heads"] = text.num_attention_heads
            sizes["key and value heads"] = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        if style in SPLIT:
            of = "outputs" if SPLIT[style] == OUT else "inputs"
            what = f"{of} of {re.sub(r'[.][0-9]+', '.*', name)}"
            sizes[what] = math.gcd(sizes.get(what, 0), linear.weight.shape[SPLIT[style]])
    return sizes


def apply(model: PreTrainedModel, split: Split, axis: Axis, mesh: DeviceMesh | None = None) -> None:
    """Split a model on the meta device, adapters included. Without a mesh: as if the axis were there."""
    decoder = model.get_decoder()
    doors: dict[str, Door] = {}
    for name, style in split.styles.items():
        if style == LATENT:
            share_latent(decoder.get_submodule(name), axis, model.config.get_text_config().qk_rope_head_dim)
            continue
        block = name.rpartition(".")[0]
        for linear, is_within in _linears(decoder.get_submodule(name), style):
            where = f"{block}/{name}" if is_within else block
            doors.setdefault(where, Door(axis, decoder.get_submodule(block)))
            cut_parameters(linear, style, axis, mesh)
            split_linear(linear, style, axis, doors[where])
    for name, parameters in split.shared.items():
        share_parameters(decoder.get_submodule(name), parameters, axis)


def _linears(module: nn.Module, style: str) -> Iterator[tuple[nn.Module, bool]]:
    """A linear layer; of an adapted one the frozen layer, and what of the adapter is split as it is."""
    base: Any = getattr(module, "base_layer", None)
    if base is None:
        yield module, False
        return
    yield base, False
    adapters: Any = getattr(module, _LORA_OF[SPLIT[style]])
    yield from ((adapter, True) for adapter in adapters.values())


# --- the proof


class _Probe:
    """What one forward on the meta device says."""

    def __init__(self, model: PreTrainedModel):
        self._model, self._heads = model, set[int]()
        self._by_head: set[int] = set()
        self._owners: dict[int, list[tuple[str, str]]] = {}
        for owner, module in model.get_decoder().named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append((owner, name))

    def attend(self, query: Tensor, key: Tensor, sinks: Tensor | None) -> None:
        heads, kv_heads = query.shape[1], key.shape[1]
        self._heads.add(heads)
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads for {kv_heads} key heads on each rank")
        if sinks is not None and len(sinks) != heads:
            if id(sinks) not in self._owners:
                raise ValueError(f"{len(sinks)} sinks that are no parameter, for {heads} heads")
            self._by_head.add(id(sinks))

    @property
    def heads(self) -> int:
        if not self._heads:
            raise ValueError("its attention does not go through transformers' registry")
        return min(self._heads)

    def shared(self, end: Any) -> dict[str, dict[str, bool]]:
        """Errors: ValueError for gradients that would be wrong."""
        split = {id(parameter) for parameter in split_parameters(self._model, styles_of(self._model))}
        whole: set[int] = set()
        exits = [node for node in _behind(end, frozenset()) if node.name() in _EXITS]
        for node in _behind(end, _EXITS):
            if node.name() in _ENTRIES:
                raise ValueError("a rank's own features are used as if they were those of all")
            whole |= _parameters(node)
        used: set[int] = set()
        for leaving in exits:
            for following, _ in leaving.next_functions:
                for node in _behind(following, _ENTRIES) if following is not None else ():
                    used |= _parameters(node)
        used -= split
        found: dict[str, dict[str, bool]] = {}
        for key in used:
            names = self._owners.get(key, [])
            if len(names) != 1 or not names[0][0].startswith("layers.") or key in whole:
                where = ".".join(names[0]) if names else "a parameter outside of the decoder"
                raise ValueError(f"hidden states reach each rank's own heads past the plan, as far back as {where}")
            owner, name = names[0]
            found.setdefault(owner, {})[name] = key in self._by_head
        return dict(sorted(found.items()))


def _behind(end: Any, stops: Set[str]) -> Iterator[Any]:
    """Nodes that gradients come to from `end`, itself included; those that are called so are the last on their way."""
    known, waiting = {end}, [end]
    while waiting:
        node = waiting.pop()
        yield node
        if node.name() in stops:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in known:
                known.add(following)
                waiting.append(following)


def _parameters(node: Any) -> set[int]:
    variable = getattr(node, "variable", None)
    return set() if variable is None else {id(variable)}


class _Attending:
    """Attention and experts of the probe's model tell it while this is entered."""

    probe: _Probe | None = None

    def __init__(self, probe: _Probe):
        self._probe = probe

    def __enter__(self) -> None:
        _Attending.probe = self._probe

    def __exit__(self, *raised: Any) -> None:
        _Attending.probe = None


class _Attention(Function):
    """Shapes and gradients' ways, no values: [1, T, H, D] of [1, H, T, D] and [1, G, T, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
    sinks = others.get("s_aux")
    if _Attending.probe is not None:
        _Attending.probe.attend(query, key, sinks)
    return _Attention.apply(query, key, value, sinks), None


def _experts(module: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Each token's part of the axis is computed elsewhere; gradients go to hidden states and weights."""
    return hidden_TD * weight_TK.sum(-1, keepdim=True)


def part_experts(model: PreTrainedModel, axis: Axis) -> None:
    """For a count of what is kept: experts compute this rank's part of the tokens, as transformers does."""
    for module in expert_modules(model):
        module.parted = axis  # pyright: ignore[reportArgumentType]
        model.config._experts_implementation = PARTED


def _parted_experts(module: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    whole = adapted_experts if is_adapted(module) else ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    part = whole(module, *(module.parted.part(x) for x in (hidden_TD, index_TK, weight_TK)))
    return module.parted.gather(part, len(hidden_TD))


ALL_EXPERTS_FUNCTIONS.register(PARTED, _parted_experts)
AttentionInterface.register(NAME, _attention)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


def require_heads(split: Split, context: int) -> None:
    """Errors: UserError, if ulysses cannot deal out the heads of one rank."""
    if split.heads % context:
        raise UserError(
            f"train.context_parallel={context} does not divide the {split.heads} attention heads that "
            f"train.tensor_parallel leaves each rank; set it to {nearest_divisors(split.heads, context)}, or set "
            "train.context_kind=ring"
        )
