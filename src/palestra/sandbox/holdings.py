"""Sandboxes of tenants: who made which, how long they may live, and what they have used.

Consumes: wishes of tenants. Produces: sandboxes, and lines of the accounts. Waits for: the host, which has deadlines.
Ends when: all are deleted. A sandbox counts against its tenant until the kernel has given back what it held.
"""

import asyncio
import collections
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.sandbox.accounts import Accounts, Usage
from palestra.sandbox.admission import Admission, memory_of
from palestra.sandbox.asked import AskedSandbox, AskedSandboxes
from palestra.sandbox.box import Sandbox
from palestra.sandbox.host import Box, Host
from palestra.sandbox.metrics import Metrics
from palestra.sandbox.records import SandboxGoneError, SandboxStartError
from palestra.sandbox.refusals import ConflictError, UnknownError
from palestra.sandbox.tenants import Tenant

_MOST_GONE = 10_000
_END_S = 10.0


class Holding:
    """One sandbox of a tenant."""

    def __init__(self, tenant: Tenant, box: Box):
        self.tenant, self.box, self.sandbox = tenant, box, Sandbox(box)
        self.memory_mb = memory_of(box.limits)
        self._accounted_at, self._accounted_cpu_s = time.monotonic(), 0.0
        self.began = self._accounted_at
        self._ended_at: float | None = None

    def ended(self) -> None:
        """What comes after is not accounted for."""
        self._ended_at = time.monotonic()

    def account(self, accounts: Accounts) -> None:
        """For what it used since the last time. Errors: InfrastructureError; then it is accounted for later."""
        now = self._ended_at or time.monotonic()
        cpu_s = max(self.box.total_cpu_s, self._accounted_cpu_s)
        passed_s, cpu_more_s = now - self._accounted_at, cpu_s - self._accounted_cpu_s
        used = Usage(sandbox_s=passed_s, memory_mb_s=passed_s * self.memory_mb, cpu_s=cpu_more_s)
        accounts.add(self.tenant.name, used, sandbox=self.box.id)
        self._accounted_at, self._accounted_cpu_s = now, cpu_s

    def about(self) -> Mapping[str, Any]:
        box = self.box
        return {
            "id": box.id,
            "home": box.home,
            "labels": box.labels,
            "limits": box.limits,
            "created": box.created,
            "expires": box.expires,
        }


class _Wished:
    """What was asked for with one idempotency key, and what comes of it."""

    def __init__(self, digest: bytes, making: "asyncio.Future[Sequence[Holding]]"):
        self.digest, self.making = digest, making

    @property
    def is_over(self) -> bool:
        """Another sandbox may be made with its key: it failed, or all that it made is gone."""
        if not self.making.done():
            return False
        is_failed = self.making.cancelled() or self.making.exception() is not None
        return is_failed or all(holding.box.is_gone for holding in self.making.result())


