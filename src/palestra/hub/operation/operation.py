"""What is around the pages of a hub: its ids, logs, metrics, limits and readiness, put together."""

from collections.abc import Callable

from starlette.routing import Route
from starlette.types import ASGIApp

from palestra.hub.operation import ready
from palestra.hub.operation.access import Access
from palestra.hub.operation.limits import Bounds, Limits
from palestra.hub.operation.metrics import Metrics
from palestra.hub.operation.ready import Readiness
from palestra.hub.registry.blobs import Blobs
from palestra.hub.registry.database import Database


class Operation:
    """`routes` are the application's first ones; `around` goes around the whole of it."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        bounds: Bounds,
        *,
        num_waiting: Callable[[], dict[str, int]] = dict,
    ):
        self._bounds = bounds
        self.metrics, self.readiness = Metrics(num_waiting), Readiness(database, blobs)

    @property
    def routes(self) -> list[Route]:
        return ready.routes(self.readiness, self.metrics)

    def around(self, app: ASGIApp) -> ASGIApp:
        return Access(Limits(app, self._bounds), self.metrics)

    def drain(self) -> None:
        self.readiness.drain()

    def close(self) -> None:
        self.readiness.close()
