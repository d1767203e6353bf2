"""Take a model apart on the meta device, where it has shapes and no bytes: `python -m palestra.model.dissect MODEL`.

MODEL is the `model` section of a run, as JSON. No family is known here: parameters are counted module by module, and
what a forward pass keeps is read off one of the family's own code, with an attention that keeps what flash kernels do.
Legend: T tokens of the probe, H query heads, G key and value heads, D width of a head or of the model, S choices of
experts, E experts, I width of one.
"""

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from palestra.config.schema import Lora, Model
from palestra.core.errors import UserError
from palestra.core.process import exit_with
from palestra.model.anatomy import Anatomy, Attention, Layer, newton_schulz_flops
from palestra.model.expert_adapters import TWICE_PUBLISHED, expert_modules
from palestra.model.lora import add_adapter, is_adapter
from palestra.model.policy import Policy, require_softmax_attention
from palestra.model.recompute import PRODUCTS
from palestra.model.tensor import IN, SPLIT, Pretended
from palestra.model.tensor_plan import apply, part_experts, split_of, split_parameters, tensor_divisor

NAME = "palestra_shapes"
PROBE_TOKENS = 512
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")


def dissect(config: PretrainedConfig, dtype: torch.dtype, lora: Lora | None = None) -> Anatomy:
    """Errors: UserError for a family that cannot be packed, or whose forward needs more than shapes, or without the
    layers to be adapted."""
    model = _on_meta(config, dtype)
    require_softmax_attention(model)
    if lora is not None:
        add_adapter(model, lora, dtype=dtype)
        nn.Module.to(model, dtype)  # as FSDP hands out what has masters
    layers = Policy(model, head_chunk_tokens=1).decoder_layers
    kept = _keep(model, layers)
    divisor, are_heads_split, parts = _parts(config, dtype, lora, kept)
    head: Any = model.get_output_embeddings()
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    text = model.config.get_text_config()
    return Anatomy(
        architecture=type(model).__name__,
        layers=tuple(
            msgspec.structs.replace(
                _layer(layer, _attention(text, index), top_k_of(text), model, kept[index]), **parts[index]
            )
            for index, layer in enumerate(layers)
        ),
        root=_num(parameter for parameter in model.parameters() if id(parameter) not in in_layers),
        head=head.weight.numel(),
        vocab_size=text.vocab_size,
        width=head.weight.shape[1],
        num_experts=max((module.num_experts for module in _experts(model)), default=0),
        num_experts_per_token=top_k_of(text) if any(True for _ in _experts(model)) else 0,
        is_tied=head.weight is _embeddings(model).weight,
        itemsize=dtype.itemsize,
        tensor_divisor=divisor,
        are_heads_split=are_heads_split,
    )


def _on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=NAME).eval()


def _experts(module: nn.Module) -> Iterator[Any]:
    return expert_modules(module)


def _embeddings(model: PreTrainedModel) -> Any:
    return model.get_input_embeddings()


def top_k_of(text: Any) -> int:
    """Experts of a token, as the families' configurations name it; 0 for a dense model."""
    found = next((getattr(text, name) for name in _TOP_K if getattr(text, name, None)), 0)
    return max(found) if isinstance(found, list | tuple) else found


