"""`palestra serve hub`: the hub of a team, until it is told to end."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palestra.core.errors import UserError
from palestra.launch.ports import require_free

if TYPE_CHECKING:
    from palestra.hub.registry.blobs import Blobs


@dataclass(frozen=True, kw_only=True)
class Wish:
    """`database` is a URL; empty is SQLite in `data`."""

    data: Path
    database: str = ""
    storage: str = ""
    host: str = "127.0.0.1"
    port: int = 8004
    url: str = ""
    names: tuple[str, ...] = ()
    max_upload_mb: int = 100
    admin: str = "hub-admin"
    checks: bool = True
    sandbox: str | None = None
    index: str = ""
    proxies: tuple[str, ...] = ()
    drain_s: float = 0.0


def serve(wish: Wish) -> None:
    """Errors: UserError, for what cannot be served; InfrastructureError, for a database that does not answer."""
    try:
        from palestra.hub.registry import server
        from palestra.hub.registry.hub import Hub, Settings
    except ModuleNotFoundError as error:
        raise UserError(f"the hub needs {error.name}: pip install 'palestra[hub]'") from None
    if wish.max_upload_mb < 1:
        raise UserError(f"--max-upload-mb={wish.max_upload_mb} must be at least 1")
    if wish.port:
        require_free(wish.host, wish.port, field="--port")
    settings = Settings(data=wish.data, url=wish.url, max_upload_bytes=wish.max_upload_mb << 20)
    hub = Hub.open(settings, wish.database, bucket(wish.storage))
    if (token := server.first_token(hub, wish.admin)) is not None:
        print(f"{wish.admin} administrates this hub by this token, which is not shown again: {token}", file=sys.stderr)
    if not server.is_loopback(wish.host) and not wish.url.startswith("https:"):
        print(
            "tokens go over the network as they are: put a proxy with TLS before it, and name it by --url",
            file=sys.stderr,
        )
    plan = server.Plan(
        host=wish.host,
        port=wish.port,
        names=wish.names,
        serving=server.Serving(drain_s=wish.drain_s, proxies=wish.proxies),
        means=server.Means(backend=wish.sandbox, index=wish.index) if wish.checks else None,
    )
    server.serve(hub, plan, say=lambda url: print(f"hub: {url}", flush=True))


def bucket(url: str) -> "Blobs | None":
    """Where contents are, if not in the hub's directory. Errors: UserError."""
    if not url:
        return None
    from palestra.hub.registry.s3 import Bucket

    return Bucket(url)
