"""The engine's side of a publish of an adapter through files: check, put in place, prove. Runs inside vLLM's workers.

vLLM's own route loads the adapter once, from a directory of the engine's own, its home. A version is checked and then
put there; as the update is finished vLLM drops the adapters that it holds, and the next forward pass reads the home
again: running requests go on with the new version, as every request names the same directory.

Why not `load_inplace` of the route: the flag stays on every request that names the adapter, so that each forward pass
reads the files again, and a request from before the update reads those that it was sent with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from palestra.core.errors import InfrastructureError
from palestra.wire.weights import files
from palestra.wire.weights.vllm_engine import FilesEngine, FilesUpdateInfo


@dataclass
class AdapterUpdateInfo(FilesUpdateInfo):
    """A version, and the directory from which this engine reads its adapter."""

    home: str = ""  # empty: none yet, which ends the update


class AdapterEngine(FilesEngine):
    """Puts one version into the engine's home per update, or says what is wrong with it and leaves the old one."""

    update_info_cls = AdapterUpdateInfo

    def start_weight_update(self) -> None:
        self._started, self._complete = True, False

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        """Errors: InfrastructureError naming the tensor or the layer."""
        assert isinstance(update_info, AdapterUpdateInfo)
        is_begun, self._started = getattr(self, "_started", False), False
        if not is_begun:
            raise InfrastructureError("an update is one start, one whole version, one finish; start a new update")
        manifest = self._expect(Path(update_info.directory), update_info.version)
        tensors = dict(files.read(update_info.directory, manifest))
        try:
            self._require_used(tensors, update_info.directory)
            files.put_adapter(update_info.directory, tensors, update_info.home)
        except InfrastructureError:
            raise
        except Exception as error:
            raise InfrastructureError(
                f"the engine could not take the adapter: {type(error).__name__} {error}"
            ) from error
        self._attempt, self._complete = manifest.attempt, True

    def finish_weight_update(self) -> None:
        if not self._complete:
            raise InfrastructureError("the update was finished before a version had been loaded")
        self._complete = False

    def _read(self, tensors: dict[str, torch.Tensor], directory: str, manager: Any) -> LoRAModel:
        config = PEFTHelper.from_local_dir(directory, None)
        config.validate_legal(manager.lora_config)
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        return LoRAModel.from_lora_tensors(
            1,
            tensors,
            config,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
            skip_prefixes=getattr(self.model, "lora_skip_prefixes", None),
        )

    def _require_used(self, tensors: dict[str, torch.Tensor], directory: str) -> None:
        """vLLM leaves out what it has no layer for, and says nothing."""
        manager: Any = self.model.lora_manager
        adapter = self._read(tensors, directory, manager)
        known = {*manager.modules, *(child for children in manager.packed_modules.values() for child in children)}
        if unused := sorted(adapter.loras.keys() - known):
            raise InfrastructureError(
                f"the engine has no adapted layer for {len(unused)} of the adapter's, the first is {unused[0]}; leave "
                "it out of model.lora.targets"
            )
        if partial := sorted(
            name for name, lora in adapter.loras.items() if lora.lora_a is None or lora.lora_b is None
        ):
            raise InfrastructureError(f"the adapter of layer {partial[0]} is half there; stage the version again")
