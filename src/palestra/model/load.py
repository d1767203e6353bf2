"""Load a model of transformers, check it, and shard it over the ranks.

Legend: a rank is one trainer process; `mesh.py` says how they are laid out.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from palestra.config.model_fields import experts_field
from palestra.config.schema import Lora, ReshardAfter
from palestra.core.errors import UserError
from palestra.model.expert_adapters import expert_modules
from palestra.model.experts import split_experts
from palestra.model.files import model_directory
from palestra.model.fill import empty_model, fill, in_one_line
from palestra.model.float8 import require_float8, unrounded, use_float8
from palestra.model.lora import add_adapter, begin_adapter
from palestra.model.memory import gathered_at_once, require_memory
from palestra.model.mesh import Meshes
from palestra.model.policy import Policy, check_against_own_forward, check_replay, require_softmax_attention
from palestra.model.recompute import PLAIN, Activations, keep_activations
from palestra.model.tensor_plan import apply, num_whole, require_heads, split_of

P = TypeVar("P")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.25}  # of a log-probability


def load_policy(
    path: str,
    *,
    dtype: torch.dtype,
    experts: str,
    head_chunk_tokens: int,
    meshes: Meshes,
    device: torch.device,
    lora: Lora | None = None,
    seed: int = 0,
    moment_bytes: int = 8,
    activations: Activations = PLAIN,
    float8: bool = False,
    router_replay: bool = False,
) -> Policy:
    """The model in `path` (a directory or a hub name), ready to train: float32 masters, computing in `dtype`.

    A collective; no process ever holds the whole model. With `lora` only adapters are trained, which `seed` begins.
    `moment_bytes` of a parameter are what an optimizer will have on the device.

    Errors: UserError for a path without a model, a family that cannot be packed, or a model that does not fit.
    """
    config = read_config(path)
    model = empty_model(config, experts=experts)
    require_softmax_attention(model)
    policy = Policy(model, head_chunk_tokens=head_chunk_tokens)
    owners, tensors = meshes.experts["ep"].size(), meshes.tensor.size
    require_memory(
        model.num_parameters(),
        num_gathered=gathered_at_once(model, policy.decoder_layers, owners=owners, tensors=tensors),
        dtype=dtype,
        num_shards=meshes.num_shards,
        device=device,
        moment_bytes=moment_bytes,
        frozen=lora is not None,
        num_repeated=(tensors - 1) * num_whole(model),
    )
    if router_replay:
        policy.routers.accept_routes(policy.decoder_layers)
    if float8:
        require_float8(device)
        use_float8(policy.decoder_layers, keep=policy.routers.modules)
    if lora is not None:
        policy.adapter = add_adapter(model, lora, dtype=dtype)
    keep_activations(policy.decoder_layers, activations, device)
    shard(policy, dtype=dtype, experts=experts, meshes=meshes)
    begin_adapter(model, seed=seed, device=device)
    fill(model, model_directory(path), device=device)
    with unrounded(policy.decoder_layers):
        check_against_own_forward(policy, tolerance=_TOLERANCE[dtype])
    policy.fallbacks += policy.routers.not_heard
    if router_replay:
        check_replay(policy)
    return policy


def read_config(path: str) -> PretrainedConfig:
    """Errors: UserError, if there is no model's config.json."""
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise UserError(f"model.path={path} has no config.json; give a directory in Hugging Face layout or a hub name")
    if not Path(path).exists() and (path.count("/") != 1 or path.startswith(("/", "."))):
        raise UserError(f"model.path={path} does not exist; give a directory in Hugging Face layout or a hub name")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers and huggingface_hub raise many kinds
        raise UserError(f"model.path={path} cannot be read: {in_one_line(error)}") from error


