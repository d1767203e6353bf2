"""Changes that are sent: after them an engine holds what the trainer has, to the bit, or says why it does not.

vLLM's own model, its own receiver and its own way to put patches in place, on the CPU; queues in the place of NCCL.
"""

import asyncio
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config.weight_transfer import WeightTransferConfig

from palestra.core.errors import InfrastructureError, UserError
from palestra.model.export import iterate_weights
from palestra.wire.weights import files
from palestra.wire.weights.changes import Past
from palestra.wire.weights.manifest import read_manifest
from tests.unit.model import tiny
from tests.unit.wire.meeting import CPU, Group, Trainer, stand_in
from tests.unit.wire.real_model import change_some, configured, model_of, same

pytestmark = pytest.mark.slow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, as vLLM's layers are imported
    from vllm.config import VllmConfig
    from vllm.distributed import parallel_state
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader import reload
    from vllm.model_executor.model_loader.weight_utils import composed_weight_loader, default_weight_loader

    from palestra.wire.weights import vllm_engine, vllm_plugin
    from palestra.wire.weights.changes_sender import ChangesSender
    from palestra.wire.weights.coverage import Coverage
    from palestra.wire.weights.in_place import require_in_place
    from palestra.wire.weights.vllm_changes import ChangesEngine
    from palestra.wire.weights.vllm_sent import SentEngine
    from palestra.wire.weights.vllm_shards import ShardsEngine

BF16 = torch.bfloat16
Weights = dict[str, torch.Tensor]


# --- what changed


def past_of(tensors: Weights, *, rank: int = 0, num_ranks: int = 1) -> Past:
    past = Past(rank=rank, num_ranks=num_ranks)
    assert {name: id(tensor) for name, tensor in past.keep(iter(tensors.items()), "0")} == {
        name: id(tensor) for name, tensor in tensors.items()
    }
    return past


def test_a_change_is_where_a_bit_differs():
    before = {
        "a": torch.tensor([[1.0, 0.0, 2.0], [3.0, math.nan, 4.0]], dtype=BF16),
        "still": torch.ones(40, dtype=BF16),
        "scalar": torch.tensor(5.0),
    }
    after = {
        "a": torch.tensor([[1.0, -0.0, 2.0], [7.0, math.nan, 4.0]], dtype=BF16).T.contiguous().T,
        "still": before["still"],
        "scalar": torch.tensor(6.0),
    }
    past = past_of(before)
    found = past.step(after.items(), "1")
    assert [(patch.order, patch.name, patch.shape) for patch in found.patches] == [(0, "a", (2, 3)), (2, "scalar", ())]
    first, second = found.patches
    assert (first.at_C.tolist(), first.at_C.dtype) == ([1, 3], torch.int32)
    assert [str(value) for value in first.values_C.tolist()] == ["-0.0", "7.0"]
    assert (second.at_C.tolist(), second.values_C.tolist()) == ([0], [6.0])
    assert (found.sent_bytes, found.full_bytes) == (2 * (4 + 2) + (4 + 4), 6 * 2 + 40 * 2 + 4)
    assert (past.mark, found.is_whole) == ("1", False)
    assert past.step(after.items(), "2").patches == [], "what was after is before"
    assert past.still().values_C.tolist() == [1.0]


def test_what_cannot_be_told_as_a_change_makes_a_version_whole():
    steps = torch.arange(3)
    assert past_of({"steps": steps, "more": torch.zeros(64)}).step({"steps": steps + 1}.items(), "1").is_whole
    assert not past_of({"steps": steps}).step({"steps": steps}.items(), "1").is_whole
    much = past_of({"a": torch.zeros(100)}).step({"a": torch.ones(100)}.items(), "1")
    assert much.is_whole
    assert much.patches == [], "nobody needs them"


