"""The supervisor: starts the processes of a plan, watches them, starts again what dies, and ends them all.

    prepare, one by one -> start all the others -> the leader says Done and exits -> stop the rest
                             ^                |
                             +-- back-off <---+ died

Consumes: Progress, Ready, Done, Failed and Restart messages; ends of processes; SIGINT, SIGTERM.
Produces: their logs, the live view, the record of restarts; word to the leader of processes that ended and started.
Waits for: every process to be ready, the leader's end after Done, each with a deadline.
Ends when: the leader is done; a process could not start, died too often, or said that the run cannot go on; or the user
interrupted.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import httpx

from palestra.config.schema import Launch
from palestra.core.clock import unix_now
from palestra.core.deadline import Unhurried, within
from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.core.guard import Guard
from palestra.launch.child import Child, ended_how, start
from palestra.launch.live import duration
from palestra.launch.outcome import Interrupted
from palestra.launch.plan import Plan, Program, Role
from palestra.launch.ports import holder_of
from palestra.launch.restarts import End, Limits, Lives
from palestra.wire.channel import Listener
from palestra.wire.messages import (
    Done,
    Failed,
    Notice,
    ProcessEnded,
    ProcessStarted,
    Progress,
    Ready,
    Restart,
    ToOrchestrator,
    ToSupervisor,
)
from palestra.wire.rundir import Attempt, RunDir
from palestra.wire.runlog import Restarted, account_for_gap, append_restart

_GONE_S = 30.0  # after SIGKILL
_LAST_WORD_S = 1.0  # what a process said before it ended has arrived by then
_ASK_EVERY_S = 0.25
_PORT_FREE_S = 5.0  # from the death of an engine until the kernel has buried all of it
_USER_ERROR = 2  # exit code of a process whose log names the fix
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


class ProcessFailed(InfrastructureError):
    """A process ended the run. The message has its name, how it ended, how often, and the end of its log."""


class View(Protocol):
    """Where the supervisor's news goes."""

    def progress(self, message: Progress) -> None: ...

    def say(self, text: str) -> None: ...


async def supervise(plan: Plan, run: RunDir, attempt: Attempt, guard: Guard, view: View, *, launch: Launch) -> None:
    """Run the plan to its end; no process of it is left afterwards.

    Errors: UserError and ProcessFailed, naming the process that ended the run; DeadlineError; Interrupted.
    """
    supervisor = Supervisor(plan, run, attempt, guard, view, launch=launch)
    with _on_signals(supervisor.interrupt):
        try:
            await supervisor.run()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            await supervisor.stop()


