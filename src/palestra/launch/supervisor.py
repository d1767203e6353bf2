"""The supervisor: starts the processes of a plan, watches them, and ends them all.

    prepare, one by one -> start all the others -> the leader says Done and exits -> stop the rest

Consumes: Progress, Done and Failed messages; ends of processes; SIGINT, SIGTERM. Produces: their logs, the live view.
Waits for: every engine's first answer, the leader's first word and its end after Done, each with a deadline.
Ends when: the leader is done; or a process ended otherwise, or missed its deadline, or the user interrupted.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import httpx

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.launch.child import Child, ended_how, start
from palestra.launch.guard import Guard
from palestra.launch.outcome import Interrupted
from palestra.launch.plan import Plan, Program, Role
from palestra.wire.channel import Listener
from palestra.wire.messages import Done, Failed, Notice, Progress, ToSupervisor
from palestra.wire.rundir import Attempt, RunDir

_LAST_WORD_S = 1.0  # what a process said before it ended has arrived by then
_ASK_HEALTH_EVERY_S = 0.25
_USER_ERROR = 2  # exit code of a process whose log names the fix
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


class ProcessFailed(InfrastructureError):
    """A process ended although the run goes on. The message has its name, how it ended, and the end of its log."""


class View(Protocol):
    """Where the supervisor's news goes."""

    def progress(self, message: Progress) -> None: ...

    def say(self, text: str) -> None: ...


async def supervise(plan: Plan, run: RunDir, attempt: Attempt, guard: Guard, view: View, *, stop_s: float) -> None:
    """Run the plan to its end; no process of it is left afterwards.

    Errors: UserError and ProcessFailed, naming the process that ended the run; DeadlineError; Interrupted.
    """
    supervisor = Supervisor(plan, run, attempt, guard, view, stop_s=stop_s)
    with _on_signals(supervisor.interrupt):
        try:
            await supervisor.run()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            await supervisor.stop()