def test_ranks_keep_the_past_among_them():
    """And what they find together is what one finds that keeps all of it."""
    before = {f"w{index}": torch.full((size,), 1.0, dtype=BF16) for index, size in enumerate((300, 100, 100, 90))}
    after = {name: tensor.clone() for name, tensor in before.items()}
    for tensor in after.values():
        tensor[7] = 2.0
    both = [past_of(before, rank=rank, num_ranks=2) for rank in range(2)]
    assert [set(past._kept) for past in both] == [{"w0"}, {"w1", "w2", "w3"}]
    [alone] = [past_of(before).step(after.items(), "1")]
    parts = [past.step(after.items(), "1") for past in both]
    together = sorted((patch for part in parts for patch in part.patches), key=lambda patch: patch.order)
    assert [(patch.name, patch.at_C.tolist()) for patch in together] == [(f"w{index}", [7]) for index in range(4)]
    assert sum(part.sent_bytes for part in parts) == alone.sent_bytes
    assert {part.full_bytes for part in parts} == {alone.full_bytes}


# --- into an engine


@pytest.fixture(scope="module")
def glm(tmp_path_factory) -> Path:
    """Tied to nothing, with experts, shared ones, a router's bias, and fused projections in the engine."""
    return tiny.build(tmp_path_factory.mktemp("models"), "Glm4MoeForCausalLM")


@pytest.fixture(scope="module")
def vllm_config(glm) -> Iterator[VllmConfig]:
    with configured(glm) as config:
        yield config


@pytest.fixture
def second_of_two(vllm_config, monkeypatch) -> None:
    """What is built from now on is the part of the second of two tensor-parallel workers."""
    for group in (parallel_state.get_tp_group(),):
        monkeypatch.setattr(group, "world_size", 2)
        monkeypatch.setattr(group, "rank_in_group", 1)


@pytest.fixture(scope="module")
def versions(glm) -> list[Weights]:
    """Five, each with one element in fifty of every tensor changed since the one before."""
    policy, generator = tiny.unsharded(glm), torch.Generator().manual_seed(0)
    found = [{name: tensor.clone() for name, tensor in iterate_weights(policy, dtype=BF16)}]
    for _ in range(4):
        found.append(change_some(found[-1], generator))
    return found


class Engine:
    """An engine process as the orchestrator's client sees it: a real model, behind the side of the wire that it has."""

    def __init__(self, config: VllmConfig):
        self.model = model_of(config)
        transfer = WeightTransferConfig(backend="files-or-changes")
        self._engine = ChangesEngine(transfer, config, CPU, self.model)

    def load(self, directory: Path, version: int) -> None:
        self._engine.start_weight_update()
        info = {"directory": str(directory), "version": version}
        self._engine.update_weights(info)
        self._engine.finish_weight_update()

    async def init_transfer(self, info: dict[str, Any], *, deadline_s: float) -> None:
        await asyncio.to_thread(self._engine.init_transfer_engine, self._engine.parse_init_info(info))

    async def update_by_transfer(self, info: dict[str, Any], *, deadline_s: float) -> None:
        self._engine.start_weight_update()
        await asyncio.to_thread(self._engine.update_weights, info)
        self._engine.finish_weight_update()

    @property
    def bits(self) -> Weights:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


class Bench:
    """A trainer that has staged version 0, and engines that have loaded it."""

    def __init__(self, config: VllmConfig, versions: list[Weights], staging: Path):
        self._config, self._versions, self._staging = config, versions, staging
        self.trainer = Trainer(versions[0], sends=ChangesSender)
        self.stage(0)

    def stage(self, version: int) -> Path:
        directory, tensors = self._staging / f"v{version}", iter(self._versions[version].items())
        passing = self.trainer.sender.passing(tensors, f"1.0.{version}")
        files.stage(directory, version, 1, passing, mark=f"1.0.{version}")
        assert read_manifest(directory).mark == f"1.0.{version}"
        return directory

    def engine(self, version: int = 0) -> Engine:
        engine = Engine(self._config)
        engine.load(self._staging / f"v{version}", version)
        return engine

    def prepare(self, version: int) -> Any:
        self.trainer.tensors = self._versions[version]
        return self.trainer.sender.prepare(f"1.0.{version}")

    async def send(self, version: int, *engines: Engine) -> list[BaseException | None]:
        """What each engine says to it."""
        self.prepare(version)
        return await self.trainer.send_to(*engines)

    def expected(self, version: int) -> Weights:
        """In an engine that never saw another one."""
        model = model_of(self._config)
        with torch.no_grad():
            model.load_weights(iter(self._versions[version].items()))  # type: ignore[operator]
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture
def bench(vllm_config, versions, tmp_path, monkeypatch) -> Bench:
    stand_in(monkeypatch)
    plain = SimpleNamespace(require_complete=lambda names: None, fed_by_others=list)
    monkeypatch.setattr(vllm_engine, "Coverage", lambda model: plain)
    return Bench(vllm_config, versions, tmp_path)


