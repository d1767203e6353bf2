"""The engine's side of versions that come from where they lie on the trainer's ranks: vLLM's own `nccl_m2n` backend.

It writes tensors that it holds as a checkpoint names them into the model where they are, each worker its own part; all
others come whole to every worker, and are loaded. Both count as loaded when they have arrived, and only then.

This has never run on a GPU; see `shards_sender.py`.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.m2n_common import M2NParamMeta, Placements
from vllm.distributed.weight_transfer.m2n_engine import M2NWeightTransferEngine

from palestra.core.errors import InfrastructureError
from palestra.wire.weights.in_place import require_in_place
from palestra.wire.weights.shards_sender import require_m2n
from palestra.wire.weights.vllm_engine import FilesUpdateInfo
from palestra.wire.weights.vllm_sent import LateEngine, Loader


class Receiver(M2NWeightTransferEngine):
    """Notes what was written in place."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.written: set[str] = set()

    @property
    def places(self) -> dict[str, torch.Tensor]:
        """What is written in place, and where."""
        return {place.name: place.tensor for place in self._parameter_destinations if place.tensor is not None}

    def _reshard(
        self,
        comm: int,
        stream: torch.cuda.Stream,
        src_meta: M2NParamMeta,
        dst_placements: Placements | None,
        dst_buffer: torch.Tensor,
    ) -> None:
        super()._reshard(comm, stream, src_meta, dst_placements, dst_buffer)
        if self._parameter_destinations[self._index[src_meta.name]].direct:
            self.written.add(src_meta.name)


class ShardsEngine(LateEngine):
    receives_by = Receiver

    def __init__(self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module):
        """Errors: UserError, if nothing is there to receive with, or vLLM has made something else of weights that it
        would write in place."""
        require_m2n()
        if getattr(vllm_config.model_config, "quantization", None) is None:  # else it writes none in place
            require_in_place(model, kind="nccl_m2n", loads_experts=True)
        super().__init__(config, vllm_config, device, model)

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:  # type: ignore[override]
        """Errors: InfrastructureError naming the tensor or the module."""
        self._begin()
        if not isinstance(update_info, FilesUpdateInfo):
            self._require_places()
        self._take_apart()  # whoever met the trainer has said where weights lie
        super().receive_weights(update_info)

    def _receive(self, update_info: WeightTransferUpdateInfo, loader: Loader) -> set[str]:
        self._receiver.written.clear()
        loaded = super()._receive(update_info, loader)
        torch.cuda.current_stream().synchronize()  # what is written in place may still be on its way
        return loaded | self._receiver.written

    def _require_places(self) -> None:
        """What was loaded since must have gone where weights lay when trainer and engine met."""
        known = dict(self.model.named_parameters())
        for name, place in self._receiver.places.items():
            if name not in known or known[name].data_ptr() != place.data_ptr():
                raise InfrastructureError(f"{name} lies elsewhere than when the engine met the trainer; start it again")
