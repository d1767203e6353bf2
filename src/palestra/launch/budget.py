"""What training a model costs each device, told from its anatomy: bytes at the peak and published, seconds of a step.

A pure function of the recipe's `train` section, the model's anatomy and the hardware. Legend: P parameters, T tokens of
a pack on one rank, F ranks that share the weights (shard x context_parallel), P ranks of a tensor axis: they have the
same tokens, each computes a part of a layer with them, and all share what is no part of a layer.

With adapters all else is frozen: weights in the precision of the forward pass, without gradients or moments, and only
adapters are published.

What is assumed: experts have equal loads; documents are as long as the mean; gathering weights and adding gradients
overlap with computing, sending tokens to experts does not.
"""

from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from palestra.config.schema import Train
from palestra.launch.hardware import Hardware
from palestra.model.anatomy import FROZEN, TRAINING, Anatomy, Layer

MASTER_BYTES = GRADIENT_BYTES = 4
MOMENT_BYTES = {"adamw": 8, "muon": 4}
"""Of a parameter: two moments, or one for the matrices of layers. The rest has AdamW's in either case."""
CHANGED = (0.01, 0.02)
"""Expected share of bfloat16 weights that one step of reinforcement learning changes."""
PLACE_BYTES, _SENT_PLACE_BYTES = 2, 4  # of a changed weight: staged, and sent
_STEPPED_BYTES = 2 * (MASTER_BYTES + 8) + GRADIENT_BYTES  # of a parameter, read and written by a step of AdamW
_LOGIT_COPIES = 3  # of a chunk's logits in float32 at once
_WORKING = 0.5  # of what a layer keeps: what its backward pass holds beside that
_RECOMPUTED = {"none": 0.0, "selective": 0.0, "full": 1.0}  # forwards of layers, for each step


