"""Are an engine's weights those of a checkpoint, element by element? Only then may they be written one by one.

vLLM arranges some weights as its kernels want them, or computes others from them, after it has loaded them whole.
"""

from collections.abc import Iterator

from torch import nn
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.weight_utils import composed_weight_loader

from palestra.core.errors import UserError

_AS_LOADED = {UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON}
_PLAIN = UnquantizedLinearMethod, UnquantizedEmbeddingMethod
_COMPOSED = composed_weight_loader(lambda *_: None, lambda tensor: tensor).__qualname__


def require_in_place(model: nn.Module, *, kind: str = "sparse_nccl", loads_experts: bool = False) -> None:
    """Of a model that is loaded. `loads_experts`: those are loaded as ever, not written.

    Errors: UserError naming the first module where it is not so.
    """
    for name, module in model.named_modules():
        is_written = not (loads_experts and isinstance(getattr(module, "quant_method", None), FusedMoEMethodBase))
        if is_written and (reason := _obstacle(module)):
            raise UserError(
                f"sync.kind={kind} writes into the engine's weights where they lie, but {reason} in {name}; use "
                "sync.kind=nccl"
            )


def _obstacle(module: nn.Module) -> str:
    method = getattr(module, "quant_method", None)
    if isinstance(module, MLAAttention):
        return "vLLM computes further weights from those of latent attention"
    if isinstance(method, UnquantizedFusedMoEMethod):
        backend = method.unquantized_backend
        if method.moe_kernel is not None and backend not in _AS_LOADED:
            return f"vLLM rearranges experts for {backend.value} (engine.args.moe-backend=triton does not)"
    elif isinstance(method, QuantizeMethodBase) and not isinstance(method, _PLAIN):
        return f"{type(method).__name__} makes others of them"
    if composed := next(_composed(module), None):
        return f"vLLM transforms {composed} as it loads it"
    return ""


def _composed(module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters(recurse=False):
        if getattr(getattr(parameter, "weight_loader", None), "__qualname__", "") == _COMPOSED:
            yield name
