"""How a hub's connections are served, in uvicorn's words."""

from dataclasses import dataclass
from typing import Any

from palestra.hub.operation.connections import watched
from palestra.hub.operation.logs import configuration


@dataclass(frozen=True)
class Serving:
    """`drain_s`: how long it goes on taking requests while `/ready` says no already, for balancers to notice.
    `grace_s`: for what is being answered then. `proxies`: whose word for the address of a client is taken."""

    drain_s: float = 0.0
    grace_s: int = 30
    head_s: float = 15.0
    stalled_s: float = 60.0
    connections: int = 1000
    proxies: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "http": watched(head_s=self.head_s, stalled_s=self.stalled_s),
            "ws": "none",
            "log_config": configuration(),
            "log_level": None,
            "limit_concurrency": self.connections,
            "backlog": 1024,
            "proxy_headers": bool(self.proxies),
            "forwarded_allow_ips": list(self.proxies),
        }
