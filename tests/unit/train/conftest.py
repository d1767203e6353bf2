import pytest
import torch
import torch.distributed as dist

from palestra.model.mesh import make_meshes
from palestra.train.ranks import Ranks
from tests.unit.model import tiny


@pytest.fixture(scope="session")
def ranks():
    """One rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes = make_meshes("cpu")
    return Ranks(rank=0, num=1, device=torch.device("cpu"), meshes=meshes)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("models"))
