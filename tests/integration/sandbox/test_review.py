"""Attacks on the backend `local` that reach for its agent, its host's knowledge of an end, or a life after it.

Each was found to work against walls without what keeps it out now.
"""

from collections.abc import AsyncIterator

import pytest

from palestra.sandbox import Host, Limits, Options, SandboxStartError

pytestmark = pytest.mark.slow
SMALL = Limits(memory_mb=128, disk_mb=32, inodes=8192, processes=64)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host(Options(backend="local"), warm=0)
    try:
        await host.open()
    except SandboxStartError as error:
        pytest.skip(str(error))
    yield host
    await host.close()


CHANGE = """
import os, resource
acts = dict(
    limit=lambda: resource.prlimit(1, resource.RLIMIT_AS, (1, 1)),
    idle=lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
    nice=lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
    nice_all=lambda: os.setpriority(os.PRIO_USER, 0, 19),
    pinned=lambda: os.sched_setaffinity(1, {0}),
)
for name, act in acts.items():
    try:
        act()
        print(name)
    except PermissionError:
        pass
resource.prlimit(0, resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))
os.sched_setaffinity(0, os.sched_getaffinity(0))
os.nice(1)
"""


async def test_a_program_changes_neither_limits_nor_share_of_the_agent(host: Host):
    """One that could would end its sandbox as if the machine had failed, and be played again instead of scored."""
    async with await host.create(limits=SMALL, timeout_s=60) as box:
        done = await box.exec(["python3", "-c", CHANGE])
        assert (done.stdout, done.stderr, done.exit_code) == ("", "", 0)
        assert (await box.exec("echo well")).stdout == "well\n"
    alone = await host.run_code(CHANGE.replace("(1, 1)", "(2**40, 2**40)").replace("PRIO_USER, 0", "PRIO_PROCESS, 0"))
    assert alone.stdout.split() == ["limit", "idle", "nice", "nice_all", "pinned"]  # it is the first itself
