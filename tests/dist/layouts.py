"""Every way to lay a model out over ranks, and what is measured of each: used by the ranks and by the tests."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from palestra.algo.losses import policy_loss
from palestra.config.schema import Balance, Lora, ReshardAfter, Train
from palestra.core.ledger import Ledger
from palestra.core.metrics import values
from palestra.model import experts, load
from palestra.model.documents import documents_of
from palestra.model.expert_adapters import expert_modules
from palestra.model.export import iterate_weights
from palestra.model.fill import empty_model, fill
from palestra.model.load import passes, read_config
from palestra.model.lora import add_adapter, begin_adapter
from palestra.model.mesh import Meshes, make_meshes
from palestra.model.places import share
from palestra.model.policy import Policy, check_replay
from palestra.model.recompute import PLAIN, Activations, keep_activations
from palestra.model.replay import Replay
from palestra.model.shards import ShardedWeights
from palestra.model.tensor import Seen
from palestra.train import muon, packs
from palestra.train.optimizer import make_optimizer
from palestra.train.packs import Plan, plan_step
from palestra.train.ranks import Ranks
from palestra.train.step import Readings, pack_loss, train_step
from tests.unit.train.batches import make_batch

ALL = ("Qwen3ForCausalLM", "Gemma2ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM")
LATENT = "DeepseekV3ForCausalLM"  # its values are narrower than its keys, and its attention is in no tensor plan
BIASED, SINKS = (
    "LlamaForCausalLM",
    "GraniteSWAForCausalLM",
)  # what a rank of a tensor axis must add once, or has heads of
FAMILIES = (*ALL, LATENT, BIASED, SINKS)  # the last three in few layouts
NORMED = ("Qwen3ForCausalLM", "Glm4MoeForCausalLM")  # norms of the heads of queries and keys
DTYPES = {"float64": torch.float64, "float32": torch.float32, (ADAPTED := "adapted"): torch.float64}
"""By what is measured: all weights in either precision, or adapters beside frozen weights."""
LENGTHS = [9, 4, 17, 5, 12, 6, 4, 8]
PACKS = [0, 0, 1, 1, 2, 2, 3, 3]
STEPS = 3
AUX_LOSS = 1.0
NOTHING = Replay()


@dataclass(frozen=True)
class Layout:
    name: str
    num_ranks: int
    axes: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = ALL  # in float64
    singles: tuple[str, ...] = NORMED  # in float32
    activations: Activations = PLAIN
    optimizer: Literal["muon", "adamw"] = "muon"  # the first is the second for all that is no matrix of a layer
    reshard_after: ReshardAfter = "forward"
    adapted: tuple[str, ...] = ()  # families whose adapters are trained here, too
    is_known: bool = True  # else experts do not go through transformers' registry

    @property
    def is_given(self) -> bool:
        """Whether routers are given experts: `Train` refuses it for compiled layers."""
        return not self.activations.compile

    def suits(self, family: str) -> bool:
        return "experts" not in self.axes or is_split(family)

    def kinds(self, family: str) -> tuple[str, ...]:
        """What is measured of a family: keys of `DTYPES`."""
        measured = {"float64": self.families, "float32": self.singles, ADAPTED: self.adapted}
        return tuple(kind for kind, families in measured.items() if family in families and self.suits(family))

    def meshes(self) -> Meshes:
        """A collective of all ranks, also of those that have no part in it."""
        return make_meshes("cpu", ranks=range(self.num_ranks), **self.axes)


LAYOUTS = [
    Layout("1", 1),
    Layout("fsdp2", 2, {"shard": 2}, optimizer="adamw"),
    Layout("fsdp4", 4, {"shard": 4}, singles=ALL),
    Layout("replicate2-shard2", 4, {"replicate": 2, "shard": 2}, reshard_after="step", adapted=ALL[:1]),
    Layout("ep2", 2, {"shard": 2, "experts": 2}, optimizer="adamw"),
    Layout("ep4", 4, {"shard": 4, "experts": 4}, adapted=NORMED[1:]),
    Layout("ep2-unknown", 4, {"shard": 2, "context": 2, "experts": 2}, NORMED[1:], (), is_known=False),
    Layout("replicate2-ep2", 4, {"replicate": 2, "shard": 2, "experts": 2}, NORMED[1:], ()),
    Layout("replicate2-ring2", 4, {"replicate": 2, "context": 2, "context_kind": "ring"}, NORMED[1:], ()),
    Layout("ulysses2", 2, {"context": 2}),
    Layout("ring2", 2, {"context": 2, "context_kind": "ring"}),
    Layout(
        "tp2", 2, {"tensor": 2}, families=("Gemma2ForCausalLM", LATENT, BIASED, SINKS), singles=(), adapted=(LATENT,)
    ),
    Layout("tp2-fsdp2", 4, {"tensor": 2, "shard": 2}, families=NORMED, adapted=NORMED[:1]),
    Layout("tp2-ulysses2", 4, {"tensor": 2, "context": 2}, families=NORMED[1:], singles=()),
    Layout(
        "tp2-ep2",
        2,
        {"tensor": 2, "experts": 2},
        families=NORMED[1:],
        singles=(),
        optimizer="adamw",
        adapted=NORMED[1:],
    ),
    Layout("ep2-ulysses2-fsdp2", 4, {"shard": 2, "context": 2, "experts": 2}),
    Layout(
        "ep2-ring2-fsdp2",
        4,
        {"shard": 2, "context": 2, "context_kind": "ring", "experts": 2},
        (*ALL, LATENT),
        singles=ALL,
        adapted=NORMED[1:],
    ),
    Layout(
        "ep2-ulysses2-fsdp2-full-offload",
        4,
        {"shard": 2, "context": 2, "experts": 2},
        families=(),
        singles=("Glm4MoeForCausalLM",),
        activations=Activations("full", offload=True),
        reshard_after="step",
        adapted=("Glm4MoeForCausalLM",),
    ),
    Layout(
        "ep2-ring2-fsdp2-selective-offload",
        4,
        {"shard": 2, "context": 2, "context_kind": "ring", "experts": 2},
        families=(),
        singles=("GptOssForCausalLM",),
        activations=Activations("selective", offload=True),
        reshard_after="backward",
        adapted=("GptOssForCausalLM",),
    ),
    Layout(
        "ep2-ring2-compiled",  # of which ranks of the context share weights
        2,
        {"context": 2, "context_kind": "ring", "experts": 2},
        families=(),
        singles=NORMED[1:],
        activations=Activations(compile=True),
    ),
]
FAULTS = {  # the layout that has it, and what shows it
    "experts swapped": ("ep2", "gradients"),
    "boundary ignored": ("ring2", "gradients"),
    "wrong divisor": ("ep2", "gradients"),
    "replicas not summed": ("replicate2-ring2", "gradients"),
    "routes of another rank": ("ring2", "weights"),
    "experts counted in a part": ("ring2", "gradients"),
    "orthogonalised in pieces": ("fsdp4", "weights"),
    "norms summed twice": ("tp2-ep2", "gradients"),
    "norms not summed": ("tp2-ep2", "gradients"),
    "bias of every rank": ("tp2", "gradients"),
    "frozen experts end gradients": ("tp2-ep2", "gradients"),
}


SHARDED = (*NORMED, "GptOssForCausalLM")  # whose checkpoints have experts as the policy has them
"""Families of which it is shown how they lie."""
SHOWN_BY = {"bias of every rank": BIASED, "routes of another rank": NORMED[1], "experts counted in a part": NORMED[1]}


def faults_of(family: str) -> list[str]:
    """Those of layouts that the family is in: experts make most of them, and some are shown by one family alone."""
    suits = {layout.name: layout.suits(family) and family in layout.families for layout in LAYOUTS}
    return [
        fault
        for fault, (layout, _) in FAULTS.items()
        if suits[layout] and (family == SHOWN_BY[fault] if fault in SHOWN_BY else is_split(family))
    ]


def kind_of(fault: str) -> str:
    return ADAPTED if fault == "frozen experts end gradients" else "float64"


def is_split(family: str) -> bool:
    """Whether it has experts."""
    return "Moe" in family or family.startswith(("GptOss", "Deepseek", "MiniMax"))


def make_policy(
    path: Path,
    dtype: torch.dtype,
    meshes: Meshes | None,
    activations: Activations = PLAIN,
    *,
    adapted: bool = False,
    is_known: bool = True,
    is_given: bool = True,
) -> Policy:
    """Without meshes: one process, nothing sharded. An adapter is one of some steps: neither of its halves is zero.
    `is_given`: routers take the experts of a batch that has them."""
    compute = "batched_mm" if dtype == torch.float64 else "grouped_mm"  # which has no float64
    model = empty_model(read_config(str(path)), experts=compute if is_split(path.name) else "grouped_mm").to(dtype)
    policy = Policy(model, head_chunk_tokens=5)
    if is_split(path.name) and is_given:
        policy.routers.accept_routes(policy.decoder_layers)
    if adapted:
        policy.adapter = add_adapter(model, Lora(rank=8, targets=_targets(path.name)), dtype=dtype)
        model.to(dtype)
    if dtype == torch.float64:
        for layer in policy.decoder_layers:
            layer.forward = never_narrower(layer.forward)
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):  # no compiler is needed
        keep_activations(policy.decoder_layers, activations, torch.device("cpu"))
    if meshes is not None:
        unknown = patch.object(load, "expert_modules", lambda model: iter(()))
        with nullcontext() if is_known else unknown:
            load.shard(policy, dtype=dtype, experts=compute, meshes=meshes)
    begin_adapter(model, seed=0, device=torch.device("cpu"))
    fill(model, path, device=torch.device("cpu"))
    if policy.routers.replay:
        check_replay(policy)
    move_adapter(policy)
    return policy


def _targets(family: str) -> Any:
    """Every linear layer, and experts where they can be adapted."""
    dense = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "experts")
    return dense if family == "Glm4MoeForCausalLM" else "all-linear"


@torch.no_grad()
def move_adapter(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            whole = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(0.1 * share(whole, parameter))


def measure(
    policy: Policy, meshes: Meshes | None, ranks: Ranks, optimizer: str, reshard_after: ReshardAfter = "forward"
) -> dict[str, Any]:
    """Gradients at version 0, then metrics and weights of three steps. A collective of the layout."""
    is_wide = next(policy.parameters()).dtype == torch.float64
    with NeverNarrower() if is_wide else nullcontext():
        return _measure(policy, meshes, ranks, optimizer, reshard_after)


def _measure(
    policy: Policy, meshes: Meshes | None, ranks: Ranks, optimizer: str, reshard_after: ReshardAfter
) -> dict[str, Any]:
    found: dict[str, Any] = {"gradients": gradients(policy, meshes, reshard_after)}
    policy.zero_grad()
    stepped = make_optimizer(policy, policy.decoder_layers, Train(optimizer=optimizer, weight_decay=0.1))
    found["metrics"] = [
        values(_step(policy, stepped, _plan(meshes, step, policy.routers.replay), ranks, reshard_after))
        for step in range(STEPS)
    ]
    found["weights"] = {name: _whole(parameter) for name, parameter in _trained(policy)}
    return found


def gradients(policy: Policy, meshes: Meshes | None, reshard_after: ReshardAfter = "forward") -> dict[str, Tensor]:
    """Of all that is trained, whole. A collective of the layout."""
    plan = _plan(meshes, 0)
    readings = Readings()
    policy.routers.forget(for_loss=True)
    for pack in passes(policy, plan.packs, reshard_after):
        loss = pack_loss(policy, pack, plan.counts, _loss(), readings)
        if len(policy.routers):
            loss = loss + AUX_LOSS / plan.num_tokens * policy.routers.balance_loss(policy.context)
        loss.backward()
    return {name: _whole(parameter.grad) for name, parameter in _trained(policy)}


def in_parts(policy: Policy, ranks: Ranks) -> set[str]:
    """What a rank can send from where it lies, which is its part of what a checkpoint has; all else it has whole. A
    collective of the layout."""
    copies = ranks.meshes.root["replicate"].size()
    weights = ShardedWeights(policy, torch.float32, copies=copies, num_ranks=ranks.num, max_parts=16)
    whole = {name: tensor.clone() for name, tensor in iterate_weights(policy, dtype=torch.float32)}
    parts, index = ranks.num // copies, ranks.rank % (ranks.num // copies)
    for lying, (name, tensor) in zip(weights.lying, weights.tensors(), strict=True):
        expected = whole.pop(name)
        assert (lying.name, lying.dtype, lying.shape) == (name, expected.dtype, tuple(expected.shape))
        assert torch.equal(tensor, expected if lying.dim is None else expected.chunk(parts, lying.dim)[index]), name
    assert not whole
    return {lying.name for lying in weights.lying if lying.dim is not None}


def _trained(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad)


class NeverNarrower(TorchFunctionMode):
    """What is float64 stays it. Families go to float32 in norms and routers, and their rounding there depends on how
    many rows are computed at once: without it, only the layout can make a difference."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def never_narrower(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For what is computed again in a backward pass, within which torch enters no mode."""

    def widely(*args: Any, **kwargs: Any) -> Any:
        with NeverNarrower():
            return forward(*args, **kwargs)

    return widely


