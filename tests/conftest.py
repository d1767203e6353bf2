"""Tests run in two processes at once (`-n 2 --dist loadgroup`): what shares an engine or a run stays in one of them."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before the group becomes part of a test's id
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, in their order, as they share what it sets up; those of the one engine, too.

    Cases of the fault suite share nothing.
    """
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "engine_server" in names:
            item.add_marker(pytest.mark.xdist_group("engine"))
        elif "case" not in names:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
