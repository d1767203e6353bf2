"""Products of decoder layers in float8, by torchao: `train.float8`.

Each row of activations, weights and gradients has a scale of its own, so that what a token becomes does not depend on
what else is in its pack. Weights, their gradients' sums and what is published keep their precision and names.
Experts are grouped products, and stay as they are, as do routers.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from palestra.core.errors import UserError

_NEEDED = (9, 0)  # compute capability; before it torch has no scales by row
_KIND = "Float8Linear"  # torchao's, a linear module
_MULTIPLE = 16  # of both widths of a matrix, as the hardware takes it


def require_float8(device: torch.device) -> None:
    """Errors: UserError, if this device has none."""
    where = "a CPU"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found >= _NEEDED:
            return
        where = f"compute capability {found[0]}.{found[1]}"
    raise UserError(
        f"train.float8=true needs a GPU of compute capability 9.0 (H100) or later, but here is {where}; leave it out"
    )


def use_float8(layers: Iterable[nn.Module], *, keep: Collection[nn.Module] = (), emulate: bool = False) -> int:
    """From now on the linear modules of `layers` but `keep` multiply in float8; returns how many. Before sharding.

    `emulate`: by rounding to float8 and multiplying as before, which any device can. Errors: UserError without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError("train.float8=true needs torchao; install palestra[float8]") from error
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    num = 0
    for layer in layers:
        fitting = {module for module in layer.modules() if _is_fitting(module) and module not in keep}
        convert_to_float8_training(
            layer, module_filter_fn=lambda module, _, those=fitting: module in those, config=config
        )
        num += len(fitting)
    return num


@contextmanager
def unrounded(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within, what `use_float8` changed multiplies as before: for a comparison of two ways to compute the same. A hair
    between them becomes a step of float8, and with it a router chooses other experts."""
    modules = [module for layer in layers for module in layer.modules() if type(module).__name__ == _KIND]
    for module in modules:
        module.forward = partial(nn.Linear.forward, module)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _is_fitting(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