def _step(
    policy: Policy, optimizer: torch.optim.Optimizer, plan: Plan, ranks: Ranks, reshard_after: ReshardAfter
) -> Any:
    """Experts are balanced, too, where there are any."""
    return train_step(
        policy,
        optimizer,
        plan,
        rl_loss=_loss(),
        lr=1e-3,
        max_grad_norm=1.0,
        ranks=ranks,
        ledger=Ledger("test"),
        balance=Balance(aux_loss=AUX_LOSS if len(policy.routers) else 0.0),
        reshard_after=reshard_after,
    )


def _loss() -> Any:
    return policy_loss("mis", {"low": 1e-9, "high": 1e9})


def _plan(meshes: Meshes | None, step: int, replay: Replay = NOTHING) -> Plan:
    """The second step has the experts of all but each sample's last two tokens given."""
    batch = make_batch(LENGTHS, packs=PACKS, supervised=[3], step=step, seed=step)
    if replay and step == 1:
        num_routed = batch.lengths - 2
        routes = replay.drawn(int(num_routed.sum())).numpy().astype("uint8")
        batch = dataclasses.replace(batch, routes=routes, num_routed=num_routed)
    if meshes is None:
        return plan_step(batch, rank=0, num_ranks=1)
    return plan_step(batch, rank=meshes.data_rank, num_ranks=meshes.num_data, context=meshes.context)