@dataclass(frozen=True, kw_only=True)
class Work:
    """One step: how many tokens, in documents of which mean length. Assumed where the recipe cannot know it."""

    tokens: int
    document_tokens: int


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of one step; `communication` and `offload` hide behind `compute` as far as they are shorter. `tensor` are the
    sums over a tensor axis, for which everything waits."""

    compute: float
    communication: float
    offload: float
    to_experts: float
    optimizer: float
    tensor: float = 0.0

    @property
    def total(self) -> float:
        return max(self.compute, self.communication, self.offload) + self.to_experts + self.tensor + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Of one device, at its peak: `parts` by purpose. `host_bytes` is what it puts into its host's memory."""

    parts: tuple[tuple[str, int], ...]
    limit_bytes: int
    host_bytes: int
    host_limit_bytes: int
    packs: int
    seconds: Seconds

    @property
    def device_bytes(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def fits(self) -> bool:
        return self.device_bytes <= self.limit_bytes and self.host_bytes <= self.host_limit_bytes


def budget_of(
    train: Train,
    anatomy: Anatomy,
    hardware: Hardware,
    work: Work,
    *,
    node_ranks: int = 8,
    keeps_published: bool = False,
    copies_bytes: int = 0,
) -> Budget:
    """`node_ranks` are the ranks of one node, which its links join. `keeps_published`: all ranks together have what was
    published last in their hosts' memory, as `sync.kind=sparse_nccl` has it. `copies_bytes`: of copies that engines on
    the same device read, as `sync.kind=ipc` has them."""
    state, moved_state = _state(train, anatomy)
    passing, moved_activations = _passing(train, anatomy)
    packs = -(-work.tokens // (train.max_pack_tokens * train.num_data_ranks))
    if packs == 1:  # gradients come as activations go
        state["gradients (float32)"] = max(state["gradients (float32)"] - passing["activations"], 0.0)
    copies = {"copies for engines": copies_bytes} if copies_bytes else {}
    parts = {"runtime": hardware.reserved_bytes, **state, **copies, **passing}
    return Budget(
        parts=tuple((name, round(size)) for name, size in parts.items()),
        limit_bytes=hardware.memory_bytes,
        host_bytes=round(
            moved_state + moved_activations + keeps_published * published_bytes(anatomy) / train.num_ranks
        ),
        host_limit_bytes=hardware.host_bytes,
        packs=packs,
        seconds=replace(
            _seconds(train, anatomy, hardware, work, packs, node_ranks),
            offload=2 * packs * moved_activations / hardware.host_link_bytes_s,
        ),
    )


# --- bytes


@dataclass(frozen=True)
class _Held:
    """Parameters of one copy of the model, those that ranks of a tensor axis all have as often as they are there."""

    trained: int
    frozen: int
    matrices: int  # of those that are trained


def _held(train: Train, anatomy: Anatomy) -> _Held:
    again, layers = train.tensor_parallel - 1, anatomy.layers
    repeated = again * sum(layer.whole for layer in layers)  # most of it matrices
    if anatomy.adapters:
        adapters = anatomy.adapters + again * sum(layer.whole_adapters for layer in layers)
        return _Held(trained=adapters, frozen=anatomy.parameters + repeated, matrices=adapters)
    return _Held(trained=anatomy.parameters + repeated, frozen=0, matrices=anatomy.matrices + repeated)


def _state(train: Train, anatomy: Anatomy) -> tuple[dict[str, float], float]:
    """What is there all the time: this rank's part; and what of it is in the host's memory."""
    shards, held = train.num_sharing, _held(train, anatomy)
    trained, frozen, matrices = held.trained, held.frozen, held.matrices
    by_muon = matrices if train.optimizer == "muon" else 0
    moments = MOMENT_BYTES["muon"] * by_muon + MOMENT_BYTES["adamw"] * (trained - by_muon)
    moved = moments / shards if train.offload_optimizer else 0.0
    return {
        **({"frozen weights": anatomy.itemsize * frozen / shards} if frozen else {}),
        "weights (float32)": MASTER_BYTES * trained / shards,
        "gradients (float32)": GRADIENT_BYTES * trained / shards,
        "optimizer": moments / shards - moved,
    }, moved


def gathered(layer: Layer, train: Train) -> float:
    """Parameters of a layer that one rank computes with: of the experts only those it owns, of split ones its part;
    adapters too."""
    frozen_or_not = layer.whole + layer.split / train.tensor_parallel + layer.experts / train.expert_parallel
    return frozen_or_not + gathered_adapters(layer, train)


def gathered_adapters(layer: Layer, train: Train) -> float:
    dense = layer.whole_adapters + layer.split_adapters / train.tensor_parallel
    return dense + layer.expert_adapters / train.expert_parallel


def _passing(train: Train, anatomy: Anatomy) -> tuple[dict[str, float], float]:
    """What comes and goes while a pack is trained, at the worst moment; and what is in the host's memory meanwhile.

    The worst moment is in the backward pass of the last of the largest layers, or in that of the head.
    """
    tokens = train.max_pack_tokens // train.context_parallel
    largest = max(anatomy.layers, key=lambda layer: gathered(layer, train))
    layer_weights = gathered(largest, train)
    reduced = GRADIENT_BYTES if anatomy.itemsize != GRADIENT_BYTES else 0
    with_gradients = gathered_adapters(largest, train) if anatomy.adapters else layer_weights
    in_layer = with_gradients * (anatomy.itemsize + reduced) + _working(train, anatomy, tokens)
    chunk = min(train.head_chunk_tokens, -(-tokens // train.tensor_parallel))
    head_weights = (GRADIENT_BYTES + (2 * anatomy.itemsize if reduced else 0)) * anatomy.head
    if anatomy.adapters:
        head_weights = 0
    in_head = _LOGIT_COPIES * 4 * chunk * anatomy.vocab_size + head_weights
    kept, moved = _kept(train, anatomy, tokens)
    layers = [gathered(layer, train) for layer in anatomy.layers]
    at_once = min(2 * layer_weights, sum(layers)) if train.reshard_after == "forward" else sum(layers)
    return {
        "weights in use": anatomy.itemsize * (anatomy.root + at_once),
        "activations": kept,
        "at work": max(in_layer, in_head),
    }, moved


def kept_per_token(layer: Layer, train: Train) -> float:
    """Bytes that a layer keeps until its backward pass; `selective` also keeps what comes from other ranks."""
    if train.recompute == "none":
        return saved_per_token(layer, train)
    elsewhere = 1 - 1 / train.tensor_parallel
    arriving = 2 * layer.routed_bytes / train.tensor_parallel if train.expert_parallel > 1 else 0.0
    arriving += layer.sums * layer.input_bytes if train.tensor_parallel > 1 else 0.0
    products = layer.product_bytes - layer.split_product_bytes * elsewhere
    return layer.input_bytes + (products + arriving if train.recompute == "selective" else 0.0)


def saved_per_token(layer: Layer, train: Train) -> float:
    """Bytes that autograd keeps of a layer on one rank."""
    return layer.saved_bytes - layer.split_saved_bytes * (1 - 1 / train.tensor_parallel)


def _kept(train: Train, anatomy: Anatomy, tokens: int) -> tuple[float, float]:
    """On the device and in the host's memory: all but two layers' where activations are moved there."""
    kept = [kept_per_token(layer, train) * tokens for layer in anatomy.layers]
    stays = 2 * max(kept) if train.offload_activations else sum(kept)
    hidden = anatomy.width * tokens * anatomy.itemsize
    return min(stays, sum(kept)) + 2 * hidden, max(sum(kept) - stays, 0.0)


def _working(train: Train, anatomy: Anatomy, tokens: int) -> float:
    """Of one layer: what it computed again, and gradients of what it kept."""
    again = max(saved_per_token(layer, train) for layer in anatomy.layers) * tokens
    return again * (_WORKING + (train.recompute != "none"))


def published_bytes(anatomy: Anatomy) -> int:
    return (anatomy.published_adapters or anatomy.parameters) * anatomy.itemsize


def difference_bytes(anatomy: Anatomy, *, is_sent: bool = False) -> tuple[int, int] | None:
    """Expected, at either end of `CHANGED`; adapters are always published whole."""
    if anatomy.adapters:
        return None
    place = _SENT_PLACE_BYTES if is_sent else PLACE_BYTES
    low, high = (round(share * anatomy.parameters * (anatomy.itemsize + place)) for share in CHANGED)
    return low, high


# --- seconds


def step_flops(anatomy: Anatomy, work: Work) -> float:
    """Of a whole step, as `Anatomy.train_flops` counts them."""
    return anatomy.train_flops([work.document_tokens]) / work.document_tokens * work.tokens


def _seconds(train: Train, anatomy: Anatomy, hardware: Hardware, work: Work, packs: int, node_ranks: int) -> Seconds:
    again = 1 + _RECOMPUTED[train.recompute] / 3
    flops = step_flops(anatomy, work) + (train.tensor_parallel - 1) * _repeated_flops(anatomy, work)
    compute = flops * again / train.num_ranks / (hardware.flops * hardware.mfu)
    rate = hardware.link_bytes_s if train.num_ranks <= node_ranks else hardware.network_bytes_s
    tokens = work.tokens / train.num_ranks
    routed = sum(layer.routed_bytes for layer in anatomy.layers) * tokens * 2 * (2 + _RECOMPUTED[train.recompute])
    owners = train.expert_parallel
    rate_to_experts = hardware.link_bytes_s if owners <= node_ranks else hardware.network_bytes_s
    return Seconds(
        compute=compute,
        communication=_moved_bytes(train, anatomy, packs) / rate,
        offload=0.0,
        to_experts=routed * (1 - 1 / owners) / rate_to_experts,
        optimizer=_optimizer_seconds(train, anatomy, hardware),
        tensor=_tensor_seconds(train, anatomy, hardware, tokens * train.tensor_parallel, node_ranks),
    )


def _moved_bytes(train: Train, anatomy: Anatomy, packs: int) -> float:
    """Of a step, to and from one rank. Weights of layers are gathered twice a pack, once, or once for all packs, those
    of the root at most once a pack; gradients of what is trained are added up in every pack over the ranks that share
    weights, and in the last one over replicas."""
    shards, layers = train.num_sharing, anatomy.layers
    beside_others, beside_owners = 1 - train.tensor_parallel / shards, 1 - train.expert_parallel / shards
    experts = sum(layer.experts for layer in layers) / train.expert_parallel
    adapters = sum(gathered_adapters(layer, train) for layer in layers) * beside_others
    weights = (sum(gathered(layer, train) for layer in layers) - experts) * beside_others + experts * beside_owners
    root = anatomy.root * (1 - 1 / shards)
    times = {"forward": 2 * packs, "backward": packs, "step": 1}[train.reshard_after]
    gathering = anatomy.itemsize * (times * weights + min(times, packs) * root)
    adding = GRADIENT_BYTES * packs * (adapters if anatomy.adapters else weights + root)
    over_replicas = 2 * (1 - 1 / train.replicate) * GRADIENT_BYTES * _held(train, anatomy).trained / shards
    return gathering + adding + over_replicas


def _tensor_seconds(train: Train, anatomy: Anatomy, hardware: Hardware, tokens: float, node_ranks: int) -> float:
    """A sum sends each value out and back; there is one for each of the forward's in the backward pass."""
    sums = sum(layer.sums * layer.input_bytes for layer in anatomy.layers) * (2 + _RECOMPUTED[train.recompute])
    rate = hardware.link_bytes_s if train.tensor_parallel <= node_ranks else hardware.network_bytes_s
    return 2 * (1 - 1 / train.tensor_parallel) * sums * tokens / rate


def _repeated_flops(anatomy: Anatomy, work: Work) -> float:
    """What every rank of a tensor axis computes for itself: products with whole matrices."""
    weights, adapters = (
        sum(sizes) for sizes in zip(*((x.whole, x.whole_adapters) for x in anatomy.layers), strict=True)
    )
    return 2 * work.tokens * ((FROZEN if anatomy.adapters else TRAINING) * weights + TRAINING * adapters)


def _optimizer_seconds(train: Train, anatomy: Anatomy, hardware: Hardware) -> float:
    """What is read and written; with Muon also its products, those of adapters apart, which are small."""
    rate = hardware.host_link_bytes_s if train.offload_optimizer else hardware.memory_bytes_s
    seconds = _STEPPED_BYTES * (anatomy.adapters or anatomy.parameters) / rate
    if train.optimizer == "muon" and not anatomy.adapters:
        flops = train.muon.ns_steps * sum(layer.orthogonal_flops for layer in anatomy.layers)
        seconds += flops / (hardware.flops * hardware.mfu)
    return seconds / train.num_sharing


# --- changes


@dataclass(frozen=True, kw_only=True)
class Change:
    """The same plan with other settings."""

    settings: dict[str, int | str | bool]
    num_ranks: int
    budget: Budget


def changes(
    train: Train,
    anatomy: Anatomy,
    hardware: Hardware,
    work: Work,
    *,
    node_ranks: int,
    keeps_published: bool = False,
    copies_bytes: int = 0,
) -> list[Change]:
    """What each setting of memory would do alone, one step away from what it is; those that a recipe may not have are
    left out."""
    settings_of_all = {"node_ranks": node_ranks, "keeps_published": keeps_published, "copies_bytes": copies_bytes}
    found = []
    for settings in _variants(train):
        try:
            changed = Train.model_validate(train.model_dump() | settings)
        except ValidationError:
            continue
        moves_no_expert = "expert_parallel" in settings and not anatomy.num_experts
        if not _divides(changed, anatomy) or moves_no_expert or (copies_bytes and changed.num_ranks > 1):
            continue
        told = {name: getattr(changed, name) for name in settings}
        found.append(
            Change(
                settings=told,
                num_ranks=changed.num_ranks,
                budget=budget_of(changed, anatomy, hardware, work, **settings_of_all),
            )
        )
    return found


def _divides(train: Train, anatomy: Anatomy) -> bool:
    """As `layout` will want it."""
    if anatomy.num_experts % train.expert_parallel:
        return False
    if anatomy.tensor_divisor % train.tensor_parallel:
        return False
    split = train.tensor_parallel if anatomy.are_heads_split else 1
    dealt = train.context_parallel if train.context_kind == "ulysses" else 1
    return all(layer.attention.heads // split % dealt == 0 for layer in anatomy.layers)


def _variants(train: Train) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"recompute": how} for how in ("full", "selective", "none")]
    found += [{name: here} for name in ("offload_activations", "offload_optimizer") for here in (True, False)]
    found += [{"reshard_after": when} for when in ("forward", "backward", "step")]
    found += [{"optimizer": name} for name in ("muon", "adamw")]
    for factor in (2, 0.5):
        found += [{"shard": train.shard * factor, "replicate": train.replicate / factor}]
        found += [{"context_parallel": train.context_parallel * factor, "shard": train.shard / factor}]
        found += [{"tensor_parallel": train.tensor_parallel * factor, "shard": train.shard / factor}]
        found += [{"shard": train.shard * factor}, {"expert_parallel": train.expert_parallel * factor}]
        found += [{name: getattr(train, name) / factor} for name in ("max_pack_tokens", "head_chunk_tokens")]
    now = train.model_dump()
    return [settings for settings in found if any(now[name] != value for name, value in settings.items())]


def longest_pack(
    train: Train,
    anatomy: Anatomy,
    hardware: Hardware,
    work: Work,
    *,
    node_ranks: int,
    keeps_published: bool = False,
    copies_bytes: int = 0,
) -> int:
    """The largest `train.max_pack_tokens` that fits, in whole thousands of 1,024; 0 if none does."""
    settings = {"node_ranks": node_ranks, "keeps_published": keeps_published, "copies_bytes": copies_bytes}
    low, high = 0, 1 << 14
    while low < high:
        middle = (low + high + 1) // 2
        some = train.model_copy(update={"max_pack_tokens": middle * 1024})
        if budget_of(some, anatomy, hardware, work, **settings).fits:
            low = middle
        else:
            high = middle - 1
    return low * 1024