class Supervisor:
    """The processes of one attempt."""

    def __init__(self, plan: Plan, run: RunDir, attempt: Attempt, guard: Guard, view: View, *, stop_s: float):
        self._plan, self._run, self._attempt, self._guard, self._view = plan, run, attempt, guard, view
        self._stop_s = stop_s
        self._children: dict[str, Child] = {}
        self._lead_ended, self._interrupted, self._hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._listener: Listener[ToSupervisor, None] = Listener(
            attempt.supervisor, attempt=attempt.number, receives=ToSupervisor
        )

    def interrupt(self) -> None:
        """The first call stops the run; a second one kills what ends slowly."""
        (self._hurry if self._interrupted.is_set() else self._interrupted).set()

    async def run(self) -> None:
        """Errors: an ExceptionGroup of what `supervise` names."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._listen()), group.create_task(self._heed_interrupt())]
            for program in self._plan.of_role(Role.PREPARE):
                self._view.say(f"preparing: {program.name}")
                await self._prepare(program)
            members = [program for program in self._plan.programs if program.role is not Role.PREPARE]
            self._view.say(f"starting {', '.join(program.name for program in members)}")
            tasks += [group.create_task(self._watch(await self._start(program))) for program in members]
            await self._lead_ended.wait()
            for task in tasks:
                task.cancel()

    async def stop(self) -> None:
        """SIGTERM to every group, then SIGKILL to those that are left after `stop_s`, or at a second interrupt."""
        running = [child for child in self._children.values() if child.process.returncode is None]
        for child in running:
            child.signal(signal.SIGTERM)
        if running:
            ends = asyncio.gather(*(child.process.wait() for child in running))
            hurry = asyncio.ensure_future(self._hurry.wait())
            await asyncio.wait([ends, hurry], timeout=self._stop_s, return_when=asyncio.FIRST_COMPLETED)
            slow = [child for child in running if child.process.returncode is None]
            if slow:
                self._view.say(
                    f"killing {', '.join(child.name for child in slow)}: not ended {self._stop_s:.0f} s after SIGTERM"
                )
            for child in running:
                self._end_group(child)
            await ends
            hurry.cancel()
        self._listener.close()

    # --- one process, from start to end

    async def _start(self, program: Program) -> Child:
        env = dict(program.env)
        if program.engine is not None:
            env["PALESTRA_PORT"] = str(urlsplit(self._attempt.engines[program.engine]).port)
        child = await start(program, env, self._run.log(program.name), self._guard)
        self._children[program.name] = child
        return child

    async def _prepare(self, program: Program) -> None:
        child = await self._start(program)
        code = await _within(program.start_s, child.process.wait(), child, waiting_for=f"{program.name} to end")
        self._end_group(child)
        if code != 0:
            raise await self._failure(child, code)

    async def _watch(self, child: Child) -> None:
        """Until the process ends rightly: with 0, and after Done or, for a member, just before the leader."""
        async with asyncio.TaskGroup() as group:
            milestones = group.create_task(self._reach_milestones(child))
            code = await child.process.wait()
            milestones.cancel()
        self._end_group(child)
        if code != 0 or not await self._may_end(child):
            raise await self._failure(child, code)
        if child.program.role is Role.LEAD:
            self._lead_ended.set()

    async def _reach_milestones(self, child: Child) -> None:
        program = child.program
        if program.engine is not None:
            url = f"{self._attempt.engines[program.engine]}/health"
            await _within(program.start_s, _answers(url), child, waiting_for=f"{program.name} to answer at {url}")
            self._view.say(f"{program.name} is ready")
        if program.role is Role.LEAD:
            await _within(program.start_s, child.heard.wait(), child, waiting_for=f"the first word of {program.name}")
            await child.done.wait()
            waiting_for = f"{program.name} to exit after it was done"
            await _within(self._stop_s, asyncio.Event().wait(), child, waiting_for=waiting_for)

    async def _may_end(self, child: Child) -> bool:
        """Whether an end with exit code 0 is right. A member may be a moment ahead of the leader."""
        is_lead = child.program.role is Role.LEAD
        awaited = child.done.wait() if is_lead or child.done.is_set() else self._lead_ended.wait()
        try:
            async with asyncio.timeout(_LAST_WORD_S if is_lead else self._stop_s):
                return await awaited
        except TimeoutError:
            return False

    async def _failure(self, child: Child, code: int) -> Exception:
        """Why the run must end: what the process said itself, else the end of its log."""
        try:
            async with asyncio.timeout(_LAST_WORD_S):
                await child.last_word.wait()
        except TimeoutError:
            pass  # it ended without a word
        if child.failure is not None and child.failure.is_user_error:
            return UserError(child.failure.error)
        if child.failure is None and code == _USER_ERROR:
            return UserError(f"{child.name} refused to start; {child.tail()}")
        said = f"{child.failure.error}\n  " if child.failure is not None else ""
        how = ended_how(code) if code else "it ended without saying that it was done"
        return ProcessFailed(f"{child.name} ended the run ({how}): {said}{child.tail()}{self._others(child)}")

    def _others(self, child: Child) -> str:
        """Other processes that failed in the same moment: one of them may be the cause."""
        ends = {other.name: other.process.returncode for other in self._children.values() if other is not child}
        failed = [f"{name} ({ended_how(code)})" for name, code in ends.items() if code]
        return f"\n  ended in the same moment: {', '.join(failed)}" if failed else ""

    def _end_group(self, child: Child) -> None:
        """What is left of the group of a process that has ended, or is to end now."""
        child.signal(signal.SIGKILL)
        self._guard.ended(child.process.pid)

    # --- news

    async def _listen(self) -> None:
        while True:
            _, message = await self._listener.receive()
            child = self._children.get(message.process)
            if child is None:
                self._view.say(f"ignored a message of {message.process!r}: the plan has no such process")
                continue
            child.heard.set()
            match message:
                case Progress():
                    self._view.progress(message)
                case Notice():
                    self._view.say(message.text)
                case Done():
                    child.done.set()
                    child.last_word.set()
                case Failed():
                    child.failure = message
                    child.last_word.set()

    async def _heed_interrupt(self) -> None:
        await self._interrupted.wait()
        raise Interrupted


async def _within(seconds: float, awaited: Awaitable[T], child: Child, *, waiting_for: str) -> T:
    """Errors: DeadlineError with the end of the child's log."""
    try:
        return await within(seconds, awaited, waiting_for=waiting_for)
    except DeadlineError:
        raise DeadlineError(waiting_for, seconds, hint=child.tail()) from None


async def _answers(url: str) -> None:
    """Until a server says that it is healthy. A server that is not there yet has no other way to tell."""
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        while True:
            try:
                if (await client.get(url)).is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            await asyncio.sleep(_ASK_HEALTH_EVERY_S)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that came first; later ones are its consequences."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


@contextmanager
def _on_signals(call: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, call)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
