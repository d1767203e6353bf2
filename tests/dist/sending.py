"""What `steps_worker.py` sends from several ranks, and what receivers get: queues in the place of NCCL and M2N."""

import threading
import weakref
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.m2n_engine import M2NWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.linear import RowParallelLinear

from palestra.core.errors import InfrastructureError
from palestra.model.export import iterate_weights
from palestra.model.policy import Policy
from palestra.model.shards import ShardedWeights
from palestra.train.ranks import Ranks
from palestra.wire.weights.changes_sender import ChangesSender
from palestra.wire.weights.sender import Sender
from palestra.wire.weights.shards_sender import MAX_PARTS, ShardsSender
from tests.unit.wire import fake_m2n
from tests.unit.wire.meeting import CPU, stand_in

DTYPE = torch.bfloat16


class Toy(nn.Module):
    """Takes whatever it is given."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, Tensor] = {}

    def load_weights(self, weights: Any) -> set[str]:
        taken = {name: tensor.clone() for name, tensor in weights}
        self.found |= taken
        return set(taken)


class Receiver:
    """vLLM's side of an engine, in threads of the first rank: it is told what the trainer asks of engines."""

    def __init__(self):
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.model = Toy()
        self._engine = NCCLWeightTransferEngine(WeightTransferConfig(backend="nccl"), config, CPU, self.model)

    def ask(self, what: str, info: dict[str, Any]) -> None:
        if what == "init":
            self._engine.init_transfer_engine(self._engine.parse_init_info(info))
        else:
            work = threading.Thread(target=self._engine.receive_weights, args=[self._engine.parse_update_info(info)])
            work.start()
            self.work = work


class Watched:
    """Passes over the weights, and how many of the tensors that were handed out were there at once."""

    def __init__(self, policy: Policy):
        self._policy, self.most = policy, 0

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        given: list[weakref.ref[Tensor]] = []
        for name, tensor in iterate_weights(self._policy, dtype=DTYPE):
            given = [ref for ref in given if ref() is not None] + [weakref.ref(tensor)]
            self.most = max(self.most, len(given))
            yield name, tensor
            del tensor


def send(policy: Policy, ranks: Ranks) -> dict[str, Any]:
    """A collective. On the first rank everything that was found."""
    with pytest.MonkeyPatch.context() as patches:
        stand_in(patches)
        found = {"whole": _whole(policy, ranks, patches), "changes": _changes(policy, ranks)}
    with pytest.MonkeyPatch.context() as patches:
        return {**found, "shards": _shards(policy, ranks, fake_m2n.stand_in(patches, ranks))}


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in iterate_weights(policy, dtype=DTYPE)}


def _whole(policy: Policy, ranks: Ranks, patches: pytest.MonkeyPatch) -> dict[str, Any]:
    watched, receiver = Watched(policy), Receiver()
    sender = Sender(watched, ranks=ranks, host="127.0.0.1")
    offer = sender.prepare("1.0.1")
    with patches.context() as harm:
        if ranks.is_first:
            harm.setattr(nccl_engine, "open_trainer_endpoint", _nobody_comes)
        error = _send(sender, receiver)
    again = _send(sender, receiver)
    if ranks.is_first:
        receiver.work.join(20)
    return {
        "expected": weights_of(policy),
        "received": receiver.model.found,
        "bytes": offer,
        "errors": ranks.to_first((error, again)),
        "most": ranks.to_first(watched.most),
    }


def _nobody_comes(info: Any) -> Any:
    raise RuntimeError("nobody came")


def _send(sender: Sender, receiver: Receiver) -> str:
    try:
        sender.send(receiver.ask, num_workers=1, is_new_group=True, deadline_s=20)  # type: ignore[arg-type]
    except InfrastructureError as failure:
        return str(failure)
    return ""


def _changes(policy: Policy, ranks: Ranks) -> dict[str, Any]:
    sender, before = (
        ChangesSender(lambda: iterate_weights(policy, dtype=DTYPE), ranks=ranks, host=""),
        weights_of(policy),
    )
    for _ in sender.passing(iterate_weights(policy, dtype=DTYPE), "1.0.1"):
        pass
    with torch.no_grad():
        for parameter in policy.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.view(-1)[3:5] += 1
    offer = sender.prepare("1.0.2")
    for patch in sender._patches:
        before[patch.name].view(-1)[patch.at_C.long()] = patch.values_C
    return {
        "expected": weights_of(policy),
        "patched": before,
        "offer": offer,
        "kept": ranks.to_first(sum(tensor.nbytes for tensor in sender._past._kept.values())),
    }


