"""Whether adapters can be trained and served as a recipe says, told before any process starts."""

import subprocess
import sys
from pathlib import Path

from palestra.config import RunConfig
from palestra.config.model_fields import model_fields
from palestra.core.errors import UserError
from palestra.infer.launch import device_of, require_dense

_CHECK_S = 300.0


def require_adapters(config: RunConfig) -> None:
    """Of a built model or one in a directory; of any other the processes say so themselves, when they have loaded it.

    Errors: UserError for layers that the model does not have, and for experts beside adapters on engines of CPUs.
    """
    build, lora = config.model.build, config.model.lora
    fields = model_fields(Path(config.model.path or "").expanduser()) if build is None else build.config
    if lora is None or fields is None:
        return
    if config.is_rl and device_of(config.engine.device) == "cpu":
        require_dense(config.model.path or "the model of model.build", fields)
    if lora.targets != "all-linear":
        _require_targets(config)


def _require_targets(config: RunConfig) -> None:
    """A process of its own asks transformers for the family's layers."""
    command = [sys.executable, "-m", "palestra.model.lora_check", config.model.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_S)
    if done.returncode:
        raise UserError(done.stderr.strip()[-800:])
