"""Who may have a sandbox now: counts and memory, of each tenant and of all, and turns of one-shot programs.

A program that runs counts as a sandbox. Those that find no room wait in their tenant's queue; tenants take turns,
whatever each has waiting. Memory is what sandboxes may use, not what they do: no promise is made that cannot be kept.
"""

import asyncio
import collections

from msgspec import Struct

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, UserError
from palestra.sandbox.records import Limits, SandboxFullError
from palestra.sandbox.tenants import Tenant


class RefusedError(SandboxFullError):
    """`reason`: of a metric. `after_s`: when to ask again."""

    def __init__(self, reason: str, message: str, after_s: float = 1.0):
        super().__init__(message)
        self.reason, self.after_s = reason, after_s


class _Held(Struct):
    sandboxes: int = 0
    memory_mb: int = 0


def memory_of(limits: Limits) -> int:
    return limits.memory_mb + limits.disk_mb


class Admission:
    def __init__(self, *, most: int, most_memory_mb: int):
        self._most, self._most_memory_mb = most, most_memory_mb
        self._all, self._by_tenant = _Held(), collections.defaultdict[str, _Held](_Held)

    def missing(self, tenant: Tenant, count: int, memory_mb: int) -> str:
        """What there is no room for, now; "" if there is.

        Errors: UserError, if there never will be.
        """
        bounds = (
            ("sandboxes of yours", "sandboxes", self._by_tenant[tenant.name], tenant.most_sandboxes),
            ("MB of sandboxes of yours", "memory_mb", self._by_tenant[tenant.name], tenant.most_memory_mb),
            ("sandboxes", "sandboxes", self._all, self._most),
            ("MB of sandboxes", "memory_mb", self._all, self._most_memory_mb),
        )
        for what, field, held, most in bounds:
            wanted = count if field == "sandboxes" else memory_mb
            if wanted > most:
                raise UserError(f"{wanted} {what} were asked for, and {most} is the most that may be; ask for less")
            if getattr(held, field) + wanted > most:
                return f"{getattr(held, field)} {what} are there, of at most {most}"
        return ""

    def take(self, tenant: Tenant, count: int, memory_mb: int) -> None:
        """`memory_mb`: of all of them. Errors: RefusedError; UserError."""
        reason = self.missing(tenant, count, memory_mb)
        if reason:
            raise RefusedError("full", f"{reason}; delete some, or ask again later")
        self.hold(tenant, count, memory_mb)

    def hold(self, tenant: Tenant, count: int, memory_mb: int) -> None:
        for held in (self._all, self._by_tenant[tenant.name]):
            held.sandboxes += count
            held.memory_mb += memory_mb

    def give_back(self, tenant: Tenant, count: int, memory_mb: int) -> None:
        self.hold(tenant, -count, -memory_mb)


class _Waiting:
    __slots__ = ("future", "memory_mb", "tenant")

    def __init__(self, tenant: Tenant, memory_mb: int):
        self.tenant, self.memory_mb = tenant, memory_mb
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Turns:
    """`running`: programs at once. `most_waiting`: of each tenant. `wait_s`: the longest that one waits."""

    def __init__(self, admission: Admission, *, running: int, most_waiting: int, wait_s: float):
        self._admission, self._free = admission, running
        self._most_waiting, self._wait_s = most_waiting, wait_s
        self._queues: collections.OrderedDict[str, collections.deque[_Waiting]] = collections.OrderedDict()
        self.num_waiting = 0

    async def begin(self, tenant: Tenant, memory_mb: int) -> None:
        """Whoever calls it calls `end` afterwards. Errors: RefusedError; UserError, for more than there can be."""
        is_room = not self._admission.missing(tenant, 1, memory_mb)
        if is_room and self._free and tenant.name not in self._queues:
            self._free -= 1
            self._admission.hold(tenant, 1, memory_mb)
            return
        num_before = len(self._queues.get(tenant.name, ()))
        if num_before >= self._most_waiting:
            raise RefusedError("queue", f"{num_before} programs of yours wait already; ask again later")
        waiting = _Waiting(tenant, memory_mb)
        self._queues.setdefault(tenant.name, collections.deque()).append(waiting)
        self.num_waiting += 1
        await self._turn(waiting)

    async def _turn(self, waiting: _Waiting) -> None:
        try:
            await within(self._wait_s, waiting.future, waiting_for="a program's turn")
        except BaseException as error:
            if waiting.future.done() and not waiting.future.cancelled() and waiting.future.exception() is None:
                self.end(waiting.tenant, waiting.memory_mb)  # its turn came as it was given up
            else:
                self._leave(waiting)
            if isinstance(error, DeadlineError):
                raise RefusedError("wait", f"no turn came within {self._wait_s:g} s; ask again later") from None
            raise

    def _leave(self, waiting: _Waiting) -> None:
        queue = self._queues.get(waiting.tenant.name)
        if queue is not None and waiting in queue:
            queue.remove(waiting)
            self.num_waiting -= 1
            if not queue:
                del self._queues[waiting.tenant.name]

    def end(self, tenant: Tenant, memory_mb: int) -> None:
        self._free += 1
        self._admission.give_back(tenant, 1, memory_mb)
        self.go_on()

    def go_on(self) -> None:
        """To call where room was made."""
        while self._free and any(self._begin_first(name) for name in list(self._queues)):
            pass

    def _begin_first(self, name: str) -> bool:
        """Whether there was room for it. A tenant whose turn it was is the last of all."""
        queue = self._queues[name]
        first = queue[0]
        is_given_up = first.future.done()
        if not is_given_up and self._admission.missing(first.tenant, 1, first.memory_mb):
            return False
        queue.popleft()
        self.num_waiting -= 1
        if queue:
            self._queues.move_to_end(name)
        else:
            del self._queues[name]
        if not is_given_up:
            self._free -= 1
            self._admission.hold(first.tenant, 1, first.memory_mb)
            first.future.set_result(None)
        return True

    def refuse_all(self, error: Exception) -> None:
        """Who waits is told so."""
        for queue in self._queues.values():
            for waiting in queue:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
        self._queues.clear()
        self.num_waiting = 0
