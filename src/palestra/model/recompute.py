"""What a forward keeps for its backward: everything, what is dear to compute, or where each layer began; here or on the
host.

Applied to decoder layers before they are sharded. None of it changes a number: a layer that is computed again computes
the same, collectives included, as every rank does it at the same place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")
_ATTENTION = "attention"  # in the names of all fused kernels, whoever has them
_COLLECTIVES = ("_c10d_functional", "c10d", "c10d_functional")


def keep_less(layers: list[nn.Module], *, recompute: Recompute, offload: bool) -> None:
    """`selective` keeps matrix products, attention and what came from other ranks, and computes the rest again: also
    products of experts, whose rows are many and which some families change in place. `full` keeps a layer's input. With
    `offload` what is kept waits in host memory, pinned where there is a GPU.
    """
    for layer in layers:
        layer.forward = _forward(layer.forward, recompute=recompute, offload=offload)


def _forward(forward: Callable[..., Any], *, recompute: Recompute, offload: bool) -> Callable[..., Any]:
    again = forward
    if recompute != "none":
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
        options = contexts if recompute == "selective" else {}
        again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **options)
    if not offload:
        return again

    def away(*given: Any, **named: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return again(*given, **named)

    return away


def _policy(context: Any, op: Any, *given: Any, **named: Any) -> CheckpointPolicy:
    space, _, name = str(getattr(op, "name", lambda: op)()).partition("::")
    base = name.partition(".")[0]
    if space in _COLLECTIVES or _ATTENTION in base or base in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