class Holdings:
    """`most_lifetime_s`: from its making, of any sandbox. `on_room` is called when one has ended."""

    def __init__(
        self,
        host: Host,
        admission: Admission,
        accounts: Accounts,
        metrics: Metrics,
        *,
        most_lifetime_s: float,
        on_room: Callable[[], None],
    ):
        self._on_room = on_room
        self._host, self._admission, self._accounts, self._metrics = host, admission, accounts, metrics
        self._most_lifetime_s = most_lifetime_s
        self._held: dict[str, Holding] = {}
        self._owed: list[Holding] = []  # ended, and not accounted for yet
        self._gone: collections.OrderedDict[str, tuple[str, str]] = collections.OrderedDict()
        self._wished: collections.OrderedDict[tuple[str, str], _Wished] = collections.OrderedDict()

    async def create(
        self, tenant: Tenant, asked: AskedSandbox, *, count: int = 1, key: str | None = None
    ) -> Sequence[Holding]:
        """`count` of them or none. Asked for again with the same key, they are the same, also while they are made.

        Errors: RefusedError, SandboxStartError, ConflictError, UserError.
        """
        making = asyncio.ensure_future  # goes on, whoever stops waiting for it
        if key is None:
            return await asyncio.shield(making(self._made(tenant, asked, count)))
        digest = hashlib.sha256(f"{count} {asked.model_dump_json()}".encode()).digest()
        known = self._wished.get((tenant.name, key))
        if known is not None and known.digest != digest:
            raise ConflictError("this Idempotency-Key was used for another request; use a fresh one")
        if known is None or known.is_over:
            known = _Wished(digest, making(self._made(tenant, asked, count)))
            self._wished[tenant.name, key] = known
            self._forget_old_keys()
        return await asyncio.shield(known.making)

    def _forget_old_keys(self) -> None:
        while len(self._wished) > _MOST_GONE:
            self._wished.popitem(last=False)

    async def _made(self, tenant: Tenant, asked: AskedSandbox, count: int) -> Sequence[Holding]:
        limits = asked.limits.limits()
        tenant.require_egress(asked.egress)
        if asked.timeout_s > self._most_lifetime_s:
            most = self._most_lifetime_s
            raise UserError(f"timeout_s={asked.timeout_s:g} of a sandbox is more than the {most:g} that it may be here")
        self._admission.take(tenant, count, count * memory_of(limits))
        made = await asyncio.gather(*(self._one(tenant, asked) for _ in range(count)), return_exceptions=True)
        held = [one for one in made if isinstance(one, Holding)]
        failed = [one for one in made if isinstance(one, BaseException)]
        if not failed:
            return held
        missing = count - len(held)
        self._admission.give_back(tenant, missing, missing * memory_of(limits))
        self._on_room()
        for holding in held:
            await self.delete(holding)
        raise failed[0]

    async def _one(self, tenant: Tenant, asked: AskedSandbox) -> Holding:
        began = time.monotonic()
        try:
            sandbox = await self._host.create(
                limits=asked.limits.limits(), timeout_s=asked.timeout_s, labels=asked.labels, egress=asked.egress
            )
        except OSError as error:
            raise SandboxStartError(f"a sandbox could not be made: {error}") from error
        box = self._host.boxes.get(sandbox.id)
        if box is None:
            raise SandboxStartError("a sandbox ended as soon as it was made; try again")
        try:
            self._accounts.add(tenant.name, Usage(sandboxes=1), sandbox=box.id)
        except InfrastructureError:
            await box.delete()
            raise
        self._metrics.start_s.observe(time.monotonic() - began)
        self._metrics.starts.inc()
        holding = self._held[box.id] = Holding(tenant, box)
        self._metrics.live.set(len(self._held))
        box.ended.add_done_callback(lambda _: self._on_ended(holding))
        return holding

    def _on_ended(self, holding: Holding) -> None:
        box, tenant = holding.box, holding.tenant
        del self._held[box.id]
        self._gone[box.id] = (tenant.name, box.reason)
        if len(self._gone) > _MOST_GONE:
            self._gone.popitem(last=False)
        self._metrics.live.set(len(self._held))
        self._admission.give_back(tenant, 1, holding.memory_mb)
        self._on_room()
        holding.ended()
        try:
            holding.account(self._accounts)
        except InfrastructureError:
            self._owed.append(holding)  # the next beat tries again

    def find(self, tenant: Tenant, id: str) -> Holding:
        """Errors: UnknownError; SandboxGoneError, if it was there."""
        holding = self._held.get(id)
        if holding is not None and holding.tenant.name == tenant.name:
            if holding.box.is_gone:
                raise SandboxGoneError(f"sandbox {id} is no more: {holding.box.reason}")
            return holding
        owner, reason = self._gone.get(id, ("", ""))
        if owner == tenant.name:
            raise SandboxGoneError(f"sandbox {id} is no more: {reason}")
        raise UnknownError(f"there is no sandbox {id!r} of yours")

    def all_of(self, tenant: Tenant, labels: Sequence[str]) -> Sequence[Holding]:
        return [
            holding
            for holding in self._held.values()
            if holding.tenant.name == tenant.name and not holding.box.is_gone and set(labels) <= set(holding.box.labels)
        ]

    async def delete(self, holding: Holding) -> None:
        """When this returns, it is accounted for, and what it held is given back, unless the kernel is slow."""
        try:
            await holding.box.delete()
        finally:
            holding.account(self._accounts)
        try:
            await within(_END_S, asyncio.shield(holding.box.ended), waiting_for=f"sandbox {holding.box.id} to end")
        except DeadlineError:
            pass  # it is told to end; until it has, it counts

    async def set_timeout(self, holding: Holding, seconds: float) -> None:
        """Errors: UserError, for more than its lifetime may be."""
        left_s = holding.began + self._most_lifetime_s - time.monotonic()
        if seconds > left_s:
            raise UserError(f"timeout_s={seconds:g}: sandbox {holding.box.id} may live for {max(left_s, 0):.0f} s more")
        await holding.box.set_timeout(seconds)

    def beat(self) -> None:
        """Account for those that are there, and for those that could not be accounted for at their end.

        Errors: InfrastructureError; the next beat tries again.
        """
        while self._owed:
            self._owed[-1].account(self._accounts)
            self._owed.pop()
        for holding in tuple(self._held.values()):
            holding.account(self._accounts)


def wish_of(asked: AskedSandboxes) -> AskedSandbox:
    return AskedSandbox(limits=asked.limits, timeout_s=asked.timeout_s, labels=asked.labels, egress=asked.egress)
