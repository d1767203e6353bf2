"""Numbers of one server process, as Prometheus reads them."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from palestra import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """`num_waiting` is asked at each reading: how many of each kind wait in the database, by state."""

    def __init__(self, num_waiting: Callable[[], dict[str, int]] = dict):
        self._registry = CollectorRegistry()
        labels = ("method", "route")
        self._requests = Counter(
            "palestra_hub_requests", "Requests that were answered", (*labels, "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "palestra_hub_request_seconds",
            "Until the answer was sent",
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._bytes = Counter("palestra_hub_sent_bytes", "Bytes of answers", registry=self._registry)
        self._open = Gauge("palestra_hub_requests_open", "Requests that are being answered", registry=self._registry)
        info = Gauge("palestra_hub_info", "1, with the version", ("version",), registry=self._registry)
        info.labels(__version__).set(1)
        self._registry.register(_Queue(num_waiting))

    def begin(self) -> None:
        self._open.inc()

    def end(self, method: str, route: str, status: int, *, seconds: float, num_bytes: int) -> None:
        self._open.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
        self._bytes.inc(num_bytes)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Queue(Collector):
    def __init__(self, num_waiting: Callable[[], dict[str, int]]):
        self._num_waiting = num_waiting

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [self._family({})]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return [self._family(self._num_waiting())]

    def _family(self, counts: dict[str, int]) -> GaugeMetricFamily:
        family = GaugeMetricFamily("palestra_hub_checks", "Checks of environments, by state", labels=["status"])
        for status, num in counts.items():
            family.add_metric([status], num)
        return family
