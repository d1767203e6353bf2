"""Tests run in two processes at once (`-n 2`): what shares an engine or a run stays in one of them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

settings.register_profile("palestra", deadline=None)  # laws are about what holds, not how fast on a busy machine
settings.load_profile("palestra")

ONE_ENGINE = ("tests/integration/test_engine.py", "tests/integration/test_replaying_engine.py")


class Together(LoadScopeScheduling):
    """A file's tests stay together, in their order, as they share what it sets up; those of the one engine, too.

    Cases of the fault suite share nothing.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, name = nodeid.partition("::")
        if path in ONE_ENGINE:
            return "engine"
        return nodeid if path.startswith("tests/fault/") and "[" in name else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> Together:
    return Together(config, log)


# --- databases of the hub


@pytest.fixture(scope="session")
def postgresql() -> Iterator:
    """One cluster a session; `tests.databases.Cluster`."""
    from tests.databases import binaries, cluster

    programs = binaries()
    if programs is None:
        pytest.skip("Debian's postgresql is not installed; `make debian` installs it")
    with cluster(programs) as running:
        yield running


@pytest.fixture(scope="session")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the hub's schema, to be copied."""
    from palestra.hub.registry.database import Database, sqlite_url

    file = tmp_path_factory.mktemp("hub") / "hub.db"
    database = Database(sqlite_url(file))
    database.migrate()
    database.close()
    return file


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, sqlite_file: Path) -> str:
    """Of a database with the hub's schema and nothing else, for every kind of database."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql").fresh()
    return f"sqlite:///{shutil.copy(sqlite_file, tmp_path / 'hub.db')}"
