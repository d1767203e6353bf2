"""Where a model holds its tensors, and how they come there once they have memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from palestra.model.holdings import holding


class Places:
    """Of a model on the meta device, sharded or not: every module that has a tensor. Tied tensors stay one."""

    def __init__(self, model: Any):
        self._model = model
        self._held: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for key, tensor in own.items():
                    self._held.setdefault(id(tensor), []).append((own, key))

    def give(self, name: str, whole: Tensor, device: torch.device) -> None:
        """Memory on `device` for the tensor of that name, and in it this rank's share of `whole`. No collective."""
        old = self._model.get_parameter_or_buffer(name)
        if not old.is_meta:
            return  # tied, and there already
        new = _placed(share(whole, old), old, device)
        for own, key in self._held[id(old)]:
            own[key] = new


def _placed(part: Tensor, like: Tensor, device: torch.device) -> Tensor:
    local = part.to(device, like.dtype, copy=True, memory_format=torch.contiguous_format)
    if isinstance(like, DTensor):
        local = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    return nn.Parameter(local, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else local


def share(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is laid out as `like`, without communication; a view, where it is one run."""
    if not isinstance(like, DTensor):
        return whole
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None
    runs = holding(whole.shape, like.device_mesh.shape, like.placements, coordinate).runs
    for dim, of_dim in enumerate(runs):
        parts = [whole.narrow(dim, run.start, run.length) for run in of_dim] or [whole.narrow(dim, 0, 0)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return whole
