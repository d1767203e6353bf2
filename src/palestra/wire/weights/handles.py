"""Weights for an engine on the trainer's own GPU: nothing is sent, it is told where in memory they lie.

What lies in staging is a manifest and CUDA's handles, made by vLLM's own trainer side of its `ipc` backend. The engine
reads them as it reads files: any version that is staged, whenever it is asked to, while the process lives that staged
it. Nothing is hashed; the probe alone proves what arrived.

This has never run on a GPU. Tests drive vLLM's classes with a stand-in for CUDA's handles.
"""

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferUpdateInfo

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.wire.weights import files
from palestra.wire.weights.manifest import TensorEntry, WeightsManifest, require_distinct, write_manifest

HANDLES = "handles.pickle"
_DEVICE = 6  # where the arguments of rebuild_cuda_tensor have the index of the device


def stage(
    directory: Path, version: int, attempt: int, tensors: Iterable[tuple[str, torch.Tensor]]
) -> tuple[WeightsManifest, list[torch.Tensor]]:
    """Write handles of a copy of `tensors` to `directory`, and a manifest last. Keep the copy while it is staged.

    Errors: InfrastructureError naming a tensor that is given twice, or a disk that is full.
    """
    source, recorder = _Copies(tensors), _Recorder()
    require_distinct([name for name, _ in source.copies], where=f"version {version}")
    engine = WeightTransferTrainerFactory.trainer_init(IPCTrainerInitInfo(rank=0), client=recorder, source=source)
    engine.send_weights()
    files.discard(directory)
    directory.mkdir(parents=True)
    handles = pickle.dumps(recorder.update_info)
    write_atomically(directory / HANDLES, handles)
    manifest = WeightsManifest(
        version=version,
        attempt=attempt,
        tensors=tuple(
            TensorEntry(name=meta.name, dtype=str(meta.dtype).split(".")[-1], shape=meta.shape, file=HANDLES, hash="")
            for meta in source.metadata()
        ),
        sent_bytes=len(handles),
        full_bytes=sum(tensor.nbytes for _, tensor in source.copies),
    )
    write_manifest(directory, manifest)
    return manifest, [tensor for _, tensor in source.copies]


def are_in(manifest: WeightsManifest) -> bool:
    """Whether a version was staged as handles."""
    return any(entry.file == HANDLES for entry in manifest.tensors)


def read(directory: Path, manifest: WeightsManifest, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the trainer's tensors, in its memory, in the manifest's order.

    Errors: InfrastructureError, if they lie on another GPU, the manifest is not of these handles, or whoever staged
    them is gone.
    """
    try:
        update = IPCWeightTransferUpdateInfo(**pickle.loads((directory / HANDLES).read_bytes()))
    except (OSError, ValueError, TypeError, pickle.UnpicklingError, EOFError) as error:
        raise InfrastructureError(f"{directory / HANDLES} cannot be read: {error}; stage the version again") from error
    if update.names != [entry.name for entry in manifest.tensors] or not isinstance(update.ipc_handles, list):
        raise InfrastructureError(f"{directory}: the manifest and the handles are not of one version; stage it again")
    own = str(torch.cuda.get_device_properties(device).uuid)
    for name, handles in zip(update.names, update.ipc_handles, strict=True):
        if own not in handles:
            raise InfrastructureError(
                f"tensor {name} lies on GPU {', '.join(handles)}, and the engine on {own}: sync.kind=ipc needs both on "
                "one; use sync.kind=files"
            )
        arguments: list[Any] = list(handles[own])
        arguments[_DEVICE] = device.index
        try:
            tensor = rebuild_cuda_tensor(*arguments)
        except RuntimeError as error:
            raise InfrastructureError(
                f"tensor {name} cannot be opened in the trainer's memory: {error}; is that process gone?"
            ) from error
        yield name, tensor


class _Copies(WeightSource):
    """The optimizer writes into parameters while an engine may still be reading: what is handed out is a copy."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]):
        self.copies = [(name, tensor.detach().clone(memory_format=torch.contiguous_format)) for name, tensor in tensors]

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.copies]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.copies


class _Recorder:
    """Stands where vLLM's trainer side has an engine: what it would be sent is kept, for whoever asks."""

    update_info: WeightTransferUpdatePayload

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Engines of ours need to know nothing beforehand."""

    def start_weight_update(self) -> None:
        """The orchestrator starts it."""

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self.update_info = update_info

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The orchestrator finishes it."""
