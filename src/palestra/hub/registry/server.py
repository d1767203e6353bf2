"""Serve the hub until it is told to end.

Consumes: requests; the interrupt. Produces: answers. Waits for: the server, which ends when it is told to.
"""

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import func, select

from palestra.hub.registry import actions, rights
from palestra.hub.registry.database import ClashError
from palestra.hub.registry.hub import Hub
from palestra.hub.registry.rights import ANYBODY
from palestra.hub.registry.schema import owners
from palestra.hub.registry.web import application
from palestra.hub.server import listening, own_names, until_told

_THREADS = 12  # fewer than the database has connections
_GRACE_S = 30  # for uploads that are under way


def serve(hub: Hub, *, host: str, port: int, names: Sequence[str], say: Callable[[str], None]) -> None:
    """`say` hears the address, once it answers. Errors: UserError for an address that cannot be listened at."""
    hub.sweep()
    with listening(host, port) as listener:
        asyncio.run(_serve(hub, listener, host, names, say))
    hub.close()


async def _serve(hub: Hub, listener, host: str, names: Sequence[str], say: Callable[[str], None]) -> None:
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="answer") as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        app = application(hub, own_names(host, names))
        await until_told(app, listener, say, grace_s=_GRACE_S, backlog=1024)


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