@torch.no_grad()
def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@contextmanager
def planted(fault: str, policy: Policy, meshes: Meshes) -> Iterator[None]:
    """A mistake that the comparison must see."""
    if fault in _PATCHED:
        with patch.object(*_PATCHED[fault](policy)):
            yield
    else:
        _CHANGED[fault](policy, meshes)
        yield


def _swap_experts(policy: Policy, _: Meshes) -> None:
    for module in expert_modules(policy.model):
        for parameter in module.parameters(recurse=False):
            local = parameter.to_local()  # type: ignore[attr-defined]
            with torch.no_grad():
                local.copy_(local.flip(0))


def _divide_by_the_wrong_mesh(policy: Policy, meshes: Meshes) -> None:
    for module in expert_modules(policy.model):
        module.set_gradient_divide_factor(meshes.experts["ep"].size())  # type: ignore[operator]


def _sum_norms_twice(policy: Policy, meshes: Meshes) -> None:
    for module in _named(policy, "q_norm"):
        _use_weight(module, lambda weight: meshes.tensor.enter(meshes.tensor.enter(weight)))


def _sum_no_norms(policy: Policy, _: Meshes) -> None:
    for module in _named(policy, "q_norm"):
        _use_weight(module, lambda weight: weight)


def _add_the_bias_of_every_rank(policy: Policy, meshes: Meshes) -> None:
    for module in _named(policy, "o_proj"):
        module.forward = lambda x, module=module: meshes.tensor.leave(linear(x, module.weight.to_local(), module.bias))