def shard(policy: Policy, *, dtype: torch.dtype, experts: str, meshes: Meshes) -> None:
    """Shard each decoder layer, and base and head together as the root; experts over a mesh of their own, if they or
    tokens are split. Gradients are summed over the ranks that have other tokens: those of an expert have met the tokens
    of its whole group already; those of the root are the same on all ranks of the tensor axis, and count once.

    Errors: UserError for a model that the layout does not divide.
    """
    dense, reduce = meshes.dense, torch.promote_types(dtype, torch.float32)
    policy.context, policy.tensor = meshes.context, meshes.tensor
    try:
        if meshes.tensor.size > 1:
            _split_matrices(policy.model, meshes)
        meshes.context.require(heads=policy.model.config.get_text_config().num_attention_heads)
        owners = meshes.experts["ep"].size()
        if not any(expert_modules(policy.model)):
            policy.fallbacks += _without_owners(policy.model, owners)
        elif max(owners, meshes.tensor.size) > 1:
            split_experts(policy.model, meshes.experts["ep"], compute=experts, tensor=meshes.tensor)
            _shard_experts(policy.model, MixedPrecisionPolicy(dtype, reduce), meshes)
    except ValueError as error:
        raise UserError(str(error)) from error
    for layer in policy.decoder_layers:
        fully_shard(layer, mesh=dense, mp_policy=MixedPrecisionPolicy(dtype, reduce))
    # the root is given temperatures, which must not be rounded
    fully_shard(policy, mesh=meshes.root, mp_policy=MixedPrecisionPolicy(dtype, reduce, cast_forward_inputs=False))
    for module in sharded_modules(policy):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(float(meshes.tensor.size) if module is policy else 1.0)


def _without_owners(model: PreTrainedModel, owners: int) -> tuple[str, ...]:
    """What there is to say, if a family computes experts by itself: what holds for every weight holds for them.

    Errors: ValueError for a dense model.
    """
    if owners == 1:
        return ()
    name = type(model).__name__
    if experts_field(model.config.get_text_config().to_dict()) is None:
        raise ValueError(f"train.expert_parallel={owners}, but {name} has no experts; set it to 1")
    return (
        f"train.expert_parallel={owners} has no effect: {name} computes its experts outside of transformers' registry; "
        "FSDP shards them as it does all other weights",
    )


def _split_matrices(model: PreTrainedModel, meshes: Meshes) -> None:
    split = split_of(model.config, meshes.tensor.size)
    if meshes.context.deals_heads:
        require_heads(split, meshes.context.size)
    apply(model, split, meshes.tensor, meshes.ranks["tensor"])


def _shard_experts(model: PreTrainedModel, precision: MixedPrecisionPolicy, meshes: Meshes) -> None:
    """Whole experts where every rank gets as many, else a part of each, as optimizers may want whole matrices; where
    that would be no equal part either, as many experts as there are."""
    owners, among = meshes.experts["ep"].size(), meshes.experts["replicate", "efsdp"]
    num = meshes.experts["efsdp"].size()

    def placement(parameter: nn.Parameter) -> Shard:
        is_even = parameter.shape[0] // owners % num == 0
        return Shard(0 if is_even or parameter.shape[1] % num else 1)

    for module in expert_modules(model):
        fully_shard(module, mesh=among, mp_policy=precision, shard_placement_fn=placement)


def sharded_modules(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def passes(policy: nn.Module, packs: Sequence[P], reshard_after: ReshardAfter = "forward") -> Iterator[P]:
    """Packs of one step, each to go forward and backward before the next is asked for.

    Gradients are added up over replicas by the last; before that they pile up on each. Ranks that share weights add
    theirs up in every backward: what piles up is a rank's part, never a whole model. Gathered weights are kept as
    `reshard_after` says, and never beyond the last backward: an optimizer changes shards, not copies.
    """
    modules = sharded_modules(policy)
    layers = [module for module in modules if module is not policy]  # the root is always kept for its backward
    for index, pack in enumerate(packs):
        is_last = index == len(packs) - 1
        for module in modules:
            module.set_requires_all_reduce(is_last, recurse=False)
            module.set_reshard_after_backward(is_last or reshard_after != "step", recurse=False)
        for module in layers:
            module.set_reshard_after_forward(reshard_after == "forward", recurse=False)
        yield pack
    for module in layers:
        module.set_reshard_after_forward(True, recurse=False)
