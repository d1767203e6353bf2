"""Save and load the trainer's part of a checkpoint: weights, optimizer, and the state of the supervised data.

Nothing in a step draws random numbers and the learning rate is a function of the step, so this is all there is: a
resumed run goes on to the bit. The caller writes the manifest afterwards; without it the files do not count.
"""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from palestra.core.errors import InfrastructureError
from palestra.core.files import write_atomically
from palestra.model.policy import Policy
from palestra.train.ranks import Ranks

_STATE = "state.json"


class TrainerState(Struct, frozen=True, kw_only=True):
    """What is not a tensor."""

    version: int
    data: dict[str, Any] = {}


def save(directory: Path, state: TrainerState, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """A collective. Errors: InfrastructureError, if it cannot be written."""
    try:
        if ranks.is_first:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        ranks.barrier()
        weights, moments = get_state_dict(policy, optimizer)
        save_tensors({"policy": weights, "optimizer": moments}, checkpoint_id=directory)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise InfrastructureError(
            f"could not write the checkpoint {directory}: {_reason(error)}; free space and resume"
        ) from error
    if ranks.is_first:
        write_atomically(directory / _STATE, msgspec.json.encode(state))
    ranks.barrier()


def load(directory: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> TrainerState:
    """A collective; the number of ranks may differ from that of the save. Errors: InfrastructureError."""
    try:
        state = msgspec.json.decode((directory / _STATE).read_bytes(), type=TrainerState)
        weights, moments = get_state_dict(policy, optimizer)
        load_tensors({"policy": weights, "optimizer": moments}, checkpoint_id=directory)
    except (OSError, msgspec.DecodeError, CheckpointException) as error:
        raise InfrastructureError(
            f"checkpoint {directory} cannot be loaded: {_reason(error)}; resume from the one before"
        ) from error
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state


def _reason(error: BaseException) -> str:
    """What went wrong on which rank, without the tracebacks."""
    if isinstance(error, CheckpointException):
        return ", ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
    return str(error)
