"""Whether a layout of the trainer's ranks divides the model, told before any process starts."""

import math
from typing import Any

from palestra.config import RunConfig
from palestra.config.model_fields import experts_field, model_fields
from palestra.config.schema import nearest_divisors
from palestra.core.errors import UserError
from palestra.launch.asking import ask
from palestra.launch.model_path import directory_of


def require_layout(config: RunConfig) -> None:
    """Of a built model or one that is on this machine; of any other the trainer says so itself, when it has it.

    Errors: UserError with the nearest layouts that do.
    """
    build = config.model.build
    fields = model_fields(directory_of(config.model.path or "")) if build is None else build.config
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
    _require_experts(config, fields)
    if config.replays_routers and experts_field(fields) is None:
        raise UserError("train.router_replay=true, but the model has no experts; set it to false")
    if train.tensor_parallel > 1:
        _require_split(config)


def _require_split(config: RunConfig) -> None:
    """transformers' plan for the family is asked for, and proved to hold."""
    train = config.train
    dealt = train.context_parallel if train.context_kind == "ulysses" else 1
    ask("palestra.model.tensor_check", config.model.model_dump_json(), str(train.tensor_parallel), str(dealt))


def _require_experts(config: RunConfig, fields: dict[str, Any]) -> None:
    train = config.train
    if train.expert_parallel == 1:
        return
    name = experts_field(fields)
    if name is None:
        raise UserError(f"train.expert_parallel={train.expert_parallel}, but the model has no experts; set it to 1")
    if fields[name] % train.expert_parallel:
        both = math.gcd(fields[name], train.num_sharing)
        raise UserError(
            f"train.expert_parallel={train.expert_parallel} does not divide the model's {fields[name]} experts; set it "
            f"to {nearest_divisors(both, train.expert_parallel)}, which divides the {train.num_sharing} ranks, too"
        )
