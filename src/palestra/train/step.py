"""One training step, the same for SFT and RL: plan (`packs`), execute (forward and backward over packs), commit.

Legend: K tokens of a pack that train something.

The loss is the sum of up to three components. Each is divided by its own number of trained tokens in the whole batch,
over all packs and ranks, so that how samples are packed changes nothing: never a mean of means. The one exception is a
loss that looks at whole rollouts: it sees the samples of a rollout that share a pack, which are all of them unless they
exceed one pack together; `train/rollouts_split` is the share of rollouts that do.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from palestra.algo.losses import LossTerm, PolicyLoss, cross_entropy, effective_sample_share, reference_kl
from palestra.config.schema import Balance, ReshardAfter
from palestra.core.errors import PalestraError
from palestra.core.ledger import Ledger
from palestra.core.metrics import Last, Max, Mean, Metrics, Sum
from palestra.model.holdings import sharding_dims
from palestra.model.load import passes
from palestra.model.policy import Policy
from palestra.model.routers import max_violation
from palestra.train.moments import local
from palestra.train.optimizer import set_lr
from palestra.train.packs import Pack, Plan
from palestra.train.ranks import Ranks
from palestra.train.spread import histogram, spread_metrics

_UNBALANCED = Balance()


def _ignore(_: Tensor) -> None: ...


class Readings:
    """Sums over packs, kept on the device until the step is over. `means` are (total, count); `maxima` scalars;
    `tallies` counts of any shape."""

    def __init__(self):
        self.means: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.tallies: dict[str, Tensor] = {}

    def add(self, name: str, total_and_count: Tensor) -> None:
        known = self.means.get(name)
        self.means[name] = total_and_count if known is None else known + total_and_count

    def raise_to(self, name: str, value: Tensor) -> None:
        known = self.maxima.get(name)
        self.maxima[name] = value if known is None else torch.maximum(known, value)

    def tally(self, name: str, counts: Tensor) -> None:
        known = self.tallies.get(name)
        self.tallies[name] = counts if known is None else known + counts

    def over_all(self, ranks: Ranks) -> tuple[dict[str, Tensor], Metrics]:
        """The sums and the metrics over all ranks, which all have the same names: every rank has a pack."""
        names, maxima = sorted(self.means), sorted(self.maxima)
        metrics: Metrics = {}
        sums: dict[str, Tensor] = {}
        if names:
            totals = ranks.sum(torch.stack([self.means[name].double() for name in names])).cpu()
            sums = dict(zip(names, totals, strict=True))
            metrics |= {name: Mean(*total.tolist()) for name, total in sums.items()}
        if maxima:
            largest = ranks.max(torch.stack([self.maxima[name].double() for name in maxima])).tolist()
            metrics |= {name: Max(value) for name, value in zip(maxima, largest, strict=True)}
        sums |= {name: ranks.sum(self.tallies[name]).cpu() for name in sorted(self.tallies)}
        return sums, metrics


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    *,
    rl_loss: PolicyLoss,
    lr: float,
    max_grad_norm: float,
    ranks: Ranks,
    ledger: Ledger,
    lr_ess_power: float = 0.0,
    balance: Balance = _UNBALANCED,
    reshard_after: ReshardAfter = "forward",
    hear: Callable[[Tensor], None] = _ignore,
) -> Metrics:
    """Turn the policy into the next version. A collective. Metrics are those of the whole batch on every rank.

    With `lr_ess_power` p the learning rate is lr x (effective sample share of the whole batch)^p: 0.5 treats the share
    as a smaller batch under Adam's square-root rule (Huang et al. 2026, arXiv:2602.17616, scale by it; Malladi et al.
    2022, arXiv:2205.10287, on the rule). `hear` is given the log-probabilities [K] of each pack, on the device.
    Errors: PalestraError for a gradient that is not finite; the policy is then unchanged.
    """
    readings = Readings()
    policy.routers.forget(for_loss=balance.aux_loss > 0)
    with ledger.spend("forward_backward"):
        for pack in passes(policy, plan.packs, reshard_after):
            loss = pack_loss(policy, pack, plan.counts, rl_loss, readings, hear)
            if balance.aux_loss:
                loss = loss + balance.aux_loss / plan.num_tokens * policy.routers.balance_loss(policy.context)
            loss.backward()
        ranks.settle()
    with ledger.spend("optimizer"):
        grad_norm = clip_gradients(policy, max_grad_norm)
        if not math.isfinite(grad_norm):
            optimizer.zero_grad()
            raise PalestraError(
                f"step {plan.step}: the gradient's norm is {grad_norm}; lower train.lr or check the rewards"
            )
        sums, metrics = readings.over_all(ranks)
        if plan.counts["rl"]:
            lr *= _effective_share(sums) ** lr_ess_power
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= _expert_metrics(policy, ranks, balance)
    return metrics | _step_metrics(plan, grad_norm, lr, sums)


def pack_loss(
    policy: Policy,
    pack: Pack,
    counts: dict[str, int],
    rl_loss: PolicyLoss,
    readings: Readings,
    hear: Callable[[Tensor], None] = _ignore,
) -> Tensor:
    """The pack's share of the step's loss; summed over all packs of all ranks it is the loss."""
    trainer_logp_K, entropy_K = policy(pack.token_ids, pack.documents, pack.scored, pack.temperature, pack.routes)
    hear(trainer_logp_K.detach())
    loss = trainer_logp_K.sum() * 0.0  # keeps a pack without trained tokens in the graph
    for name, term in _terms(pack, trainer_logp_K, counts, rl_loss).items():
        total = term.loss_T.sum()
        loss = loss + total / counts[name]
        trained_K = pack.weights[name] != 0
        readings.add(f"train/{name}/loss", torch.stack([total.detach().double(), trained_K.sum().double()]))
        readings.add(f"train/{name}/entropy", _mean(entropy_K, trained_K))
        for stat, parts in term.stats.items():
            readings.add(f"train/{name}/{stat}", parts)
    if counts["rl"]:
        trained_K = pack.weights["rl"] != 0
        log_ratio_K = trainer_logp_K.detach() - pack.engine_logp
        readings.tally("train/rl/log_ratio", histogram(log_ratio_K, pack.age, trained_K))
        gap_K = torch.where(trained_K, log_ratio_K.abs(), 0.0)
        readings.add("train/rl/mismatch_abs", _mean(gap_K, trained_K))
        readings.raise_to("train/rl/mismatch_max", torch.cat([gap_K, gap_K.new_zeros(1)]).max())
    return loss


def _terms(pack: Pack, trainer_logp_K: Tensor, counts: dict[str, int], rl_loss: PolicyLoss) -> dict[str, LossTerm]:
    terms = {}
    if counts["rl"]:
        terms["rl"] = rl_loss(trainer_logp_K, pack.engine_logp, pack.advantage, pack.weights["rl"], pack.rollout)
    if counts["ce"]:
        terms["ce"] = cross_entropy(trainer_logp_K, pack.weights["ce"])
    if counts["ref"]:
        terms["ref"] = reference_kl(trainer_logp_K, pack.reference_logp, pack.weights["ref"])
    return terms


def _mean(value_K: Tensor, where_K: Tensor) -> Tensor:
    return torch.stack([torch.where(where_K, value_K, 0.0).sum(dtype=torch.float64), where_K.sum(dtype=torch.float64)])


@torch.no_grad()
def clip_gradients(policy: nn.Module, max_norm: float) -> float:
    """The norm over all ranks before clipping. A collective. Parameters may be on different meshes."""
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    norm = sum_of_squares(gradients).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    alike: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault(gradient.dtype, []).append(local(gradient))
    for dtype, shards in alike.items():
        torch._foreach_mul_(shards, factor.to(dtype))  # pyright: ignore[reportPrivateImportUsage]
    return float(norm)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all values of tensors that may be sharded over several meshes, each value counted once, in float64."""
    alike: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = {}
    for tensor in tensors:
        where = None
        if isinstance(tensor, DTensor):
            where = tensor.device_mesh, sharding_dims(tensor.device_mesh, tensor.placements)
        alike.setdefault(where, []).append(local(tensor))
    sums = []
    for where, shards in alike.items():
        total = get_total_norm(shards).double().square()
        mesh, dims = where if where is not None else (None, ())
        for dim in dims:
            assert mesh is not None
            dist.all_reduce(total, group=mesh.get_group(dim))
        sums.append(total)
    return torch.stack(sums).sum()


