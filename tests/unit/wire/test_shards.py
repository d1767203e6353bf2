"""Versions that are sent from where they lie: vLLM's own classes at both ends and its own models, on the CPU, and a
stand-in for what moves the parts.

No GPU has seen this. What is tested is the contract: after a send an engine holds what the trainer has, to the bit,
whatever of it lies in parts; or it says why not.
"""

import asyncio
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.config.weight_transfer import WeightTransferConfig

from palestra.core.errors import InfrastructureError, UserError
from palestra.model.export import iterate_weights
from palestra.model.shards import Lying
from palestra.wire.weights import files
from tests.unit.model import tiny
from tests.unit.wire import fake_m2n
from tests.unit.wire.fake_m2n import CPU, Exchange
from tests.unit.wire.meeting import Trainer
from tests.unit.wire.real_model import change_some, configured, model_of, same

pytestmark = pytest.mark.slow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, as vLLM's layers are imported
    from vllm.config import VllmConfig
    from vllm.distributed import parallel_state
    from vllm.distributed.weight_transfer.m2n_engine import M2NWeightTransferEngine
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.weight_utils import composed_weight_loader, default_weight_loader

    from palestra.wire.weights import sender
    from palestra.wire.weights.in_place import require_in_place
    from palestra.wire.weights.sender import Offer
    from palestra.wire.weights.shards_sender import ShardsSender
    from palestra.wire.weights.vllm_shards import ShardsEngine

BF16 = torch.bfloat16
Weights = dict[str, torch.Tensor]
LATE_S = 1.0
COPIES, PARTS = 2, 2


class Rank:
    """One of a trainer's, all in threads."""

    device = CPU

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Any]):
        self.rank, self.num, self._barrier, self._slots = rank, len(slots), barrier, slots

    def from_first(self, thing):
        return self._all(thing)[0]

    def to_first(self, thing):
        found = self._all(thing)
        return [thing] if self.rank else found

    def _all(self, thing: Any) -> list[Any]:
        self._slots[self.rank] = thing
        self._barrier.wait(20)
        found = list(self._slots)
        self._barrier.wait(20)
        return found


@dataclass
class Cut:
    """What one rank has of the weights: parts of what has an even number of rows and is no expert's."""

    weights: Callable[[], Weights]
    rank: int
    leaves_out: str = ""
    swaps: bool = False
    copies: int = COPIES

    @property
    def lying(self) -> list[Lying]:
        return [
            Lying(name, tensor.dtype, tuple(tensor.shape), self._dim(name, tensor))
            for name, tensor in self.weights().items()
            if name != self.leaves_out
        ]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        index = (self.rank + self.swaps) % PARTS
        for tensor in self.lying:
            whole = self.weights()[tensor.name]
            yield tensor.name, whole if tensor.dim is None else whole.chunk(PARTS, tensor.dim)[index]

    @staticmethod
    def _dim(name: str, tensor: torch.Tensor) -> int | None:
        return 0 if tensor.ndim and tensor.shape[0] % PARTS == 0 and ".experts." not in name else None


class AllRanks:
    """Their senders, as if they were one."""

    def __init__(self, make: Callable[[int], Cut]):
        num = COPIES * PARTS
        barrier, slots = threading.Barrier(num), [None] * num
        self.errors: list[str] = [""] * num
        self.senders = [
            ShardsSender(make(rank), ranks=Rank(rank, barrier, slots), host="127.0.0.1") for rank in range(num)
        ]

    def prepare(self, mark: str) -> Offer | None:
        return self.senders[0].prepare(mark)

    def send(self, ask: Any, **options: Any) -> None:
        def send(rank: int) -> None:
            try:
                self.senders[rank].send(lambda *_: pytest.fail("only the first one asks"), **options)
            except InfrastructureError as failure:
                self.errors[rank] = str(failure)

        others = [threading.Thread(target=send, args=[rank]) for rank in range(1, len(self.senders))]
        for other in others:
            other.start()
        try:
            self.senders[0].send(ask, **options)
        finally:
            for other in others:
                other.join(20)


