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


class Copies(WeightSource):
    """The optimizer writes into parameters while an engine may still be reading: what is handed out is a copy.

    One copy is handed out once and then filled again with later versions. torch keeps memory that was handed out until
    it was opened exactly as often, which nobody can promise: versions are left out, and engines that die read twice.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]):
        """Errors: InfrastructureError naming a tensor that is given twice."""
        self.tensors = [
            (name, tensor.detach().clone(memory_format=torch.contiguous_format)) for name, tensor in tensors
        ]
        require_distinct([name for name, _ in self.tensors], where="the weights that are handed out")
        recorder = _Recorder()
        engine = WeightTransferTrainerFactory.trainer_init(IPCTrainerInitInfo(rank=0), client=recorder, source=self)
        engine.send_weights()
        self.handles = pickle.dumps(recorder.update_info)

    @torch.no_grad()
    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """With the same tensors of a later version. No engine may need what was in it."""
        for (name, copy), (given, tensor) in zip(self.tensors, tensors, strict=True):
            if (given, tensor.shape, tensor.dtype) != (name, copy.shape, copy.dtype):
                raise InfrastructureError(
                    f"{given} {list(tensor.shape)} {tensor.dtype} cannot go where {name} {list(copy.shape)} "
                    f"{copy.dtype} was handed out; weights have to come in one order"
                )
            copy.copy_(tensor)

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors


def stage(directory: Path, version: int, attempt: int, copies: Copies) -> WeightsManifest:
    """Write the handles of `copies` to `directory`, and a manifest last. Leave them alone while they are staged.

    Errors: InfrastructureError for a disk that is full.
    """
    if copies.tensors[0][1].is_cuda:
        torch.cuda.synchronize()  # engines do not wait for this process's streams
    files.discard(directory)
    directory.mkdir(parents=True)
    write_atomically(directory / HANDLES, copies.handles)
    manifest = WeightsManifest(
        version=version,
        attempt=attempt,
        tensors=tuple(
            TensorEntry(name=meta.name, dtype=str(meta.dtype).split(".")[-1], shape=meta.shape, file=HANDLES, hash="")
            for meta in copies.metadata()
        ),
        sent_bytes=len(copies.handles),
        full_bytes=sum(tensor.nbytes for _, tensor in copies.tensors),
    )
    write_manifest(directory, manifest)
    return manifest


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