def _expert_metrics(policy: Policy, ranks: Ranks, balance: Balance) -> Metrics:
    """How evenly the experts were used; and their biases moved by it."""
    if not len(policy.routers):
        return {}
    load_LE = policy.routers.load(ranks.meshes.tokens)
    if balance.bias_rate:
        policy.routers.update_biases(load_LE, balance.bias_rate)
    metrics: Metrics = {}
    if policy.routers.replay:
        other, known, every = policy.routers.replay.counts(ranks.meshes.tokens)
        metrics = {"train/experts/replayed": Mean(known, every)}
        if known:
            metrics["train/experts/rerouted"] = Mean(other, known)
    violation_L = max_violation(load_LE)
    return metrics | {
        "train/experts/max_violation": Mean(float(violation_L.sum()), len(violation_L)),
        "train/experts/max_violation_worst": Max(float(violation_L.max())),
        "train/experts/dead_share": Mean(float((load_LE == 0).sum()), load_LE.numel()),
        "train/experts/weight_entropy": Mean(*policy.routers.weight_entropy(ranks.meshes.tokens)),
    }


def _step_metrics(plan: Plan, grad_norm: float, lr: float, sums: dict[str, Tensor]) -> Metrics:
    metrics: Metrics = {
        "train/grad_norm": Mean(grad_norm),
        "train/lr": Last(lr),
        "train/tokens": Sum(plan.num_tokens),
        "train/trained_tokens": Sum(max(plan.counts.values())),
        "train/packing/fill": Mean(plan.num_tokens, plan.capacity_tokens),
        "train/rollouts_split": Mean(plan.num_split, plan.num_rollouts),
    }
    if plan.counts["rl"]:
        metrics["train/rl/effective_share"] = Last(_effective_share(sums))
        metrics |= spread_metrics(sums["train/rl/log_ratio"])
    return metrics


def _effective_share(sums: dict[str, Tensor]) -> float:
    return effective_sample_share({name.removeprefix("train/rl/"): parts for name, parts in sums.items()})
