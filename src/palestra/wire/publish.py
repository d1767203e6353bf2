"""Publish: bring a staged version into every engine, and prove that it arrived.

An engine is paused (its requests freeze), loads and checks, is resumed, and then scores the probe. One that sleeps is
woken around the load: memory for weights before it, for its cache after it. It counts as published only if the scores
are the trainer's under the new version and not those under the version before.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal, TypedDict

from msgspec import Struct

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, PalestraError, PublishError
from palestra.wire.policy import EngineClient, EngineError, UnreachableError
from palestra.wire.sending import NotSentError, Sending
from palestra.wire.weights.manifest import Probe, Staged

Kv = Literal["keep", "recompute"]
Watch = Callable[[EngineClient, bool], None]  # the engine, and whether it is stopped now


class ProbeGap(Struct, frozen=True, kw_only=True):
    """|engine - trainer| log-probability over the probe's tokens.

    `from_previous` is the engine's mean gap to the version before, `between` that of the two versions; None if there is
    no version before.
    """

    mean: float
    max: float
    from_previous: float | None = None
    between: float | None = None


class EnginePublish(Struct, frozen=True, kw_only=True):
    """What one publish did to one engine. It could not sample for `stopped_s`; `failure` is empty if all went well."""

    engine: str
    pause_s: float = 0.0
    load_s: float = 0.0
    resume_s: float = 0.0
    wake_s: float = 0.0  # of one that slept
    probe_s: float = 0.0
    stopped_s: float = 0.0
    gap: ProbeGap | None = None
    failure: str = ""
    is_lost: bool = False  # the failure is that it did not answer

    @property
    def ok(self) -> bool:
        return not self.failure


class NoEngineLeft(PublishError):
    """No engine holds the version. `is_lost`: none of them answered."""

    def __init__(self, report: "PublishReport"):
        failures = "\n  ".join(f"{engine.engine}: {engine.failure}" for engine in report.engines)
        super().__init__(f"version {report.version} reached none of {len(report.engines)} engines:\n  {failures}")
        self.report = report
        self.is_lost = all(engine.is_lost for engine in report.engines)


class PublishReport(Struct, frozen=True, kw_only=True):
    """One publish, engine by engine. Engines that failed are paused and must be taken out."""

    version: int
    wall_s: float
    engines: tuple[EnginePublish, ...]

    @property
    def failed(self) -> tuple[EnginePublish, ...]:
        return tuple(engine for engine in self.engines if not engine.ok)

    @property
    def max_gap(self) -> float:
        """Of the worst engine that succeeded."""
        return max((engine.gap.max for engine in self.engines if engine.gap and engine.ok), default=math.nan)

    @property
    def stopped_s(self) -> float:
        """Of the engine that was stopped longest."""
        return max((engine.stopped_s for engine in self.engines), default=0.0)


async def publish(
    engines: Sequence[EngineClient],
    staged: Staged,
    *,
    kv: Kv,
    at_once: int,
    tolerance: float,
    deadline_s: float,
    watch: Watch = lambda engine, is_stopped: None,
    sending: Sending | None = None,
) -> PublishReport:
    """Publish to `at_once` engines at a time; each has `deadline_s`. With `sending` the version comes from there, and
    to all engines at once.

    The first publish to an engine gives its tokens their first version label; until then its replies are refused.
    `kv="keep"` leaves old keys and values in place for running requests: requests must carry the client's
    `cache_salt`. An engine that fails stays paused.
    Errors: NoEngineLeft with the numbers, if no engine holds the version afterwards.
    """
    slots, began = asyncio.Semaphore(at_once if sending is None else len(engines)), time.monotonic()

    async def load(engine: EngineClient) -> None:
        if sending is not None:
            await sending.into(engine, deadline_s=deadline_s)
        elif staged.is_adapter:
            await engine.update_adapter(staged.directory, staged.version, deadline_s=deadline_s)
        else:
            await engine.update(staged.directory, staged.version, local=staged.local, deadline_s=deadline_s)

    async def one(engine: EngineClient) -> EnginePublish:
        async with slots:
            progress = _Progress(engine, watch)
            options: _Options = {"clear_cache": kv == "recompute", "load": load, "deadline_s": deadline_s}
            published = await _publish_to(engine, staged, progress, options, tolerance=tolerance)
            if sending is not None and not published.ok:
                await sending.leave(engine)
            return published

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(engine)) for engine in engines]
    report = PublishReport(
        version=staged.version, wall_s=time.monotonic() - began, engines=tuple(task.result() for task in tasks)
    )
    if not any(engine.ok for engine in report.engines):
        raise NoEngineLeft(report)
    return report


class _Options(TypedDict):
    clear_cache: bool
    load: Callable[[EngineClient], Awaitable[None]]
    deadline_s: float


async def _publish_to(
    engine: EngineClient, staged: Staged, progress: "_Progress", options: _Options, *, tolerance: float
) -> EnginePublish:
    deadline_s = options["deadline_s"]
    try:
        work = _load_and_probe(engine, staged, progress, **options)
        await within(deadline_s, work, waiting_for=f"the publish of version {staged.version} to {engine.url}")
        require_arrived(progress.result.gap, tolerance)
    except PalestraError as error:
        progress.set(failure=f"{type(error).__name__}: {error}", is_lost=await is_lost(engine, error))
        await _stop(engine, deadline_s=min(5.0, deadline_s))
    return progress.result


async def is_lost(engine: EngineClient, error: Exception) -> bool:
    """Whether it, or who sends to it, is not there, so that the error says nothing of what it holds. A server outlives
    its engine for a moment, in which it answers every request with an error."""
    if isinstance(error, EngineError):
        return not await engine.is_healthy()
    return isinstance(error, UnreachableError | DeadlineError | NotSentError)


async def _load_and_probe(
    engine: EngineClient,
    staged: Staged,
    progress: "_Progress",
    *,
    clear_cache: bool,
    load: Callable[[EngineClient], Awaitable[None]],
    deadline_s: float,
) -> None:
    began = time.monotonic()
    engine.cache_salt = f"until v{staged.version}"  # of what is still prefilled under the weights before
    progress.watch(engine, True)
    sleeps = engine.is_asleep
    if sleeps:
        async with progress.timed("wake_s"):
            await engine.wake_weights(deadline_s=deadline_s)
    else:
        async with progress.timed("pause_s"):
            await engine.pause(clear_cache=clear_cache, deadline_s=deadline_s)
    engine.cache_salt = f"v{staged.version}"
    async with progress.timed("load_s"):
        await engine.start_update(deadline_s=deadline_s)
        await load(engine)
        await engine.finish(staged.version, deadline_s=deadline_s)
        if staged.is_adapter:
            await engine.load_adapter(deadline_s=deadline_s)
        await _require_label(engine, staged.version)
    if sleeps:
        async with progress.timed("wake_s"):
            await engine.wake_cache(deadline_s=deadline_s)
    async with progress.timed("resume_s"):
        await engine.resume(deadline_s=deadline_s)
    progress.watch(engine, False)
    progress.set(stopped_s=time.monotonic() - began)
    async with progress.timed("probe_s"):
        scores = await engine.score(staged.probe.token_ids, deadline_s=deadline_s)
    progress.set(gap=measure(scores, staged.probe))


async def _require_label(engine: EngineClient, version: int) -> None:
    if (label := await engine.version()) != version:
        raise PublishError(f"after the load of version {version} the engine labels its tokens with version {label}")


async def _stop(engine: EngineClient, *, deadline_s: float) -> None:
    """An engine that did not prove its version must not sample on; one that cannot even pause is dead anyway."""
    try:
        await engine.pause(clear_cache=False, deadline_s=deadline_s)
    except PalestraError:
        pass


def measure(scores: Sequence[float], probe: Probe) -> ProbeGap:
    """The engine's scores against the trainer's."""
    previous = probe.previous_logprobs
    return ProbeGap(
        mean=_mean_gap(scores, probe.logprobs),
        max=max(abs(a - b) for a, b in zip(scores, probe.logprobs, strict=True)),
        from_previous=None if previous is None else _mean_gap(scores, previous),
        between=None if previous is None else _mean_gap(probe.logprobs, previous),
    )


def require_arrived(gap: ProbeGap | None, tolerance: float) -> None:
    """Errors: PublishError, if the engine is not where the trainer is, or still where it was.

    Which of two versions is nearer means something only if they are further apart than the engine differs from either.
    """
    if gap is None or not gap.mean <= tolerance:  # NaN fails
        found = "nothing" if gap is None else f"a mean gap of {gap.mean:.2e} (largest {gap.max:.2e})"
        raise PublishError(f"the probe shows {found} between engine and trainer; the tolerance is {tolerance:.2e}")
    if gap.from_previous is None or gap.between is None:
        return
    noise = min(gap.mean, gap.from_previous)
    if gap.between > min(tolerance, 2 * noise) and gap.from_previous <= gap.mean:
        raise PublishError(
            f"the probe is nearer to the version before (mean gap {gap.from_previous:.2e}) than to the new one "
            f"({gap.mean:.2e}), which are {gap.between:.2e} apart: the new weights are not in use"
        )


def _mean_gap(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


class _Progress:
    """The record of one engine's publish while it is being written."""

    def __init__(self, engine: EngineClient, watch: Watch):
        self.watch = watch
        self._fields: dict[str, float | str | bool | ProbeGap | None] = {"engine": engine.url}

    @property
    def result(self) -> EnginePublish:
        return EnginePublish(**self._fields)  # type: ignore[arg-type]

    def set(self, **fields: float | str | bool | ProbeGap) -> None:
        self._fields |= fields

    @asynccontextmanager
    async def timed(self, name: str) -> AsyncIterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._fields[name] = float(self._fields.get(name) or 0.0) + time.monotonic() - began  # type: ignore[arg-type]