class Engine:
    """An engine as the orchestrator's client sees it, with real models of `workers` that share its matrices."""

    def __init__(self, config: VllmConfig, workers: int = 1, *, fails_at: str = ""):
        self._workers, self._config, self._fails_at = workers, config, fails_at
        self.calls: list[str] = []
        self.models, self._engines = [], []
        for rank in range(workers):
            with self._as_worker(rank):
                self.models.append(model_of(config))
                with torch.no_grad():
                    for tensor in self.models[-1].state_dict().values():
                        tensor.zero_()
                parallel = SimpleNamespace(
                    data_parallel_index=0, world_size=workers, rank=rank, pipeline_parallel_size=1
                )
                of_rank: Any = SimpleNamespace(parallel_config=parallel, model_config=config.model_config)
                transfer = WeightTransferConfig(backend="files-or-shards")
                self._engines.append(ShardsEngine(transfer, of_rank, CPU, self.models[-1]))

    async def init_transfer(self, info: dict[str, Any], *, deadline_s: float) -> None:
        self.calls.append(f"init at {info['rank_offset']} of {info['world_size']}")
        if self._fails_at == "init":
            raise InfrastructureError("the engine died")
        await asyncio.to_thread(self._each, lambda engine: engine.init_transfer_engine(engine.parse_init_info(info)))

    async def update_by_transfer(self, info: dict[str, Any], *, deadline_s: float) -> None:
        self.calls.append("update")
        if self._fails_at == "update":
            raise InfrastructureError("the engine died")
        if self._fails_at == "half":
            self._die_after(len(info["names"]) // 2)
        await asyncio.to_thread(self._each, lambda engine: self._update(engine, info))

    def _die_after(self, num: int) -> None:
        [receiver] = [engine._receiver for engine in self._engines]
        reshard, left = receiver._reshard, iter(range(num))

        def die(*arguments: Any) -> None:
            if next(left, None) is None:
                raise RuntimeError("the engine died")
            reshard(*arguments)

        receiver._reshard = die

    def _update(self, engine: ShardsEngine, info: dict[str, Any]) -> None:
        with torch.no_grad():
            engine.update_weights(info)
            engine.finish_weight_update()

    def start(self) -> None:
        """The orchestrator does it before anybody meets."""
        for engine in self._engines:
            engine.start_weight_update()

    def holds(self, weights: Weights) -> bool:
        for rank, model in enumerate(self.models):
            with self._as_worker(rank), torch.no_grad():
                expected = model_of(self._config)
                expected.load_weights(iter(weights.items()))  # type: ignore[operator]
                if not same(dict(model.state_dict()), dict(expected.state_dict())):
                    return False
        return True

    def _each(self, do: Callable[[ShardsEngine], None]) -> None:
        """One after the other: whose part a process loads, vLLM knows but once."""
        for rank, engine in enumerate(self._engines):
            with self._as_worker(rank):
                do(engine)

    def _as_worker(self, rank: int) -> Any:
        return patch.multiple(parallel_state.get_tp_group(), world_size=self._workers, rank_in_group=rank)


class Bench:
    def __init__(self, config: VllmConfig, versions: list[Weights], exchange: Exchange):
        self.config, self.versions, self.exchange, self.version = config, versions, exchange, 0

    def trainer(self, *, deadline_s: float = 20, width: int = 1, **cut: Any) -> Trainer:
        def make(rank: int) -> Cut:
            return Cut(lambda: self.versions[self.version], rank, **cut)

        sends: Any = lambda *_, **__: AllRanks(make)  # noqa: E731
        return Trainer({}, deadline_s=deadline_s, sends=sends, width=width)

    async def send(self, trainer: Trainer, version: int, engine: Engine) -> BaseException | None:
        self.version, trainer.error = version, ""
        engine.start()
        [found] = await trainer.send_to(engine)
        return found


@pytest.fixture(scope="module", params=["Glm4MoeForCausalLM", "Qwen3ForCausalLM"])
def path(request, tmp_path_factory) -> Path:
    """With experts and a router's bias, untied; and dense and tied."""
    return tiny.build(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="module")
def vllm_config(path) -> Iterator[VllmConfig]:
    with configured(path) as config:
        yield config


@pytest.fixture(scope="module")
def versions(path) -> list[Weights]:
    weights = {name: tensor.clone() for name, tensor in iterate_weights(tiny.unsharded(path), dtype=BF16)}
    return [weights, change_some(weights, torch.Generator().manual_seed(0))]


@pytest.fixture
def bench(vllm_config, versions, monkeypatch) -> Bench:
    """What vLLM makes of weights for CPUs is left out: engines on CPUs are sent nothing."""
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod):
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)
    return Bench(vllm_config, versions, fake_m2n.stand_in(monkeypatch))


