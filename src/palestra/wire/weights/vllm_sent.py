"""The engine's side of versions that are sent: vLLM's own `nccl` backend receives, what it brings is checked.

An update may also name a directory, as `files` does: so an engine that joins, or missed a version, gets its first one.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from palestra.core.errors import InfrastructureError
from palestra.wire.weights.vllm_engine import FilesEngine, FilesUpdateInfo


class SentEngine(FilesEngine):
    """Loads one whole version per update, from wherever it comes."""

    receives_by: ClassVar[type[WeightTransferEngine]] = NCCLWeightTransferEngine

    def __init__(self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module):
        super().__init__(config, vllm_config, device, model)
        self._receiver: Any = self.receives_by(config, vllm_config, device, model)

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return self._receiver.parse_init_info(init_dict)

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:  # type: ignore[override]
        """Meet the trainer, and leave whom it was before."""
        self._receiver.shutdown()
        self._receiver.init_transfer_engine(init_info)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        is_staged = "directory" in update_dict
        return (super() if is_staged else self._receiver).parse_update_info(update_dict)

    def receive_weights(self, update_info: WeightTransferUpdateInfo) -> None:  # type: ignore[override]
        """Errors: InfrastructureError naming the tensor or the module."""
        if isinstance(update_info, FilesUpdateInfo):
            super().receive_weights(update_info)
            return
        try:
            if self._coverage is None or self._complete:
                raise InfrastructureError("an update is one start, one whole version, one finish; start a new update")
            self._coverage.require_complete(self._receive(update_info, Loader(self.model)))
        except BaseException:
            self._put_back_together()
            raise
        self._complete = True

    def shutdown(self) -> None:
        self._receiver.shutdown()

    def _receive(self, update_info: WeightTransferUpdateInfo, loader: "Loader") -> set[str]:
        """Names of the engine's tensors that got anything."""
        self._receiver.set_weight_update_target(loader, self.model_config)
        try:
            self._receiver.receive_weights(update_info)
        except InfrastructureError:
            raise
        except Exception as error:
            raise InfrastructureError(
                f"the engine could not receive the version: {type(error).__name__} {error}"
            ) from error
        finally:
            self._receiver.reset_weight_update_target()
        return loader.loaded


class LateEngine(SentEngine):
    """Takes the model apart only when a version comes: some are put among the weights as they are."""

    _has_started = False

    def start_weight_update(self) -> None:
        self._has_started, self._complete = True, False

    def _begin(self) -> None:
        """Errors: InfrastructureError, if no update was started for what comes now."""
        if not self._has_started:
            raise InfrastructureError("an update is one start, one version, one finish; start a new update")
        self._has_started = False

    def _take_apart(self) -> None:
        super().start_weight_update()


class Loader(nn.Module):
    """The model, as far as vLLM's receivers use it; notes what was loaded."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._load, self.loaded = model.load_weights, set[str]()

    def load_weights(self, weights: Any) -> None:
        found = self._load(weights)  # type: ignore[operator]
        if found is None:
            raise InfrastructureError("the model's load_weights does not say what it loaded; nothing can be proved")
        self.loaded |= found
