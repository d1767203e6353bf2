"""The engine's side of a publish of an adapter through files: check, replace, prove. Runs inside vLLM's workers.

vLLM's own route loads the first version, under the name that requests give. Its way to replace one, `load_inplace`, does
not do for a policy: the flag stays on every request that names the adapter, so that each forward pass reads the files
again, and a request from before the update brings back those that it was sent with. Here a version takes the place of
the one before in vLLM's own LoRA manager, once, while the engine is paused: running requests go on with it.
"""

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from palestra.core.errors import InfrastructureError
from palestra.wire.weights import files
from palestra.wire.weights.vllm_engine import FilesEngine, FilesUpdateInfo


class AdapterEngine(FilesEngine):
    """Replaces the one adapter of the engine per update, or says what is wrong with it and leaves the old one."""

    def start_weight_update(self) -> None:
        self._started, self._complete = True, False

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        """Errors: InfrastructureError naming the tensor or the layer."""
        is_begun, self._started = getattr(self, "_started", False), False
        if not is_begun:
            raise InfrastructureError("an update is one start, one whole version, one finish; start a new update")
        manifest = self._expect(update_info)
        tensors = dict(files.read(update_info.directory, manifest))
        try:
            self._replace(tensors, update_info.directory)
        except InfrastructureError:
            raise
        except Exception as error:
            raise InfrastructureError(
                f"the engine could not load the adapter: {type(error).__name__} {error}"
            ) from error
        self._attempt, self._complete = manifest.attempt, True

    def finish_weight_update(self) -> None:
        if not self._complete:
            raise InfrastructureError("the update was finished before a version had been loaded")
        self._complete = False

    def _replace(self, tensors: dict[str, torch.Tensor], directory: str) -> None:
        manager: Any = getattr(self.model, "lora_manager", None)
        if manager is None or len(manager.list_adapters()) != 1:
            held = "no LoRA manager" if manager is None else f"{len(manager.list_adapters())} adapters"
            raise InfrastructureError(f"the engine has {held}; load one adapter by /v1/load_lora_adapter first")
        [number] = manager.list_adapters()
        adapter = self._read(tensors, directory, number, manager)
        self._require_used(adapter, manager)
        manager.remove_adapter(number)
        manager.add_adapter(adapter)
        manager.activate_adapter(number)

    def _read(self, tensors: dict[str, torch.Tensor], directory: str, number: int, manager: Any) -> LoRAModel:
        config = PEFTHelper.from_local_dir(directory, None)
        config.validate_legal(manager.lora_config)
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        return LoRAModel.from_lora_tensors(
            number,
            tensors,
            config,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
            skip_prefixes=getattr(self.model, "lora_skip_prefixes", None),
        )

    def _require_used(self, adapter: LoRAModel, manager: Any) -> None:
        """vLLM leaves out what it has no layer for, and says nothing."""
        known = {*manager.modules, *(child for children in manager.packed_modules.values() for child in children)}
        if unused := sorted(adapter.loras.keys() - known):
            raise InfrastructureError(
                f"the engine has no adapted layer for {len(unused)} of the adapter's, the first is {unused[0]}; leave it "
                "out of model.lora.targets"
            )
        if partial := sorted(
            name for name, lora in adapter.loras.items() if lora.lora_a is None or lora.lora_b is None
        ):
            raise InfrastructureError(f"the adapter of layer {partial[0]} is half there; stage the version again")