@pytest.mark.parametrize("workers", [1, 2])
async def test_after_a_send_an_engine_holds_what_the_trainer_has(bench, workers):
    """Written in place and loaded, from parts and from copies; vLLM takes the model apart for it, and counts."""
    trainer, engine = bench.trainer(width=workers), Engine(bench.config, workers)
    storage = {name: tensor.data_ptr() for name, tensor in engine.models[0].named_parameters()}
    assert await bench.send(trainer, 0, engine) is None
    assert engine.holds(bench.versions[0])
    assert await bench.send(trainer, 1, engine) is None
    assert engine.holds(bench.versions[1])
    assert not engine.holds(bench.versions[0]), "control"
    assert engine.calls == [f"init at 4 of {4 + workers}", "update", "update"]
    assert {name: tensor.data_ptr() for name, tensor in engine.models[0].named_parameters()} == storage
    assert bench.exchange.moved == {(PARTS, 1), (1, 1), (PARTS, workers)}
    split = ("o_proj.weight", "down_proj.weight")
    in_place = {name for name in bench.versions[0] if name.endswith(split) and ".experts." not in name}
    assert engine._engines[0]._receiver.written == in_place


async def test_a_version_may_come_as_files_in_between(bench, tmp_path):
    """As one does that an engine begins with, or missed: what is written in place still finds its place."""
    trainer, engine = bench.trainer(), Engine(bench.config)
    assert await bench.send(trainer, 0, engine) is None
    files.stage(tmp_path / "v1", 1, 1, iter(bench.versions[1].items()))
    engine.start()
    await engine.update_by_transfer({"directory": str(tmp_path / "v1"), "version": 1}, deadline_s=20)
    assert engine.holds(bench.versions[1])
    assert await bench.send(trainer, 0, engine) is None
    assert engine.holds(bench.versions[0])
    with pytest.raises(InfrastructureError, match="start a new update"):
        await engine.update_by_transfer({"directory": str(tmp_path / "v1"), "version": 1}, deadline_s=20)


def test_the_offer_says_how_much_is_gathered_nowhere(bench):
    offer, weights = bench.trainer().sender.prepare("1"), bench.versions[0]
    vocabulary = [name for name in weights if "embed" in name or "lm_head" in name]
    assert all(weights[name].shape == (31, 32) for name in vocabulary)
    gathered = [name for name in weights if ".experts." in name or name in vocabulary]
    assert offer.sent_bytes == offer.full_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert offer.shard_bytes == offer.full_bytes - sum(weights[name].nbytes for name in gathered)


async def test_parts_in_another_order_would_be_seen(bench):
    engine = Engine(bench.config)
    assert await bench.send(bench.trainer(swaps=True), 1, engine) is None
    assert not engine.holds(bench.versions[1])


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.q_proj.weight"])
async def test_what_is_not_sent_is_missed_whether_it_is_written_or_loaded(bench, name):
    failure = await bench.send(bench.trainer(leaves_out=name), 1, Engine(bench.config))
    assert isinstance(failure, InfrastructureError)
    assert "does not cover the model" in str(failure)
    assert "model.layers.1.self_attn" in str(failure)


async def test_what_was_not_written_does_not_count_as_loaded(bench, monkeypatch):
    engine = Engine(bench.config)
    receiver, name = engine._engines[0]._receiver, "model.layers.1.self_attn.o_proj.weight"
    reshard = receiver._reshard

    def lose(comm: int, stream: Any, meta: Any, placements: Any, place: torch.Tensor) -> None:
        if meta.name == name:
            M2NWeightTransferEngine._reshard(receiver, comm, stream, meta, placements, place.clone())
        else:
            reshard(comm, stream, meta, placements, place)

    monkeypatch.setattr(receiver, "_reshard", lose)
    failure = await bench.send(bench.trainer(), 1, engine)
    assert f"parameter {name} got nothing" in str(failure)


ONE_FAMILY = pytest.mark.parametrize("path", ["Qwen3ForCausalLM"], indirect=True)  # where the model does not matter


