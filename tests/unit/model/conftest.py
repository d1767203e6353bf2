import pytest
import torch
import torch.distributed as dist

from palestra.model.load import load_policy
from palestra.model.mesh import make_meshes


@pytest.fixture(scope="session")
def meshes():
    """One rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return make_meshes("cpu")


@pytest.fixture
def load(meshes):
    def load(path, dtype=torch.float32, head_chunk_tokens=7):
        return load_policy(
            str(path),
            dtype=dtype,
            experts="grouped_mm",
            head_chunk_tokens=head_chunk_tokens,
            meshes=meshes,
            device=torch.device("cpu"),
        )

    return load