async def test_after_changes_an_engine_holds_what_the_trainer_has(bench):
    first, second = bench.engine(), bench.engine()
    for version in (1, 2):
        assert await bench.send(version, first, second) == [None, None]
        assert same(first.bits, bench.expected(version))
        assert same(second.bits, bench.expected(version))
        assert not same(first.bits, bench.expected(version - 1)), "control"
    offer = bench.prepare(3)
    assert (offer.base, offer.sent_bytes < 0.1 * offer.full_bytes) == ("1.0.2", True)


async def test_a_worker_that_has_a_part_of_each_matrix_takes_its_part_of_the_changes(bench, second_of_two):
    engine = bench.engine()
    assert engine.bits["model.layers.0.mlp.down_proj.weight"].shape == (32, 32)
    assert await bench.send(1, engine) == [None]
    assert same(engine.bits, bench.expected(1))
    assert not same(engine.bits, bench.expected(0)), "control"


async def test_changes_go_among_weights_that_vllm_has_reloaded(bench, monkeypatch):
    """As its workers do: a whole version takes the model apart, is counted, and puts it together again. What it makes
    of weights for CPUs is left out: engines on CPUs are sent nothing."""
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(vllm_engine, name, getattr(reload, name))
    monkeypatch.setattr(vllm_engine, "Coverage", Coverage)
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod):
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)
    engine = bench.engine()
    storage = {name: tensor.data_ptr() for name, tensor in engine.model.named_parameters()}
    assert await bench.send(1, engine) == [None]
    assert same(engine.bits, bench.expected(1))
    engine.load(bench.stage(2), 2)
    assert await bench.send(3, engine) == [None]
    assert same(engine.bits, bench.expected(3))
    assert {name: tensor.data_ptr() for name, tensor in engine.model.named_parameters()} == storage, "as graphs need it"


async def test_a_version_without_changes_arrives_too(bench):
    engine = bench.engine()
    bench.trainer.tensors = bench._versions[0]
    assert bench.trainer.sender.prepare("1.0.1").sent_bytes == 0
    assert await bench.trainer.send_to(engine) == [None]
    assert same(engine.bits, bench.expected(0))
    assert await bench.send(2, engine) == [None], "it knows which one it holds"
    assert same(engine.bits, bench.expected(2))


@pytest.mark.parametrize("held", ["1.0.0", "1.1.1", ""], ids=["the version before", "another life's", "none"])
async def test_changes_of_other_weights_than_it_holds_are_refused(bench, tmp_path, held):
    """And nothing is touched. A whole version makes up for it."""
    engine = Engine(bench._config)
    if held:
        files.stage(tmp_path / "held", 1, 1, bench._versions[1].items(), mark=held)
        engine.load(tmp_path / "held", 1)
    before = engine.bits
    bench.prepare(1)
    bench.trainer.gives_up = True  # it does not receive
    [failure] = await bench.send(2, engine)
    assert isinstance(failure, InfrastructureError)
    assert f"from weights '1.0.1' to '1.0.2' were sent, but the engine holds '{held or 'none'}'" in str(failure)
    assert same(engine.bits, before)
    bench.trainer.error, bench.trainer.met, bench.trainer.gives_up = "", [], False
    engine.load(bench.stage(2), 2)
    assert await bench.send(3, engine) == [None]
    assert same(engine.bits, bench.expected(3))