class Split(nn.Module):
    """Holds its half of two matrices of each layer, named as in a checkpoint, split by columns; takes others whole."""

    def __init__(self, weights: dict[str, Tensor], rank: int):
        super().__init__()
        self.found: dict[str, Tensor] = {}
        self.mine = {name: self._half(tensor) for name, tensor in weights.items() if self.is_split(name)}
        self.rank = rank

    @staticmethod
    def is_split(name: str) -> bool:
        return name.endswith(("o_proj.weight", "down_proj.weight")) and ".experts." not in name

    @staticmethod
    def _half(whole: Tensor) -> nn.Parameter:
        parameter: Any = nn.Parameter(torch.zeros(whole.shape[0], whole.shape[1] // 2, dtype=whole.dtype), False)
        owner = SimpleNamespace(tp_size=2)
        parameter.weight_loader, parameter.input_dim = MethodType(RowParallelLinear.weight_loader, owner), 1
        return parameter

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.mine.items()

    def load_weights(self, weights: Any) -> None:
        self.found |= {name: tensor.clone() for name, tensor in weights}

    def put_together(self, other: "Split") -> dict[str, Tensor]:
        halves = {name: torch.cat([mine, other.mine[name]], 1).detach() for name, mine in self.mine.items()}
        return halves | self.found


class Workers:
    """vLLM's side of two workers of one engine, in threads of the first rank."""

    def __init__(self, weights: dict[str, Tensor]):
        self.models = [Split(weights, rank) for rank in range(2)]
        self._engines = [self._engine(model) for model in self.models]
        self.are_dead = False

    def ask(self, what: str, info: dict[str, Any]) -> None:
        """In order: the first one tells the second where things go."""
        if self.are_dead:
            return
        self.work = [threading.Thread(target=self._do, args=(engine, what, info)) for engine in self._engines]
        for work in self.work:
            work.start()
            if what == "init":
                work.join(20)

    def _do(self, engine: M2NWeightTransferEngine, what: str, info: dict[str, Any]) -> None:
        if what == "init":
            engine.init_transfer_engine(engine.parse_init_info(info))
        else:
            engine.receive_weights(engine.parse_update_info(info))

    @staticmethod
    def _engine(model: Split) -> M2NWeightTransferEngine:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=2, rank=model.rank, pipeline_parallel_size=1)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        return M2NWeightTransferEngine(WeightTransferConfig(backend="nccl_m2n"), config, CPU, model)


def _shards(policy: Policy, ranks: Ranks, exchange: fake_m2n.Exchange) -> dict[str, Any]:
    expected = weights_of(policy)
    workers, copies = Workers(expected), ranks.meshes.root["replicate"].size()

    def sender(max_parts: int) -> ShardsSender:
        lying = ShardedWeights(policy, DTYPE, copies=copies, num_ranks=ranks.num, max_parts=max_parts)
        return ShardsSender(lying, ranks=ranks, host="127.0.0.1")

    sends = sender(MAX_PARTS)
    offer = sends.prepare("1.0.2")
    ask: Any = workers.ask
    sends.send(ask, num_workers=2, is_new_group=True, deadline_s=20)
    for work in workers.work if ranks.is_first else ():
        work.join(20)
    workers.are_dead, error = True, ""
    try:
        sends.send(ask, num_workers=2, is_new_group=False, deadline_s=0.5)
    except InfrastructureError as failure:
        error = str(failure)
    workers.are_dead = False
    sends.send(ask, num_workers=2, is_new_group=True, deadline_s=20)
    for work in workers.work if ranks.is_first else ():
        work.join(20)
    return {
        "expected": expected,
        "received": workers.models[0].put_together(workers.models[1]),
        "loaded": [set(model.found) for model in workers.models],
        "offer": offer,
        "in_parts": {tensor.name for tensor in sends._shards._weights.lying if tensor.dim is not None},
        "moved": exchange.moved,
        "errors": ranks.to_first(error),
        "beyond": sender(ranks.num - 1).prepare("1.0.2"),
    }
