import pytest

from tests.one_rank import ranks_of_one
from tests.unit.model import tiny


@pytest.fixture(scope="session")
def ranks():
    """One rank."""
    return ranks_of_one()


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("models"))