@pytest.mark.parametrize("harm", ["a value", "a position", "a patch"])
async def test_what_is_not_what_was_sent_is_refused_before_anything_is_written(bench, monkeypatch, harm):
    engine, seen = bench.engine(), []

    def harmed(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        wanted = torch.int32 if harm == "a position" else BF16
        if tensor.dtype == wanted and not any(other.dtype == wanted for other in seen[:-1]):
            tensor[0] += 1
        return tensor

    if harm == "a patch":
        _drop_one(bench.trainer.sender)
    else:
        monkeypatch.setattr(Group, "on_its_way", staticmethod(harmed))
    [failure] = await bench.send(1, engine)
    assert isinstance(failure, InfrastructureError)
    assert "changes arrived corrupted: their digest is" in str(failure)
    assert same(engine.bits, bench.expected(0))
    monkeypatch.undo()


def _drop_one(sender: Any) -> None:
    prepare = sender.prepare

    def dropping(mark: str) -> Any:
        offer = prepare(mark)
        sender._patches.pop(3)
        return offer

    sender.prepare = dropping


async def test_an_engine_that_fails_while_it_writes_holds_nothing(bench, monkeypatch):
    engine = bench.engine()
    load, calls = engine.model.load_weights, []

    def fails_late(weights: Any) -> set[str]:
        calls.append(weights)
        load(weights[:5])
        raise ValueError("no room")

    monkeypatch.setattr(engine.model, "load_weights", fails_late)
    [failure] = await bench.send(1, engine)
    assert "could not receive the version: ValueError no room" in str(failure)
    assert len(calls) == 1
    monkeypatch.setattr(engine.model, "load_weights", load)
    bench.trainer.gives_up = True
    [failure] = await bench.send(2, engine)
    assert "the engine holds 'none'" in str(failure)
    engine.load(bench.stage(2), 2)
    assert same(engine.bits, bench.expected(2))


def test_an_update_is_one_start_one_version_one_finish(bench):
    engine = bench.engine()._engine
    update = {"directory": str(bench._staging / "v0"), "version": 0}
    with pytest.raises(InfrastructureError, match="start a new update"):
        engine.update_weights(update)
    engine.start_weight_update()
    with pytest.raises(InfrastructureError, match="before a version had been loaded"):
        engine.finish_weight_update()


def test_vllm_knows_all_backends_by_the_plugin():
    vllm_plugin.register()
    known = {kind: WeightTransferEngineFactory._registry[name]() for kind, name in vllm_plugin.SENT_BACKENDS.items()}
    assert known == {"nccl": SentEngine, "nccl_m2n": ShardsEngine, "sparse_nccl": ChangesEngine}


# --- models whose weights are not what was loaded


def test_a_model_that_keeps_what_was_loaded_is_taken(vllm_config):
    require_in_place(model_of(vllm_config))


def test_rearranged_experts_are_refused(vllm_config):
    model = model_of(vllm_config)
    methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
    method = next(method for method in methods if hasattr(method, "moe_kernel"))
    method.moe_kernel, method.unquantized_backend = object(), UnquantizedMoeBackend.TRITON
    require_in_place(model)
    method.unquantized_backend = UnquantizedMoeBackend.FLASHINFER_CUTLASS
    with pytest.raises(UserError, match=r"rearranges experts for FlashInfer CUTLASS .* in model\.layers\.1\.mlp\.exp"):
        require_in_place(model)


def test_weights_that_are_transformed_as_they_are_loaded_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    require_in_place(model)
    model[0].weight.weight_loader = composed_weight_loader(default_weight_loader, torch.neg)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"transforms weight as it loads it in 0; use sync\.kind=nccl"):
        require_in_place(model)
