"""The engine's side of changes: vLLM's own `sparse_nccl` backend receives them and puts them in place.

They are refused, and nothing is touched, where the engine does not hold the very weights that they were taken from, or
where what arrived is not what was sent. An update may also name a directory, as `files` does: whatever was missed, a
whole version makes up for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.sparse_nccl_engine import (
    SparseNCCLWeightTransferEngine,
    SparseNCCLWeightTransferUpdateInfo,
)

from palestra.core.errors import InfrastructureError
from palestra.wire.weights.changes import Digest
from palestra.wire.weights.in_place import require_in_place
from palestra.wire.weights.vllm_engine import FilesUpdateInfo
from palestra.wire.weights.vllm_sent import LateEngine, Loader


@dataclass
class ChangesUpdateInfo(SparseNCCLWeightTransferUpdateInfo):
    """vLLM's, and what `changes.Kinship` has."""

    base: str
    mark: str
    digest: str


class Receiver(SparseNCCLWeightTransferEngine):
    update_info_cls = ChangesUpdateInfo


class ChangesEngine(LateEngine):
    """Holds one version whole. Between the first write of an update and its end it holds none: then a whole one must
    come before it goes on."""

    receives_by = Receiver

    def __init__(self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module):
        """Errors: UserError, if vLLM has made something else of the model's weights."""
        require_in_place(model)
        super().__init__(config, vllm_config, device, model)
        self._holds = ""  # the mark of what is in the model

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:  # type: ignore[override]
        """Errors: InfrastructureError naming the tensor, the module, or what the engine holds instead."""
        self._begin()
        if isinstance(update_info, FilesUpdateInfo):
            self._holds = ""
            self._take_apart()
            super().receive_weights(update_info)
            return
        assert isinstance(update_info, ChangesUpdateInfo)
        if not update_info.base or update_info.base != self._holds:
            raise InfrastructureError(
                f"changes from weights {update_info.base!r} to {update_info.mark!r} were sent, but the engine holds "
                f"{self._holds or 'none'!r}; publish a whole version"
            )
        self._change(update_info)
        self._mark, self._complete = update_info.mark, True

    def finish_weight_update(self) -> None:
        if self._coverage is not None:
            super().finish_weight_update()
        elif not self._complete:
            raise InfrastructureError("the update was finished before a version had been loaded")
        self._holds, self._complete = self._mark, False

    def _change(self, update_info: ChangesUpdateInfo) -> None:
        held, self._holds = self._holds, ""
        heard = _Heard(self._receiver.model_update_group, update_info.names)
        loader = _Checked(self.model, heard, update_info.digest)
        if self._receiver.model_update_group is not None:
            self._receiver.model_update_group = heard
        try:
            found = self._receive(update_info, loader)
        finally:
            self._receiver.model_update_group = heard.group
            self._holds = "" if loader.has_begun else held
        if not found:
            raise InfrastructureError("the engine put none of the changes anywhere; publish a whole version")


class _Heard:
    """A process group, and the digest of what came through it."""

    def __init__(self, group: Any, names: list[str]):
        self.group, self.digest = group, Digest(names)

    @property
    def device(self) -> torch.device:
        return self.group.device

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.group.broadcast(tensor, src=src, stream=stream)
        self.digest.update(tensor)


class _Checked(Loader):
    """vLLM loads when all has arrived: whether that is what was sent is known before anything is written."""

    def __init__(self, model: nn.Module, heard: _Heard, digest: str):
        super().__init__(model)
        self._heard, self._digest, self.has_begun = heard, digest, False

    def load_weights(self, weights: Any) -> None:
        if (found := self._heard.digest.text) != self._digest:
            raise InfrastructureError(
                f"changes arrived corrupted: their digest is {found[:12]}, {self._digest[:12]} was sent; publish a "
                "whole version"
            )
        self.has_begun = True
        super().load_weights(weights)
