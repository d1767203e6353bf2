"""The engine's side of a publish: check what is staged, load, prove. Runs inside vLLM's workers."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from palestra.core.errors import FencedError, InfrastructureError
from palestra.wire.weights import files, handles
from palestra.wire.weights.coverage import Coverage
from palestra.wire.weights.local import fetch
from palestra.wire.weights.manifest import WeightsManifest, read_manifest


@dataclass
class FilesInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update names its directory."""


@dataclass
class FilesUpdateInfo(WeightTransferUpdateInfo):
    """One whole version: the directory that holds it, and its number, which the manifest must repeat.

    `local`: where copies of what is loaded are kept on this machine; empty for none.
    """

    directory: str
    version: int
    local: str = ""


class FilesEngine(WeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):
    """Loads one whole version per update, or says what is wrong with it.

    After a failure the model is a mixture of versions in working order: it must not be resumed, but a later complete
    update replaces all of it.
    """

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module):
        super().__init__(config, vllm_config, device, model)
        self._coverage: Coverage | None = None
        self._complete = False
        self._attempt, self._mark = 0, ""  # of what was loaded last

    def init_transfer_engine(self, init_info: FilesInitInfo) -> None:
        """There is no connection to make."""

    def start_weight_update(self) -> None:
        self._coverage, self._complete = Coverage(self.model), False
        self._forget_packed_experts()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class ends with a device synchronisation, which a CPU build does not have."""
        if self.device.type == "cpu":
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        """Load every tensor of the version. Errors: InfrastructureError naming the tensor or the module."""
        try:
            if self._coverage is None or self._complete:
                raise InfrastructureError("an update is one start, one whole version, one finish; start a new update")
            directory = Path(update_info.directory)
            if update_info.local:
                directory = fetch(directory, Path(update_info.local))
            manifest = self._expect(directory, update_info.version)
            self._coverage.require_complete(self._load(directory, manifest))
        except BaseException:
            self._put_back_together()
            raise
        self._attempt, self._mark, self._complete = manifest.attempt, manifest.mark, True

    def finish_weight_update(self) -> None:
        if not self._complete or self._coverage is None:
            raise InfrastructureError("the update was finished before a version had been loaded")
        fed_by_others = self._coverage.fed_by_others()
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack(fed_by_others)
        self._coverage, self._complete = None, False

    def shutdown(self) -> None:
        """Nothing is held open between updates."""

    def _expect(self, directory: Path, version: int) -> WeightsManifest:
        manifest = read_manifest(directory)
        if manifest.version != version:
            raise InfrastructureError(f"version {version} was announced, but its manifest says {manifest.version}")
        if manifest.attempt < self._attempt:
            raise FencedError(f"weights of attempt {manifest.attempt} refused: those of {self._attempt} came before")
        return manifest

    def _load(self, directory: Path, manifest: WeightsManifest) -> set[str] | None:
        """Names of the engine's tensors that got anything."""
        current = "none yet"

        def checked():
            nonlocal current
            for name, tensor in self._read(directory, manifest):
                current = name
                yield name, tensor

        try:
            return self.model.load_weights(checked())  # type: ignore[operator]
        except InfrastructureError:
            raise
        except Exception as error:
            raise InfrastructureError(
                f"the engine could not load tensor {current} (or the one after it): {type(error).__name__} {error}"
            ) from error

    def _read(self, directory: Path, manifest: WeightsManifest) -> Iterator[tuple[str, torch.Tensor]]:
        is_here = handles.are_in(manifest)
        return handles.read(directory, manifest, self.device) if is_here else files.read(directory, manifest)

    def _forget_packed_experts(self) -> None:
        """On CPUs vLLM packs experts only when it builds their kernel, once: after a reload it would compute nonsense.

        Without a kernel it builds one, and packs, as it processes the loaded weights.
        """
        if self.device.type != "cpu":
            return
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase):
                method.moe_kernel = None

    def _repack(self, fed_by_others: list[nn.Module]) -> None:
        """On CPUs layers compute with a packed copy. That of a tied head is not among what was loaded: redo it."""
        if self.device.type != "cpu":
            return
        for module in fed_by_others:
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                method.process_weights_after_loading(module)

    def _put_back_together(self) -> None:
        """Give a model that was taken apart for a reload its tensors back, whatever they hold now."""
        self._coverage = None
        with suppress(Exception):  # the failure that led here is the one to report
            finalize_layerwise_reload(self.model, self.model_config)
