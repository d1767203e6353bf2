"""Pressure: what the engines report, and what follows for how many rollouts they get.

Consumes: each engine's gauges, every `engine.load_every_s`. Produces: its limit in the fleet; metrics.
Waits for: the clock (no engine says by itself that a gauge has moved) and each reading, with a deadline.
Woken by: the clock. Ends when: cancelled.

A reading that comes too late says that the engine is busy: limit and brake stay. One that fails is no verdict: the
limit stays and the brake is off, until calls, publishes or the supervisor find out whether the engine is dead.
"""

import asyncio

from palestra.core.errors import DeadlineError, PalestraError
from palestra.core.metrics import Max, Mean, Sum
from palestra.orchestrate.admission import Admission, Reading, begin
from palestra.orchestrate.desk import Desk
from palestra.orchestrate.fleet import EngineLink, EngineState
from palestra.wire.policy import EngineLoad

_READING_S = 5.0  # longer than any answer of an engine that is only busy


class Pressure:
    """Reads the engines and sets their limits."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self._gauges = {link.name: _Gauge(link, most=desk.config.engine.max_in_flight) for link in desk.fleet.links}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as watching:
            for link in self._desk.fleet.links:
                watching.create_task(self._watch(link))

    async def meet(self, link: EngineLink) -> None:
        """The first reading of an engine process, before it serves."""
        gauge = self._gauges[link.name]
        gauge.forget()
        await self._read(link, gauge)

    async def _watch(self, link: EngineLink) -> None:
        while True:
            await asyncio.sleep(self._desk.config.engine.load_every_s)
            if link.state is EngineState.SERVING:
                await self._read(link, self._gauges[link.name])

    async def _read(self, link: EngineLink, gauge: "_Gauge") -> None:
        try:
            load = await link.client.load(deadline_s=_READING_S)
        except DeadlineError:
            return  # it is busy
        except PalestraError:
            self._desk.fleet.limit(link, link.limit, is_braked=False)
            return
        preempted = gauge.take(load)
        if gauge.admission is not None:
            self._desk.fleet.limit(link, gauge.admission.limit, is_braked=gauge.admission.is_braked)
        if link.state is EngineState.SERVING:
            self._desk.teller.note(
                {
                    "engine/kv_use": Mean(load.kv_use),
                    "engine/kv_use_max": Max(load.kv_use),
                    "engine/waiting": Mean(load.waiting),
                    "engine/preemptions": Sum(preempted),
                    "engine/braked": Mean(link.is_braked),
                }
            )


class _Gauge:
    """From counters since an engine's start to readings."""

    def __init__(self, link: EngineLink, *, most: int):
        self.admission: Admission | None = None
        self._link, self._most = link, most
        self._preemptions: int | None = None  # counted by the engine at the last reading; None: it was started since
        self._stops = 0

    def forget(self) -> None:
        """Another process counts anew. What was learned of the rollouts holds for it too."""
        self._preemptions = None

    def take(self, load: EngineLoad) -> int:
        """One reading. Returns the requests preempted since the last."""
        link = self._link
        preempted = 0 if self._preemptions is None else max(0, load.preemptions - self._preemptions)
        is_forced = link.is_stopped or link.stops != self._stops  # a publish may preempt all, to prefill it again
        self._preemptions, self._stops = load.preemptions, link.stops
        reading = Reading(
            kv_use=load.kv_use,
            waiting=load.waiting,
            preempted=0 if is_forced else preempted,
            rollouts=link.sessions,
            ended=link.ended,
        )
        if self.admission is None:
            self.admission = begin(reading, most=self._most, safe=load.safe_requests)
        else:
            self.admission = self.admission.next(reading)
        return preempted