class Supervisor:
    """The processes of one attempt."""

    def __init__(self, plan: Plan, run: RunDir, attempt: Attempt, guard: Guard, view: View, *, launch: Launch):
        self._plan, self._run, self._attempt, self._guard, self._view = plan, run, attempt, guard, view
        self._stop_s = launch.stop_s
        self._members = [program for program in plan.programs if program.role is not Role.PREPARE]
        limits = Limits(launch.max_restarts, launch.restart_window_s)
        self._lives = {program.name: Lives(limits) for program in self._members}
        self._children: dict[str, Child] = {}  # the newest of each name
        self._ends: dict[str, End] = {}  # of processes whose successors are not ready yet
        self._resting: dict[str, asyncio.Event] = {}  # ended rightly; set: needed once more
        self._starting = asyncio.Lock()  # who was started may speak before it is known here
        self._lead_life = 0  # of the leader that was heard last
        self._lead_ended, self._interrupted, self._hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._listener: Listener[ToSupervisor, ToOrchestrator] = Listener(
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
            self._view.say(f"starting {', '.join(program.name for program in self._members)}")
            tasks += [group.create_task(self._keep(program)) for program in self._members]
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
            try:
                await within(_GONE_S, ends, waiting_for="killed processes to be gone")
            except DeadlineError as stuck:  # in the kernel: nothing more can be done
                self._view.say(str(stuck))
            hurry.cancel()
        self._listener.close()

    # --- one process, life after life

    async def _prepare(self, program: Program) -> None:
        child = await self._start(program, life=0)
        code = await _within(program.start_s, child.process.wait(), child, waiting_for=f"{program.name} to end")
        self._end_group(child)
        if code != 0:
            raise self._failure(child, await self._end_of(child, code), "")

    async def _keep(self, program: Program) -> None:
        """Until it ends rightly. Errors: what ends the run."""
        while True:
            end = await self._live(program)
            if end is not None:
                await self._survive(program, end)
            elif program.role is Role.LEAD:
                self._lead_ended.set()
                return
            else:
                await self._rest(self._children[program.name])
            self._lives[program.name].begin_next()

    async def _survive(self, program: Program, end: End) -> None:
        """Wait until it is time for the next life. Errors: ProcessFailed, DeadlineError, if there is none."""
        name, lives = program.name, self._lives[program.name]
        self._record_restart(name, ready_at=None)
        if (why_not := lives.ended(end)) is not None:
            raise self._failure(self._children[name], end, why_not)
        self._ends[name] = end
        self._view.say(f"{name} died ({end.why}); it is started again in {lives.back_off_s:g} s")
        await self._tell_lead(ProcessEnded(process=name, why=end.why, life=lives.number))
        await asyncio.sleep(lives.back_off_s)

    async def _rest(self, child: Child) -> None:
        """It did all it had to; an orchestrator that took another's place, by now or later, needs it once more."""
        if child.done.is_set() and child.done_under < self._lead_life:
            return
        wanted = self._resting.setdefault(child.name, asyncio.Event())
        await wanted.wait()
        del self._resting[child.name]

    async def _live(self, program: Program) -> End | None:
        """One life; None, if it ended rightly: with 0, and after Done or, for a member, just before the leader."""
        life = self._lives[program.name].number
        if life and program.engine is not None and (holder := await self._holder_of_port(program.engine)):
            return End(why=holder, ended_at=unix_now(), was_ready=False, lived_s=0)
        child = await self._start(program, life=life)
        if life:
            await self._say_started(child)
        async with asyncio.TaskGroup() as group:
            milestones = group.create_task(self._reach_milestones(child))
            code = await child.process.wait()
            milestones.cancel()
        self._end_group(child)
        if code == 0 and await self._may_end(child):
            return None
        return await self._end_of(child, code)

    async def _start(self, program: Program, *, life: int) -> Child:
        env = dict(program.env)
        if program.engine is not None:
            env["PALESTRA_PORT"] = str(urlsplit(self._attempt.engines[program.engine]).port)
        async with self._starting:
            child = await start(program, env, self._run.log(program.name), self._guard, life=life)
            self._children[program.name] = child
        return child

    async def _holder_of_port(self, engine: int) -> str:
        """Who took the port of an engine that died, in words; "" if it is free."""
        url = urlsplit(self._attempt.engines[engine])
        assert url.hostname is not None
        assert url.port is not None
        try:
            await within(_PORT_FREE_S, _is_free(url.hostname, url.port), waiting_for=f"port {url.port}")
        except DeadlineError:
            return f"its port {url.port} on {url.hostname} is in use by {holder_of(url.hostname, url.port)}"
        return ""

    async def _reach_milestones(self, child: Child) -> None:
        """Errors: DeadlineError, if the leader does not exit after it was done."""
        try:
            await self._become_ready(child)
        except DeadlineError as late:
            child.late = late
            child.signal(signal.SIGKILL)
            return
        self._record_restart(child.name, ready_at=unix_now())
        if child.program.role is Role.LEAD:
            await child.done.wait()
            waiting_for = f"{child.name} to exit after it was done"
            await _within(self._stop_s, asyncio.Event().wait(), child, waiting_for=waiting_for)

    async def _become_ready(self, child: Child) -> None:
        program = child.program
        if program.engine is not None:
            url = f"{self._attempt.engines[program.engine]}/health"
            await _within(program.start_s, _answers(url), child, waiting_for=f"{program.name} to answer at {url}")
            child.ready.set()
            self._view.say(f"{program.name} is ready")
        else:
            what = "the first word of" if program.role is Role.LEAD else "the readiness of"
            await _within(program.start_s, child.ready.wait(), child, waiting_for=f"{what} {program.name}")

    async def _may_end(self, child: Child) -> bool:
        """Whether an end with exit code 0 is right. A member may be a moment ahead of the leader."""
        is_lead = child.program.role is Role.LEAD
        reasons = [child.done] if is_lead else [child.done, self._lead_ended]
        waits = [asyncio.ensure_future(reason.wait()) for reason in reasons]
        try:
            async with Unhurried(_LAST_WORD_S if is_lead else self._stop_s):
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            return False
        finally:
            for wait in waits:
                wait.cancel()
        return True

    async def _end_of(self, child: Child, code: int) -> End:
        """How it ended. Errors: UserError and ProcessFailed, if it said itself that the run cannot go on."""
        ended_at, was_killed = unix_now(), code == -signal.SIGKILL
        if not was_killed:
            await self._last_word(child)
        failure = child.failure
        if failure is not None and failure.is_user_error:
            raise UserError(failure.error)
        if failure is None and code == _USER_ERROR:
            raise UserError(f"{child.name} refused to start; {child.tail()}")
        how = ended_how(code) if code else "it ended without saying that it was done"
        if child.late is not None:
            how = f"waited {child.late.seconds:g} s for {child.late.waited_for}"
        elif child.unwanted:
            how = f"the orchestrator gave it up: {child.unwanted}"
        end = End(
            why=how,
            ended_at=ended_at,
            was_ready=child.ready.is_set(),
            lived_s=ended_at - child.started_at,
            was_killed=was_killed and child.late is None,
            was_planned=child.is_planned,
            said="" if failure is None else failure.error,
        )
        if failure is not None and failure.is_final:
            raise self._failure(child, end, "")
        return end

    async def _last_word(self, child: Child) -> None:
        try:
            async with Unhurried(_LAST_WORD_S):
                await child.last_word.wait()
        except TimeoutError:
            pass  # it ended without a word

    def _failure(self, child: Child, end: End, why_not: str) -> Exception:
        """Why the run must end: what the process said itself, else the end of its log."""
        if child.late is not None and not why_not:
            return child.late
        said = f"{end.said}\n  " if end.said else ""
        how = f"{end.why}; {why_not}" if why_not else end.why
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

    # --- restarts, as others hear of them

    async def _say_started(self, child: Child) -> None:
        end = self._ends.get(child.name)
        if end is not None and child.program.engine is None:  # the orchestrator keeps the engines' ledgers
            with self._on_full_disk():
                account_for_gap(
                    self._run,
                    child.name,
                    since=self._attempt.started_at,
                    ended_at=end.ended_at,
                    started_at=child.started_at,
                )
        await self._tell_lead(ProcessStarted(process=child.name, life=child.life))

    def _record_restart(self, name: str, *, ready_at: float | None) -> None:
        """A successor is ready, or died before that."""
        if (end := self._ends.pop(name, None)) is None:
            return
        gone_s = None if ready_at is None else ready_at - end.ended_at
        if gone_s is not None:
            self._view.say(f"{name} is back after {duration(gone_s)}")
        with self._on_full_disk():
            append_restart(
                self._run,
                Restarted(
                    attempt=self._attempt.number,
                    process=name,
                    life=self._lives[name].number,
                    why=end.why,
                    ended_at=end.ended_at,
                    gone_s=gone_s,
                ),
            )

    @contextmanager
    def _on_full_disk(self) -> Iterator[None]:
        """The record of a restart is not worth the run."""
        try:
            yield
        except InfrastructureError as error:
            self._view.say(f"a restart could not be recorded: {error}")

    async def _tell_lead(self, message: ToOrchestrator) -> None:
        lead = self._plan.lead.name
        if message.process == lead:
            return
        try:
            await self._listener.send(lead, message)
        except InfrastructureError:
            pass  # it is not there: with its first word it hears how things stand

    async def _tell_how_things_stand(self) -> None:
        """To a leader that has just begun: which processes are gone, and which are not in their first life."""
        for name, lives in self._lives.items():
            child, end = self._children.get(name), self._ends.get(name)
            if child is None or child.program.role is Role.LEAD:
                continue
            if end is not None and child.process.returncode is not None:
                await self._tell_lead(ProcessEnded(process=name, why=end.why, life=child.life))
            elif lives.number:
                await self._tell_lead(ProcessStarted(process=name, life=child.life))

    # --- news

    async def _listen(self) -> None:
        while True:
            _, message = await self._listener.receive()
            async with self._starting:
                child = self._children.get(message.process)
            if child is None:
                self._view.say(f"ignored a message of {message.process!r}: the plan has no such process")
            elif isinstance(message, Restart):
                self._end_unwanted(child, message)
            else:
                await self._hear(child, message)

    async def _hear(self, child: Child, message: Progress | Notice | Ready | Done | Failed) -> None:
        is_lead = child.program.role is Role.LEAD
        if is_lead and not child.ready.is_set():
            await self._tell_how_things_stand()
            self._follow(child.life)
        if isinstance(message, Ready) or (is_lead and not isinstance(message, Failed)):
            child.ready.set()
        match message:
            case Progress():
                self._view.progress(message)
            case Notice():
                self._view.say(message.text)
            case Done():
                child.done_under = self._lead_life
                child.done.set()
                child.last_word.set()
            case Failed():
                child.failure = child.failure or message  # what other ranks say later follows from the first
                child.last_word.set()

    def _end_unwanted(self, child: Child, message: Restart) -> None:
        if message.life != child.life:
            return  # that life has ended already
        if child.name in self._resting:
            self._resting[child.name].set()
        elif child.process.returncode is None:
            child.unwanted, child.is_planned = message.why, message.is_planned
            child.signal(signal.SIGKILL)

    def _follow(self, lead_life: int) -> None:
        """A leader speaks for the first time: what was done for its predecessor is needed again."""
        if lead_life > self._lead_life:
            self._lead_life = lead_life
            for wanted in self._resting.values():
                wanted.set()

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
            await asyncio.sleep(_ASK_EVERY_S)


async def _is_free(host: str, port: int) -> None:
    """Until nobody listens there. A port has no way to tell."""
    while True:
        if not holder_of(host, port):
            return
        await asyncio.sleep(_ASK_EVERY_S)


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