def _attention(text: Any, index: int) -> Attention:
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    parts = [getattr(text, f"qk_{name}_head_dim", None) for name in ("nope", "rope")]  # latent attention
    kinds = getattr(text, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else getattr(text, "use_sliding_window", True)
    return Attention(
        heads=heads,
        qk_width=parts[0] + parts[1] if parts[0] else width,
        v_width=getattr(text, "v_head_dim", None) or width,
        window=getattr(text, "sliding_window", None) if slides else None,
    )


# --- parameters


def _layer(layer: nn.Module, attention: Attention, top_k: int, model: PreTrainedModel, kept: "_Kept") -> Layer:
    experts = {id(p): module for module in _experts(layer) for p in module.parameters()}
    total = routed = matrices = products = orthogonal_flops = 0
    met = 0.0
    for name, parameter in layer.named_parameters():
        if is_adapter(name):
            continue
        module, size = experts.get(id(parameter)), parameter.numel()
        share = top_k / module.num_experts if module is not None else 1.0
        is_matrix = parameter.dim() == (2 if module is None else 3)
        total += size
        met += size * share
        routed += size if module is not None else 0
        if is_matrix:
            products += int(size * share)
            matrices += size
            orthogonal_flops += _orthogonal_flops(name, module, parameter)
    of_experts = _num(p for p in _adapters(layer) if id(p) in experts)
    width = model.get_output_embeddings().weight.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
    return Layer(
        parameters=total,
        experts=routed,
        matrices=matrices,
        met=round(met),
        products=products,
        attention=attention,
        input_bytes=width * kept.itemsize,
        saved_bytes=kept.saved / kept.tokens,
        product_bytes=kept.products / kept.tokens + attention.heads * (attention.v_width * kept.itemsize + 4),
        routed_bytes=top_k * width * kept.itemsize if experts else 0.0,
        adapters=_num(_adapters(layer)) - of_experts,
        expert_adapters=of_experts,
        twice_published=_num(p for name, p in layer.named_parameters() if name.endswith(TWICE_PUBLISHED)),
        orthogonal_flops=orthogonal_flops,
    )


def _adapters(layer: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in layer.named_parameters() if is_adapter(name))


def _num(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _orthogonal_flops(name: str, experts: Any, parameter: Tensor) -> int:
    """Of every expert's matrix for itself; gate and up are two of them in one."""
    rows, columns = parameter.shape[-2:]
    num = 1 if experts is None else parameter.shape[0]
    if experts is not None and experts.has_gate and name.endswith("gate_up_proj"):
        num, rows, columns = (2 * num, rows, columns // 2) if experts.is_transposed else (2 * num, rows // 2, columns)
    return num * newton_schulz_flops(rows, columns)


# --- what a forward pass keeps


class _Kept:
    """Bytes that one layer leaves for the backward pass, each storage once; those of parameters are not its own."""

    def __init__(self, tokens: int, itemsize: int):
        self.tokens, self.itemsize = tokens, itemsize
        self.saved = self.products = 0


def _parts(
    config: PretrainedConfig, dtype: torch.dtype, lora: Lora | None, kept: list["_Kept"]
) -> tuple[int, bool, list[dict[str, Any]]]:
    """What sizes of a tensor axis divide, whether heads are split, and what an axis divides of each layer.

    A rank of n keeps a + b / n: what b is, a second forward says, as if there were the fewest ranks that divide.
    """
    one = _on_meta(config, dtype)
    divisor = tensor_divisor(one)
    size = next((n for n in range(2, divisor + 1) if divisor % n == 0), 0)
    try:
        split = split_of(config, size) if size else None
    except UserError:  # its plan does not hold: only a run that asks for it is refused
        split = None
    if split is None:
        return 1, False, [{} for _ in kept]
    layers = Policy(one, head_chunk_tokens=1).decoder_layers
    ours = {id(parameter) for parameter in split_parameters(one, split.styles)}
    whole_split = [_num(p for p in layer.parameters() if id(p) in ours) for layer in layers]
    if lora is not None:
        add_adapter(one, lora, dtype=dtype)
        nn.Module.to(one, dtype)
    adapters = [_num(_adapters(layer)) for layer in layers]
    apply(one, split, Pretended(0, size))
    part_experts(one, Pretended(0, size))
    text, found = one.config.get_text_config(), list[dict[str, Any]]()
    is_by_head = split.heads < _attention(text, 0).heads
    for index, (layer, whole, part) in enumerate(zip(layers, kept, _keep(one, layers), strict=True)):
        share = size / (size - 1) / whole.tokens  # b of one token
        attention = _attention(text, index)
        by_head = attention.heads * (attention.v_width * whole.itemsize + 4) if is_by_head else 0
        found.append(
            {
                "split": whole_split[index],
                "split_adapters": (adapters[index] - _num(_adapters(layer))) * size // (size - 1),
                "split_saved_bytes": share * (whole.saved - part.saved),
                "split_product_bytes": share * (whole.products - part.products) + by_head,
                "sums": sum(
                    name.startswith(f"layers.{index}.") and SPLIT.get(style) == IN
                    for name, style in split.styles.items()
                ),
            }
        )
    return divisor, is_by_head, found


class _Products(TorchDispatchMode):
    """Counts the outputs of matrix products into `into`."""

    def __init__(self):
        super().__init__()
        self.into: _Kept | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = _grouped(*args[:2]) if name == "_grouped_mm" else func(*args, **(kwargs or {}))
        if self.into is not None and name in PRODUCTS:
            self.into.products += out.nbytes
        return out


def _grouped(rows_SD: Tensor, weights_EDI: Tensor) -> Tensor:
    """Its shape [S, I] in any precision, where torch's own on the meta device has bfloat16 alone."""
    return rows_SD.new_empty(rows_SD.shape[0], weights_EDI.shape[2])


class _Shapes(Function):
    """Attention as far as shapes go. Keeps queries, keys, values, output, and a sum [T, H] in float32."""

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor) -> Tensor:
        out_THD = v_GTD.new_empty(q_HTD.shape[2], q_HTD.shape[1], v_GTD.shape[3])
        sums = q_HTD.new_empty(q_HTD.shape[1:3], dtype=torch.float32)
        copies = (x.clone(memory_format=torch.contiguous_format) for x in (q_HTD, k_GTD, v_GTD))
        ctx.save_for_backward(*copies, out_THD, sums)
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def _shapes(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
    return _Shapes.apply(query, key, value).unsqueeze(0), None


AttentionInterface.register(NAME, _shapes)


def _keep(model: PreTrainedModel, layers: list[nn.Module], tokens: int = PROBE_TOKENS) -> list[_Kept]:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = [_Kept(tokens, next(model.parameters()).dtype.itemsize) for _ in layers]
    known: dict[int, torch.UntypedStorage] = {}  # keeps them, so that no address is used twice
    products = _Products()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if products.into is not None and storage._cdata not in own and storage._cdata not in known:
            known[storage._cdata] = storage
            products.into.saved += storage.nbytes()
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    positions = torch.arange(tokens, device="meta").unsqueeze(0)
    with _watch(layers, kept, products), saved_tensors_hooks(pack, lambda tensor: tensor), products:
        try:
            model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise UserError(
                f"{type(model).__name__} cannot be planned: its forward needs more than shapes ({error})"
            ) from error
    return kept


@contextmanager
def _watch(layers: list[nn.Module], kept: list[_Kept], products: _Products) -> Iterator[None]:
    """Says into which layer's account things go while it runs."""

    def enter(account: _Kept) -> Any:
        def hook(*_: Any) -> None:
            products.into = account

        return hook

    def leave(*_: Any) -> None:
        products.into = None

    handles = [layer.register_forward_pre_hook(enter(account)) for layer, account in zip(layers, kept, strict=True)]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- as a program


def config_of(model: Model) -> PretrainedConfig:
    """Errors: UserError."""
    from palestra.model.build import new_config
    from palestra.model.load import read_config

    return new_config(model.build) if model.build is not None else read_config(model.path or "")


def main(model_json: str) -> int:
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    model = Model.model_validate_json(model_json)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[model.dtype]
    sys.stdout.buffer.write(msgspec.json.encode(dissect(config_of(model), dtype, model.lora)) + b"\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
