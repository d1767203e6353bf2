"""Save and load the trainer's part of a checkpoint: weights, optimizer, and the state of the supervised data.

Nothing in a step draws random numbers and the learning rate is a function of the step, so this is all there is: a
resumed run goes on to the bit. A step waits only while weights and moments are copied to host memory; the files are
written beside the steps after it. Whoever saves writes the manifest when they are whole; without it they do not count.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from msgspec import Struct
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.storage import WriteResult

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.model.policy import Policy
from palestra.train.background import Background, Written
from palestra.train.ranks import Ranks

_STATE = "state.json"
# Frozen weights come from `model.path` again. `load` reads every trained tensor or fails.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class TrainerState(Struct, frozen=True, kw_only=True):
    """What is not a tensor."""

    version: int
    data: dict[str, Any] = {}


class Checkpoints:
    """Saves and loads, the files of one checkpoint at a time. Every method is a collective.

    Keeps: from the first save on, a copy of this rank's weights and moments in host memory, pinned where there is CUDA.
    What the ranks say of the files goes through `Meshes.beside`.
    """

    def __init__(self, ranks: Ranks, *, deadline_s: float):
        is_cuda = ranks.device.type == "cuda"
        self._ranks, self._group = ranks, ranks.meshes.beside
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=is_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=is_cuda,
            )
        )
        self._background = Background(deadline_s=deadline_s)

    def begin(
        self,
        directory: Path,
        state: TrainerState,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        on_end: Callable[[], None],
    ) -> None:
        """Returns when everything is copied. The save before must be finished. Errors: InfrastructureError."""
        try:
            staged: Any = self._stager.stage(_state(policy, optimizer))
        except RuntimeError as error:  # no memory
            raise _not_written(directory, error) from error
        encoded = msgspec.json.encode(state)
        self._background.begin(state.version, directory, lambda: self._write(directory, staged, encoded), on_end)

    def _write(self, directory: Path, staged: dict[str, Any], encoded: bytes) -> None:
        """In the thread. On every rank it ends when the files of all ranks are whole, or fails when one rank did."""
        if self._ranks.is_first:
            shutil.rmtree(directory, ignore_errors=True)
        try:
            dist.barrier(self._group)
            save_tensors(staged, storage_writer=_Writer(directory, encoded), process_group=self._group)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise _not_written(directory, error) from error

    def finish(self) -> Written | None:
        """Waits for the files of the save that was begun, if there is one. Errors: InfrastructureError."""
        return self._background.finish()

    @property
    def is_begun(self) -> bool:
        return self._background.is_begun

    @property
    def has_ended(self) -> bool:
        """Whether the save that was begun is at its end; the same on all ranks."""
        return self.is_begun and self._ranks.from_first(self._background.has_ended)

    def load(self, directory: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> TrainerState:
        """The layout of the ranks may differ from that of the save. Errors: InfrastructureError."""
        try:
            state = msgspec.json.decode((directory / _STATE).read_bytes(), type=TrainerState)
            found = _state(policy, optimizer)
            load_tensors(found, storage_reader=FileSystemReader(directory), process_group=self._group)
        except (OSError, msgspec.DecodeError, CheckpointException) as error:
            raise InfrastructureError(
                f"checkpoint {directory} cannot be loaded: {_reason(error)}; resume from the one before"
            ) from error
        set_state_dict(
            policy, optimizer, model_state_dict=found["policy"], optim_state_dict=found["optimizer"], options=_TRAINED
        )
        return state


class _Writer(FileSystemWriter):
    """With the state that is not a tensor. The rank that writes the metadata writes it: all hear if that fails."""

    def __init__(self, directory: Path, state: bytes):
        super().__init__(directory)
        self._state_path, self._state = directory / _STATE, state

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        write_atomically(self._state_path, self._state)


def _not_written(directory: Path, error: BaseException) -> InfrastructureError:
    return InfrastructureError(f"could not write the checkpoint {directory}: {_reason(error)}; free space and resume")


def _state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Under every name that a frozen tensor has it is left out; torch leaves out the first one only."""
    weights, moments = get_state_dict(policy, optimizer, options=_TRAINED)
    named = policy.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {"policy": {name: value for name, value in weights.items() if name not in frozen}, "optimizer": moments}


def _reason(error: BaseException) -> str:
    """What went wrong on which rank, without the tracebacks."""
    if isinstance(error, CheckpointException):
        return ", ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
    return str(error)
