import pytest
import torch

from palestra.model.load import load_policy
from tests.one_rank import ranks_of_one


@pytest.fixture(scope="session")
def meshes():
    """One rank."""
    return ranks_of_one().meshes


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
