"""Fill a sharded model that has no memory yet from a checkpoint, layer by layer.

Every process reads each layer, has transformers bring it into the model's own layout, keeps its share and forgets the
rest: it never holds more than its shards and one layer (or the embeddings, which are one piece).
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from palestra.core.errors import UserError
from palestra.model import attention
from palestra.model.files import layer_of
from palestra.model.lora import plain_name
from palestra.model.places import Places


def empty_model(config: PretrainedConfig, *, experts: str) -> PreTrainedModel:
    """On the meta device, in float32, with the packed attention."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            attn_implementation=attention.NAME,
            experts_implementation=experts if experts != "grouped_mm" else None,  # None: grouped_mm if there are any
        )


def fill(model: PreTrainedModel, path: Path, *, device: torch.device) -> None:
    """Give every parameter and buffer of `model` its memory on `device` and its values from the safetensors files in
    `path`. It may be sharded in any way; no collective.

    Errors: UserError naming a tensor that is missing or has another shape, or a file that cannot be read.
    """
    _fill_computed_buffers(model, device)
    mould = _Mould(model, path)
    places = Places(model)
    names = {plain_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    with ExitStack() as files:
        for layer in _layers(_tensors(path, files)):
            for name, tensor in mould.convert(layer).items():
                places.give(names.get(name, name), tensor, device)
    model.__dict__["_weight_conversions"] = mould.conversions  # as transformers leaves them, for the export to undo
    _require_all(model, path)


def _tensors(path: Path, files: ExitStack) -> dict[str, Any]:
    """Every tensor of the checkpoint by name, none of them read yet."""
    index = path / "model.safetensors.index.json"
    try:
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(file.name for file in path.glob("*.safetensors"))
        opened = [files.enter_context(safe_open(path / name, framework="pt")) for name in names]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"model.path={path} cannot be read: {error}") from error
    if not opened:
        raise UserError(f"model.path={path} has no *.safetensors; save the model with save_pretrained")
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118


def _layers(tensors: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(layer_of(name), {})[name] = tensor
    yield from layers.values()


class _Mould:
    """The model unsharded and without memory: transformers loads one layer after the other into it."""

    def __init__(self, model: PreTrainedModel, path: Path):
        with torch.device("meta"):
            self._model = type(model)(copy.deepcopy(model.config))
        self._path = path
        self._mapping: list[Any] = get_model_conversion_mapping(self._model)

    @property
    def conversions(self) -> list[Any]:
        return [conversion for conversion in self._mapping if conversion.was_used()]

    def convert(self, layer: dict[str, Any]) -> dict[str, Tensor]:
        """The layer's tensors as the model names and lays them out, whole, in host memory, in the checkpoint's
        precision: experts are there twice while they are put together. Errors: UserError."""
        config = LoadStateDictConfig(dtype_plan={"*": None}, weight_mapping=self._mapping)
        where = f"model.path={self._path}"
        try:
            report, _ = convert_and_load_state_dict_in_model(model=self._model, state_dict=layer, load_config=config)
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"{where} cannot be loaded: {in_one_line(error)}") from error
        for name, found, expected in report.mismatched_keys:
            raise UserError(
                f"{where}: {name} is {tuple(found)}, {type(self._model).__name__} of this config.json has "
                f"{tuple(expected)}; give the config.json that belongs to it"
            )
        for failure in report.conversion_errors.values():
            raise UserError(f"{where} cannot be loaded: {failure}")
        return self._take()

    def _take(self) -> dict[str, Tensor]:
        """What has been loaded; nothing of it stays."""
        taken: dict[str, Tensor] = {}
        for prefix, module in self._model.named_modules():
            owned: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
            for own in owned:
                for name, tensor in own.items():
                    if tensor is None or tensor.is_meta:
                        continue
                    taken[f"{prefix}.{name}".lstrip(".")] = tensor.detach()
                    empty = torch.empty_like(tensor, device="meta")
                    own[name] = nn.Parameter(empty) if own is module._parameters else empty
        return taken


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Those that no checkpoint has, such as frequencies of rotary embeddings: the family computes them."""
    for module in model.modules():
        computed = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if computed:
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # transformers' way to say that it must not be touched
            with torch.no_grad():
                model._init_weights(module)


def _require_all(model: PreTrainedModel, path: Path) -> None:
    missing = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise UserError(
            f"model.path={path} lacks {len(missing)} tensors of {type(model).__name__}, the first is {missing[0]}; "
            "they would be random: give the whole checkpoint, or the config.json that belongs to it"
        )