@ONE_FAMILY
@pytest.mark.parametrize("at", ["init", "update", "half"])
async def test_all_ranks_are_free_of_an_engine_that_died_by_the_deadline(bench, at):
    """Whether as they met or as they sent; and meet the next one."""
    trainer = bench.trainer(deadline_s=LATE_S)
    failure = await bench.send(trainer, 0, Engine(bench.config, fails_at=at))
    assert isinstance(failure, InfrastructureError)
    late = f"waited {LATE_S:.0f} s for engines to receive a version (sync.deadline_s)"
    assert late in trainer.error
    assert all(late in error for error in trainer.sender.errors[1:])  # type: ignore[attr-defined]
    assert not any(thread.name.endswith("(_work)") for thread in threading.enumerate())
    again, trainer.met = Engine(bench.config), []
    trainer.deadline_s = 20
    assert await bench.send(trainer, 1, again) is None
    assert again.holds(bench.versions[1])


@ONE_FAMILY
async def test_no_rank_goes_on_where_one_has_failed(bench, monkeypatch):
    trainer, engine = bench.trainer(), Engine(bench.config)
    assert await bench.send(trainer, 0, engine) is None
    trainer.deadline_s = 3 * LATE_S  # of those that wait for the one that has failed
    senders = trainer.sender.senders  # type: ignore[attr-defined]
    with monkeypatch.context() as harm:
        harm.setattr(fake_m2n, "TAKE_S", 1)
        harm.setattr(senders[2], "_transfer", lambda engine: 1 / 0)
        assert await bench.send(trainer, 1, engine) is not None
    assert "ZeroDivisionError" in trainer.error
    assert {*trainer.sender.errors[1:]} == {trainer.error}  # type: ignore[attr-defined]
    assert [sender._engine for sender in senders] == [None] * 4, "all meet anew"


@ONE_FAMILY
async def test_an_engine_that_lost_its_weights_place_is_not_written_to(bench):
    trainer, engine = bench.trainer(), Engine(bench.config)
    assert await bench.send(trainer, 0, engine) is None
    trainer.gives_up = True
    moved = engine.models[0].get_parameter("model.layers.0.self_attn.o_proj.weight")
    moved.data = moved.data.clone()
    failure = await bench.send(trainer, 1, engine)
    assert "o_proj.weight lies elsewhere than when the engine met the trainer; start it again" in str(failure)


@ONE_FAMILY
async def test_a_trainer_that_meets_nobody_leaves_it_at_that(bench, monkeypatch):
    """What nothing can break off transfers nothing afterwards: the next send has the weights to itself."""
    let_go = threading.Event()
    monkeypatch.setattr(sender, "_ABORTED_S", 0.2)
    with monkeypatch.context() as nobody:
        nobody.setattr(fake_m2n.m2n_trainer, "trainer_init", lambda info, rank: let_go.wait(20) and None)
        trainer = bench.trainer(deadline_s=LATE_S)
        assert await bench.send(trainer, 0, Engine(bench.config, fails_at="init")) is not None
    assert "waited 1 s" in trainer.error
    again, trainer.met, trainer.deadline_s = Engine(bench.config), [], 20
    assert await bench.send(trainer, 1, again) is None
    let_go.set()
    assert again.holds(bench.versions[1])


# --- what is refused


@ONE_FAMILY
def test_nothing_is_sent_where_nothing_can_move_it(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "nccl.m2n", None)
    for make in (bench.trainer, lambda: Engine(bench.config)):
        with pytest.raises(
            UserError, match=r"sync.kind=nccl_m2n: .*nccl-extensions.*; install it, or use sync.kind=nccl"
        ):
            make()


@ONE_FAMILY
def test_a_tensor_that_cannot_be_moved_is_named(bench):
    bench.versions[0]["steps"] = torch.tensor(1)
    try:
        with pytest.raises(UserError, match=r"cannot send parameter 'steps' has rank 0; .*use sync\.kind=nccl"):
            bench.trainer()
    finally:
        del bench.versions[0]["steps"]


def test_an_engine_refuses_weights_that_are_others_than_a_checkpoints_but_for_experts(bench):
    model = model_of(bench.config)
    experts = [module for module in model.modules() if hasattr(getattr(module, "quant_method", None), "moe_kernel")]
    for module in experts:
        module.quant_method.moe_kernel = object()  # type: ignore[union-attr]
    require_in_place(model, kind="nccl_m2n", loads_experts=True)
    model.get_parameter("model.norm.weight").weight_loader = composed_weight_loader(default_weight_loader, torch.neg)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"sync\.kind=nccl_m2n writes .* vLLM transforms weight .* in model\.norm; use"):
        require_in_place(model, kind="nccl_m2n", loads_experts=True)
