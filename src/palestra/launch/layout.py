"""Whether a layout of the trainer's ranks divides the model, told before any process starts."""

import json
from pathlib import Path
from typing import Any

from palestra.config import RunConfig
from palestra.config.schema import nearest_divisors
from palestra.core.errors import UserError

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def require_layout(config: RunConfig) -> None:
    """Of a built model or one in a directory; of any other the trainer says so itself, when it has loaded it.

    Errors: UserError with the nearest layouts that do.
    """
    fields = _model_fields(config)
    if fields is None:
        return
    train = config.train
    heads = fields.get("num_attention_heads")
    if train.context_kind == "ulysses" and heads and heads % train.context_parallel:
        raise UserError(
            f"train.context_parallel={train.context_parallel} does not divide the model's {heads} attention heads, "
            f"which ulysses deals out; set it to {nearest_divisors(heads, train.context_parallel)}, or set "
            "train.context_kind=ring"
        )
    if train.expert_parallel == 1:
        return
    experts = next((fields[name] for name in _EXPERTS if fields.get(name)), None)
    if experts is None:
        raise UserError(f"train.expert_parallel={train.expert_parallel}, but the model has no experts; set it to 1")
    if experts % train.expert_parallel:
        raise UserError(
            f"train.expert_parallel={train.expert_parallel} does not divide the model's {experts} experts; set it to "
            f"{nearest_divisors(experts, train.expert_parallel)}"
        )


def _model_fields(config: RunConfig) -> dict[str, Any] | None:
    if config.model.build is not None:
        return config.model.build.config
    path = Path(config.model.path or "").expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # the trainer says what is wrong with it
    return fields.get("text_config", fields) if isinstance(fields, dict) else None
