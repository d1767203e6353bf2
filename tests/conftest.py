"""Tests run in two processes at once (`-n 2`): what shares an engine or a run stays in one of them."""

import pytest
from xdist.scheduler import LoadScopeScheduling

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
