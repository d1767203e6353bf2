"""From a batch to this rank's packs on its device: the plan of a step.

Legend: N tokens of the batch, T tokens of a pack, K tokens of a pack that train something, S samples. Of routes: L
layers, C experts chosen for a token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palestra.core.errors import InfrastructureError
from palestra.model.context import WHOLE, Context
from palestra.model.documents import Documents, documents_of
from palestra.model.replay import NOT_KNOWN
from palestra.wire.batches import COMPONENTS, Batch


@dataclass(frozen=True)
class Pack:
    """One forward. Per-token streams are [K]; `scored` are the K positions in the pack; rollouts count from 0.

    `routes` [T, L, C] are the experts that an engine chose, -1 where nobody knows; [0, 0, 0] where none are known.
    """

    token_ids: Tensor
    documents: Documents
    scored: Tensor
    temperature: Tensor
    engine_logp: Tensor
    reference_logp: Tensor
    advantage: Tensor
    weights: dict[str, Tensor]  # by component
    rollout: Tensor
    age: Tensor
    routes: Tensor = NOT_KNOWN


@dataclass(frozen=True)
class Plan:
    """One rank's part of a step. `counts` are the tokens of weight != 0 of the whole batch, by component."""

    step: int
    packs: tuple[Pack, ...]
    counts: dict[str, int]
    num_tokens: int  # of the whole batch
    capacity_tokens: int
    num_rollouts: int
    num_split: int  # rollouts whose samples are in more than one pack: a loss over whole rollouts sees each pack's part


def plan_step(
    batch: Batch, *, rank: int, num_ranks: int, device: torch.device | str = "cpu", context: Context = WHOLE
) -> Plan:
    """`rank` is one of `num_ranks` that have other packs each; the ranks of a `context` have the same.

    Errors: InfrastructureError for a batch that does not fit these ranks or trains what has no log-probability."""
    check(batch, num_ranks)
    weights = {name: getattr(batch, f"{name}_weight") for name in COMPONENTS}
    per_rank = batch.num_packs // num_ranks
    packs = [_pack(batch, index, device, context) for index in range(rank * per_rank, (rank + 1) * per_rank)]
    pairs = np.unique(np.stack([batch.rollout, batch.pack]), axis=1)
    packs_per_rollout = np.unique(pairs[0], return_counts=True)[1]
    return Plan(
        step=batch.step,
        packs=tuple(packs),
        counts={name: int(np.count_nonzero(weight)) for name, weight in weights.items()},
        num_tokens=batch.num_tokens,
        capacity_tokens=batch.num_packs * batch.max_pack_tokens,
        num_rollouts=len(packs_per_rollout),
        num_split=int((packs_per_rollout > 1).sum()),
    )


def check(batch: Batch, num_ranks: int) -> None:
    where = f"the batch of step {batch.step}"
    if batch.num_packs == 0 or batch.num_packs % num_ranks:
        raise InfrastructureError(
            f"{where} has {batch.num_packs} packs for {num_ranks} ranks; it was made for another run"
        )
    trained = np.stack([getattr(batch, f"{name}_weight") != 0 for name in COMPONENTS])
    starts = batch.offsets[:-1]
    if trained[:, starts].any():
        sample = int(np.flatnonzero(trained[:, starts].any(0))[0])
        raise InfrastructureError(f"{where}: sample {sample} trains its first token, which has no log-probability")
    is_supervised = np.add.reduceat(batch.ce_weight != 0, starts) > 0 if len(starts) else np.zeros(0, bool)
    if (is_supervised & (batch.temperature != 1)).any():
        sample = int(np.flatnonzero(is_supervised & (batch.temperature != 1))[0])
        raise InfrastructureError(
            f"{where}: sample {sample} has supervised tokens at temperature {batch.temperature[sample]}; make it 1"
        )


def _pack(batch: Batch, index: int, device: torch.device | str, context: Context) -> Pack:
    samples = np.flatnonzero(batch.pack == index)
    if not len(samples):
        return _empty_pack(device, context)
    offsets = batch.offsets
    tokens = np.concatenate([np.arange(offsets[sample], offsets[sample + 1]) for sample in samples])
    trained_T = np.zeros(len(tokens), bool)
    for name in COMPONENTS:
        trained_T |= getattr(batch, f"{name}_weight")[tokens] != 0
    scored = np.flatnonzero(trained_T)
    sample_T = np.repeat(samples, batch.lengths[samples])
    rollout_K = np.unique(batch.rollout[sample_T[scored]], return_inverse=True)[1]

    def stream(name: str) -> Tensor:
        return _tensor(getattr(batch, name)[tokens[scored]], np.float32, device)

    return Pack(
        token_ids=_tensor(batch.token_ids[tokens], np.int64, device),
        documents=documents_of(batch.lengths[samples].tolist(), device, context),
        scored=_tensor(scored, np.int64, device),
        temperature=_tensor(batch.temperature[sample_T[scored]], np.float32, device),
        engine_logp=stream("engine_logprobs"),
        reference_logp=stream("reference_logprobs"),
        advantage=stream("advantage"),
        weights={name: stream(f"{name}_weight") for name in COMPONENTS},
        rollout=_tensor(rollout_K, np.int64, device),
        age=_tensor(batch.age[sample_T[scored]], np.int64, device),
        routes=_routes(batch, samples, device),
    )


def _routes(batch: Batch, samples: np.ndarray, device: torch.device | str) -> Tensor:
    if not batch.routes.size:
        return NOT_KNOWN
    routes_TLC = np.full((int(batch.lengths[samples].sum()), *batch.routes.shape[1:]), -1, np.int16)
    start = 0
    for sample in samples.tolist():
        known = batch.routes_of(sample)
        routes_TLC[start : start + len(known)] = known
        start += int(batch.lengths[sample])
    return torch.from_numpy(routes_TLC).to(device, non_blocking=True)


def samples_of(batch: Batch, rank: int, num_ranks: int) -> list[int]:
    """Of all packs of `rank`, in the order in which they are trained."""
    per_rank = batch.num_packs // num_ranks
    packs = range(rank * per_rank, (rank + 1) * per_rank)
    return [sample for index in packs for sample in np.flatnonzero(batch.pack == index).tolist()]


def split(batch: Batch, samples: list[int], logprobs: list[Tensor]) -> list[np.ndarray]:
    """What each of these samples has of the packs' log-probabilities, which are of trained tokens alone."""
    trained_N = np.any([getattr(batch, f"{name}_weight") != 0 for name in COMPONENTS], axis=0)
    offsets = batch.offsets
    num = [int(trained_N[offsets[sample] : offsets[sample + 1]].sum()) for sample in samples]
    joined = torch.cat([of_pack.reshape(-1) for of_pack in logprobs]).float().cpu().numpy()
    return np.split(joined, np.cumsum(num))[:-1]


def _empty_pack(device: torch.device | str, context: Context) -> Pack:
    """Two tokens, none of them trained: a rank without work still takes part in every collective."""
    nothing, no_index = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return Pack(
        token_ids=torch.zeros(2, dtype=torch.int64, device=device),
        documents=documents_of([2], device, context),
        scored=no_index,
        temperature=nothing,
        engine_logp=nothing,
        reference_logp=nothing,
        advantage=nothing,
        weights=dict.fromkeys(COMPONENTS, nothing),
        rollout=no_index,
        age=no_index,
    )


def _tensor(array: np.ndarray, dtype: type, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.array(array, dtype)).to(device, non_blocking=True)
