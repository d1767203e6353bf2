"""`palestra sandbox check`: attacks and conformance, against any backend, in real sandboxes.

Every case has a sandbox of its own, and a sibling that lives through all of them: after each case the sibling's next
program must run as if nothing had happened. A case passes, fails with what was seen, or is skipped with the reason: the
backend promises less isolation than the case is about, or cannot do what it needs.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec import Struct

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, PalestraError, UserError
from palestra.sandbox.box import Sandbox
from palestra.sandbox.cgroups import Cgroup
from palestra.sandbox.host import Host, Options
from palestra.sandbox.records import Isolation, Limits, Result, UnsupportedError

CASE_S = 300.0
_SIBLING_S = 30.0
_TRIES = 5
_SMALL = Limits(memory_mb=128, disk_mb=32, inodes=2048, processes=64)


class Unfit(Exception):
    """A case that says nothing about this backend, and why."""


class Held(AssertionError):
    """What did not hold, and what was seen."""


def require(holds: bool, seen: object) -> None:
    """Errors: Held."""
    if not holds:
        raise Held(str(seen))


async def at_best(most: float, attempt: Callable[[], Awaitable[float]]) -> float:
    """What an attempt took, the first within `most`: other work of the machine only ever adds to it.

    Errors: Held, if no attempt of some was within it; those of an attempt.
    """
    took: list[float] = []
    while len(took) < _TRIES:
        took.append(await attempt())
        if took[-1] <= most:
            return took[-1]
    raise Held(f"at most {most:g} were allowed, and it took {', '.join(f'{one:.2f}' for one in took)}")


@dataclass(frozen=True)
class Bench:
    """What a case works with: its own sandbox, with these limits, and the host of both."""

    host: Host
    box: Sandbox
    sibling: Sandbox
    limits: Limits

    @contextlib.asynccontextmanager
    async def afresh(self) -> "AsyncIterator[Bench]":
        """With another sandbox as its own."""
        async with await self.host.create(limits=self.limits, timeout_s=2 * CASE_S) as box:
            yield replace(self, box=box)

    @property
    def group(self) -> Cgroup | None:
        """What counts its own sandbox, where that is ours."""
        return self.host.boxes[self.box.id].group

    @property
    def isolation(self) -> Isolation:
        return self.host.backend.isolation

    @property
    def layers(self) -> tuple[str, ...]:
        return self.host.backend.layers

    async def python(self, code: str, *, timeout_s: float = 60.0, **options: Any) -> Result:
        return await self.box.exec(["python3", "-c", code], timeout_s=timeout_s, **options)


Run = Callable[[Bench], Awaitable[str]]


@dataclass(frozen=True)
class Case:
    """`least`: of isolation, that this is about. `run` returns what was seen."""

    name: str
    least: Isolation
    run: Run
    limits: Limits


CASES: dict[str, Case] = {}


def case(least: Isolation = Isolation.NONE, *, limits: Limits = _SMALL) -> Callable[[Run], Run]:
    """Named after its function."""

    def keep(run: Run) -> Run:
        name = run.__name__  # pyright: ignore[reportAttributeAccessIssue]
        CASES[name] = Case(name, least, run, limits)
        return run

    return keep


class Outcome(Struct, frozen=True):
    """`passed` is None for a case that was skipped; `detail` says why."""

    name: str
    passed: bool | None
    detail: str
    wall_s: float


class Report(Struct, frozen=True):
    backend: str
    isolation: str
    layers: tuple[str, ...]
    passed: int
    failed: int
    skipped: int
    cases: list[Outcome]


async def check(options: Options, *, only: Sequence[str] = ()) -> AsyncIterator[Outcome | Report]:
    """Outcomes as they come, and the report. Errors: UserError, for a case that there is not; those of `Host.open`."""
    cases = _cases(only)
    outcomes: list[Outcome] = []
    async with Host(options) as host:
        sibling = await host.create(limits=_SMALL, timeout_s=CASE_S * (len(cases) + 1))
        for one in cases:
            outcome = await _outcome(one, host, sibling)
            outcomes.append(outcome)
            yield outcome
        backend = host.backend
        yield Report(
            backend=backend.name,
            isolation=backend.isolation.name.lower(),
            layers=backend.layers,
            passed=sum(o.passed is True for o in outcomes),
            failed=sum(o.passed is False for o in outcomes),
            skipped=sum(o.passed is None for o in outcomes),
            cases=outcomes,
        )


def _cases(only: Sequence[str]) -> list[Case]:
    from palestra.sandbox.cases import conformance, files, kernel, machine, network, resources, service  # noqa: F401

    unknown = [name for name in only if name not in CASES]
    if unknown:
        raise UserError(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    return [one for one in CASES.values() if not only or one.name in only]


async def _outcome(one: Case, host: Host, sibling: Sandbox) -> Outcome:
    began = time.monotonic()
    if host.backend.isolation < one.least:
        reason = f"about isolation by {one.least.name.lower()}; this is {host.backend.isolation.name.lower()}"
        return Outcome(one.name, None, reason, 0.0)
    passed: bool | None = True
    try:
        async with await host.create(limits=one.limits, timeout_s=2 * CASE_S) as box:
            running = one.run(Bench(host, box, sibling, one.limits))
            detail = await within(CASE_S, running, waiting_for=f"the case {one.name}")
    except Unfit as error:
        passed, detail = None, str(error)
    except UnsupportedError as error:
        passed, detail = None, str(error)
    except (Held, PalestraError, OSError, ValueError, TimeoutError, ExceptionGroup) as error:
        passed, detail = False, f"{type(error).__name__}: {error}" if not isinstance(error, Held) else str(error)
    harm = await _harm(sibling)
    if harm:
        passed, detail = False, f"its sibling was harmed: {harm}; {detail}"
    return Outcome(one.name, passed, detail, time.monotonic() - began)


async def _harm(sibling: Sandbox) -> str:
    """What became of the sibling; empty if it is well."""
    try:
        await sibling.write("mark", b"well")
        done = await within(
            2 * _SIBLING_S,
            sibling.exec("cat mark; ls /tmp | wc -l", timeout_s=_SIBLING_S),
            waiting_for="the sibling's next program",
        )
    except (PalestraError, DeadlineError, OSError) as error:
        return str(error)
    return "" if done.stdout.startswith("well") and done.exit_code == 0 else repr(done)


async def gathered(*awaited: Awaitable[Any]) -> list[Any]:
    return list(await asyncio.gather(*awaited))
