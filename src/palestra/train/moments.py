"""Where an optimizer's moments live: on the parameter's device, or in host memory, from where a step borrows them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 2**28  # of moments on the device at once, where they live in host memory


def local(tensor: Tensor) -> Tensor:
    """This rank's shard itself, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Home:
    """Of all moments of an optimizer. With `on_host` they are in host memory, pinned where that has a use."""

    def __init__(self, *, on_host: bool):
        self.on_host = on_host

    def zeros_like(self, parameter: Tensor) -> Tensor:
        """Sharded as the parameter is."""
        parameter = parameter.detach()
        if not self.on_host or parameter.device.type == "cpu":
            return torch.zeros_like(parameter)
        return torch.zeros_like(parameter, device="cpu", pin_memory=True)

    @contextmanager
    def borrow(self, moments: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
        """These shards, or parts of shards, on `device`; what is written to them is in the moments after `settle`."""
        if not self.on_host:
            yield list(moments)
            return
        borrowed = [moment.to(device, non_blocking=True, copy=True) for moment in moments]
        yield borrowed
        for moment, used in zip(moments, borrowed, strict=True):
            moment.copy_(used, non_blocking=True)

    def settle(self) -> None:
        """Wait for copies that are on their way home: the host may read them next."""
        if self.on_host and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def buckets(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters whose moments are borrowed together: all of them where nothing has to be borrowed."""
        bucket: list[Tensor] = []
        held = 0
        for parameter in parameters:
            size = local(parameter).nbytes
            if self.on_host and bucket and held + size > BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
            bucket.append(parameter)
            held += size
        if bucket:
            yield bucket
