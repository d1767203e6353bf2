"""What the service tells Prometheus. No name of a tenant is in it: whoever reads it needs no token."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from palestra.sandbox.records import Result

_START_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PROGRAM_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_STATUSES = ("ok", "failed", "timed_out", "oom")


class Metrics:
    """In a registry of its own, so that a process may have several."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.live = Gauge("palestra_sandbox_live", "Sandboxes that are there.", registry=registry)
        self.waiting = Gauge("palestra_sandbox_waiting", "Programs that wait for their turn.", registry=registry)
        self.starts = Counter("palestra_sandbox_starts", "Sandboxes that were made.", registry=registry)
        self.start_s = Histogram(
            "palestra_sandbox_start_seconds", "Until a sandbox was ready.", buckets=_START_S, registry=registry
        )
        self._program_s = Histogram(
            "palestra_sandbox_program_seconds", "Of programs that ended.", buckets=_PROGRAM_S, registry=registry
        )
        results = Counter("palestra_sandbox_results", "Programs by how they ended.", ["status"], registry=registry)
        self._results = {status: results.labels(status) for status in _STATUSES}
        self._refusals = Counter(
            "palestra_sandbox_refusals", "Requests by why they were refused.", ["reason"], registry=registry
        )

    def ended(self, result: Result) -> None:
        self._program_s.observe(result.wall_s)
        self._results[result.status].inc()

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