_CHANGED: dict[str, Callable[[Policy, Meshes], None]] = {
    "experts swapped": _swap_experts,
    "wrong divisor": _divide_by_the_wrong_mesh,
    "norms summed twice": _sum_norms_twice,
    "norms not summed": _sum_no_norms,
    "bias of every rank": _add_the_bias_of_every_rank,
}


_given, _routed, _set_all_reduce = Replay.given, experts._routed, FSDPModule.set_requires_all_reduce

_PATCHED: dict[str, Callable[[Policy], tuple[Any, str, Callable[..., Any]]]] = {
    "boundary ignored": lambda _: (packs, "documents_of", lambda lengths, *more: documents_of([sum(lengths)], *more)),
    "routes of another rank": lambda _: (Replay, "given", lambda replay, layer: _of_other(_given(replay, layer))),
    "experts counted in a part": lambda policy: (type(policy.context), "total", lambda context, part: part),
    "frozen experts end gradients": lambda _: (
        *(experts, "_routed"),
        lambda module, hidden, *more: _routed(module, hidden.detach(), *more),
    ),
    "replicas not summed": lambda _: (
        *(FSDPModule, "set_requires_all_reduce"),
        lambda module, is_last, **more: _set_all_reduce(module, not is_last, **more),
    ),
    "orthogonalised in pieces": lambda _: (muon, "_is_whole_here", lambda parameter: True),
}


def _named(policy: Policy, ending: str) -> list[Any]:
    return [module for name, module in policy.model.named_modules() if name.endswith(ending)]


def _of_other(given_tK: Tensor | None) -> Tensor | None:
    """Routes of tokens in the order of the pack, not in that of the ring's pieces."""
    return given_tK if given_tK is None else given_tK.roll(len(given_tK) // 2, 0)


def _use_weight(module: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Its own forward, with the weight changed on its way."""
    module.forward = Seen(module, {"weight": change}).run
