"""Why `sync.kind=nccl_m2n` gathers some tensors, and is for one engine (decision 0037). Where one of these fails, vLLM
can do more: look again."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from vllm.config.weight_transfer import WeightTransferConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, as vLLM's layers are imported
    from vllm.distributed.weight_transfer import m2n_engine
    from vllm.distributed.weight_transfer.m2n_common import M2NMesh, check_plan_limits, resolve_layout, validate_layout
    from vllm.distributed.weight_transfer.m2n_source import placements_from_tensor


def placed(*placements: Any) -> Any:
    return SimpleNamespace(placements=placements)


def test_experts_and_split_matrices_cannot_be_placed():
    """As `model/mesh.py` lays them: on a mesh of three axes."""
    assert placements_from_tensor(placed(Replicate(), Shard(0))) == (-1, 0), "a plain shard can"
    with pytest.raises(ValueError, match="cannot express the _StridedShard placement"):
        placements_from_tensor(placed(Replicate(), _StridedShard(0, split_factor=2), Shard(0)))


def test_what_goes_whole_to_every_worker_comes_from_sixteen_shards_at_most():
    def check(shards: int) -> None:
        source = M2NMesh((1, shards), 0)
        check_plan_limits((source, (-1, 0)), resolve_layout(M2NMesh((8, 1), shards), None), "q_proj.weight")

    check(16)
    with pytest.raises(ValueError, match="17 source shards into one replicated destination"):
        check(17)


def test_parts_are_equal():
    """FSDP's need not be."""
    validate_layout(M2NMesh((1, 2), 0), (-1, 0), (6, 3), "source")
    with pytest.raises(ValueError, match=r"shards dim 0 \(size 5\) over 2 ranks, which does not divide evenly"):
        validate_layout(M2NMesh((1, 2), 0), (-1, 0), (5, 3), "source")


def test_all_workers_belong_to_one_server(monkeypatch):
    """The second one's ranks begin after the first one's."""
    monkeypatch.setattr(m2n_engine, "import_m2n", lambda: None)
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    engine = m2n_engine.M2NWeightTransferEngine(
        WeightTransferConfig(backend="nccl_m2n"), config, torch.device("cpu"), torch.nn.Module()
    )
    info: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": 1, "world_size": 4, "src_mesh_dims": [1, 2]}
    info |= {"names": [], "dtype_names": [], "shapes": [], "src_placements": []}
    second = engine.parse_init_info({**info, "rank_offset": 3, "dst_mesh_dims": [1, 1]})
    with pytest.raises(ValueError, match="source mesh covers 2 ranks, but there are 3 trainer ranks"):
        engine.init_transfer_engine(second)
