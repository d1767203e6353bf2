"""Serve the hub until it is told to end.

Consumes: requests; the interrupt. Produces: answers. Waits for: the server, which ends when it is told to.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from sqlalchemy import func, select

from palestra import __version__
from palestra.hub.evals.archive import DEFAULT as evaluation
from palestra.hub.operation.limits import Bounds
from palestra.hub.operation.operation import Operation
from palestra.hub.operation.serving import Serving
from palestra.hub.registry import actions, rights
from palestra.hub.registry.database import ClashError
from palestra.hub.registry.hub import Hub, Settings
from palestra.hub.registry.receive import FORM_BYTES
from palestra.hub.registry.rights import ANYBODY
from palestra.hub.registry.schema import owners
from palestra.hub.registry.web import application
from palestra.hub.server import listening, own_names, until_told
from palestra.hub.trust import queue
from palestra.hub.trust.examine import Means, examine
from palestra.hub.trust.worker import Worker
from palestra.sandbox.host import close_hosts

_THREADS = 12  # fewer than the database has connections


@dataclass(frozen=True)
class Plan:
    """How a hub is served. `means`: of examinations; None: this process does none."""

    host: str = "127.0.0.1"
    port: int = 8004
    names: Sequence[str] = ()
    serving: Serving = field(default_factory=Serving)
    bounds: Bounds = field(default_factory=Bounds)
    means: Means | None = None


def serve(hub: Hub, plan: Plan, *, say: Callable[[str], None]) -> None:
    """`say` hears the address, once it answers. Errors: UserError for an address that cannot be listened at."""
    hub.sweep()
    queue.enqueue_missing(hub.database, __version__)
    with listening(plan.host, plan.port) as listener:
        asyncio.run(_serve(hub, listener, plan, say))
    hub.close()


def longest_body(settings: Settings) -> int:
    """An artefact in its form, or an evaluation; each route has a bound of its own within."""
    return max(settings.max_upload_bytes + FORM_BYTES, evaluation.archive_bytes)


async def _serve(hub: Hub, listener, plan: Plan, say: Callable[[str], None]) -> None:
    bounds = replace(plan.bounds, body_bytes=longest_body(hub.settings))
    operation = Operation(hub.database, hub.blobs, bounds, num_waiting=lambda: queue.counts(hub.database))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="answer") as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        app = operation.around(application(hub, own_names(plan.host, plan.names), first=operation.routes))
        ending, settings = operation.drain, plan.serving.settings
        times = {"grace_s": plan.serving.grace_s, "drain_s": plan.serving.drain_s}
        async with _at_work(hub, plan.means):
            await until_told(app, listener, say, ending=ending, **times, **settings)
    operation.close()


@asynccontextmanager
async def _at_work(hub: Hub, means: Means | None) -> AsyncIterator[None]:
    if means is None:
        yield
        return
    worker = Worker(hub, partial(examine, means=means))
    hub.on_pushed = worker.wake
    try:
        async with worker.at_work():
            yield
    finally:
        await close_hosts()


def first_token(hub: Hub, name: str) -> str | None:
    """A token of a new administrator, if the hub has nobody yet; None otherwise. Errors: BadNameError."""
    try:
        with hub.database.write() as connection:
            if connection.execute(select(func.count()).select_from(owners)).scalar_one():
                return None
            id = actions.add_owner(connection, ANYBODY, name, "person", is_admin=True)
            return rights.make_token(connection, id, scope="admin", name="first").token
    except ClashError:
        return None  # another process was first


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
