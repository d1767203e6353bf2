"""What a decoder layer keeps for its backward pass, and what is computed again or kept elsewhere.

`full` keeps a layer's input. `selective` keeps besides what costs most to compute: matrix products, attention and what
was fetched from other ranks; all that lies between is computed again from it. Both compute the very same numbers again.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from palestra.model.offload import Keeper, Offload, Stay, Store

PRODUCTS = ("mm", "addmm", "_grouped_mm")  # not bmm: where no kernel does attention, its scores are of that kind
_FETCHED = frozenset(
    f"_c10d_functional::{name}" for name in ("all_to_all_single", "all_reduce", "all_gather_into_tensor")
)
_KEPT = (
    _FETCHED
    | {f"aten::{name}" for name in PRODUCTS}
    | {
        "aten::_scaled_mm",
        "transformers::grouped_mm_fallback",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "torch_attn::_varlen_attn",
        "palestra::ring",
    }
)


@dataclass(frozen=True)
class Activations:
    """`offload`: what is kept waits in host memory. `compile`: each layer by torch.compile."""

    recompute: Literal["none", "selective", "full"] = "none"
    offload: bool = False
    compile: bool = False


PLAIN = Activations()


def keep_activations(layers: Sequence[nn.Module], activations: Activations, device: torch.device) -> None:
    """From now on each of `layers` keeps only that. Before or after they are sharded."""
    if activations == PLAIN:
        return
    keeper: Keeper = Offload(device) if activations.offload else Stay()
    for layer in layers:
        layer.forward = _Frugal(layer, activations, keeper)


class _Frugal:
    """A layer's forward. Around it are FSDP's hooks: weights are gathered when it is computed again."""

    def __init__(self, layer: nn.Module, activations: Activations, keeper: Keeper):
        self._layer, self._keeper, self._recompute = layer, keeper, activations.recompute
        self._plain = layer.forward
        self._forward = torch.compile(self._plain, dynamic=True) if activations.compile else self._plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        with self._keeper.run(self._layer, kwargs) as store:
            return _WAYS[self._recompute](self._forward, store)(*args, **kwargs)


def _none(forward: Callable[..., Any], store: Store) -> Callable[..., Any]:
    return forward


def _full(forward: Callable[..., Any], store: Store) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in a layer


def _selective(forward: Callable[..., Any], store: Store) -> Callable[..., Any]:
    kept: deque[_Kept] = deque()

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return _Keep(kept, store), _Reuse(kept)

    return partial(_full(forward, store), context_fn=contexts)


_WAYS = {"none": _none, "full": _full, "selective": _selective}


@dataclass
class _Kept:
    """What an operation returned. Its tensors are apart from the graph, which they are to be a part of once more."""

    name: str
    out: Any


class _Keep(TorchDispatchMode):
    """Keeps, in order, what these operations return. What the layer goes on to change in place is copied first."""

    def __init__(self, kept: deque[_Kept], store: Store):
        super().__init__()
        self._kept, self._store = kept, store
        self._by_address: dict[int, _Kept] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable and self._by_address:
            for tensor in _written(func, args, kwargs):
                self._copy(tensor)
        out = func(*args, **kwargs)
        if (name := func.name()) in _KEPT:
            if name in _FETCHED:
                torch.ops._c10d_functional.wait_tensor(out)  # it may leave the device before anyone else waits
            kept = _Kept(name, tree_map_only(Tensor, Tensor.detach, out))
            self._kept.append(kept)
            self._by_address |= {_address(leaf): kept for leaf in tree_leaves(kept.out) if isinstance(leaf, Tensor)}
        return out

    def _copy(self, written: Tensor) -> None:
        address = _address(written)
        kept = self._by_address.pop(address, None)
        if kept is not None:
            kept.out = tree_map_only(Tensor, lambda x: x.clone() if _address(x) == address else x, kept.out)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._by_address.clear()
        for kept in self._kept:
            kept.out = tree_map_only(Tensor, lambda x: partial(self._store.unpack, self._store.pack(x)), kept.out)


class _Reuse(TorchDispatchMode):
    """Gives them back instead of computing."""

    def __init__(self, kept: deque[_Kept]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.name()) not in _KEPT:
            return func(*args, **(kwargs or {}))
        kept = self._kept.popleft()
        if kept.name != name:
            raise RuntimeError(f"a layer computed {kept.name} in its forward pass, and {name} when computing it again")
        return tree_map_only(partial, lambda unpack: unpack(), kept.out)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Arguments that an operation changes."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if type(leaf) is Tensor)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
