"""The fleet: which engines there are, in what state, and which one a call goes to.

    starting --healthy--> joining --published--> serving <--published-- asleep
        ^                    |                      |                     |
        |                    +----------------------+---- put to sleep -->+
        +------ out <--------+----------------------+---------------------+   died, failed a publish, did not answer

A *session* is a rollout as the engines see it: its turns share a growing prefix and stay on the engine that holds it.
An engine has room for as many sessions as its limit says (`admission.py`). New ones are let in by `admit`; those whose
engine left, and those of evaluations, wait for room in `engine_for`, and come before new ones.

Consumes: what the supervisor says of engine processes, what publishes, calls and readings find out about engines.
Produces: the engine for a call; word to the supervisor of engines that must be started again.
Waits for: an engine that serves and has room, with a deadline. Woken by: an engine that joined, a session that ended,
a higher limit. Ends: with the loop.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError
from palestra.core.ledger import Ledger
from palestra.wire.policy import EngineClient


class EngineState(StrEnum):
    STARTING = "starting"  # its process is not known to be healthy
    JOINING = "joining"  # healthy, without weights of this run
    SERVING = "serving"
    ASLEEP = "asleep"  # without weights: the device is the trainer's, until a publish wakes it
    OUT = "out"  # dead, or not to be trusted until it was started again


_ALLOWED = {
    EngineState.STARTING: {EngineState.JOINING, EngineState.OUT},
    EngineState.JOINING: {EngineState.SERVING, EngineState.ASLEEP, EngineState.OUT},
    EngineState.SERVING: {EngineState.ASLEEP, EngineState.OUT},
    EngineState.ASLEEP: {EngineState.SERVING, EngineState.OUT},
    EngineState.OUT: {EngineState.STARTING},
}
_BEFORE_SERVING = {
    EngineState.STARTING: "start",
    EngineState.JOINING: "wait_for_weights",
    EngineState.ASLEEP: "asleep",
    EngineState.OUT: "out",
}
_SPEED_WEIGHT = 0.05  # of one reply in an engine's measured speed


class EngineLink:
    """One engine as the gateway sees it. Its ledger books what the engine process does."""

    def __init__(
        self,
        name: str,
        client: EngineClient,
        ledger: Ledger,
        *,
        limit: int = sys.maxsize,
        is_inherited: bool = False,
    ):
        """`is_inherited`: an orchestrator that is gone has left it, perhaps in the middle of a publish."""
        self.name, self.client, self.ledger, self.is_inherited = name, client, ledger, is_inherited
        self.state = EngineState.STARTING
        self.limit = limit  # sessions
        self.is_braked = False  # no room now, whatever the limit
        self.sessions = 0
        self.ended = 0  # sessions, so far
        self.stops = 0  # and goings on, by publishes, so far
        self.starts = 0  # of other processes under its name
        self.in_flight = 0  # calls
        self.tokens_per_s: float | None = None  # of one reply, smoothed
        self.gone = asyncio.Event()  # set while the engine is out or asleep: calls to it have ended
        self.is_stopped = self._refills = False

    def backlog(self, typical: float) -> float:
        """How long its sessions will take, relative to other engines: a slow engine gets less. `typical` is the speed
        of an engine that has not replied yet."""
        return (self.sessions + 1) / (self.tokens_per_s or typical)

    @property
    def room(self) -> int:
        """Sessions that it may take now. An empty engine takes one, whatever its gauges say."""
        return max(0, (1 if self.is_braked else max(self.limit, 1)) - self.sessions)

    def move(self, state: EngineState) -> None:
        if state not in _ALLOWED[self.state]:
            raise ValueError(f"{self.name} cannot go from {self.state} to {state}")
        self.state = state
        (self.gone.set if state in (EngineState.OUT, EngineState.ASLEEP) else self.gone.clear)()
        self.is_stopped = self._refills = False
        self._book()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While it has one call more."""
        self.in_flight += 1
        self._book()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._book()

    def stop(self, is_stopped: bool, *, refills: bool) -> None:
        """A publish stops it, or lets it go on; `refills`: running requests are prefilled again then."""
        self.is_stopped = is_stopped
        self.stops += 1
        self._refills = refills and not is_stopped and self.in_flight > 0
        self._book()

    def progressed(self) -> None:
        """Tokens arrived from it."""
        if self._refills:
            self._refills = False
            self._book()

    def note_speed(self, tokens: int, seconds: float) -> None:
        """Of one reply, from its call to its end."""
        if tokens and seconds > 0:
            speed, known = tokens / seconds, self.tokens_per_s
            self.tokens_per_s = speed if known is None else known + _SPEED_WEIGHT * (speed - known)

    def _book(self) -> None:
        cause = self._cause()
        if self.ledger.cause != cause:
            self.ledger.switch(cause)

    def _cause(self) -> str:
        if self.is_stopped and self.state in (EngineState.SERVING, EngineState.ASLEEP):
            return "publish"
        if self.state is not EngineState.SERVING:
            return _BEFORE_SERVING[self.state]
        if self._refills:
            return "prefill again"
        return "generate" if self.in_flight else "idle"


class Fleet:
    """All engines of the run. `restart(name, why)` asks the supervisor; `changed` is told when a state changes."""

    def __init__(
        self,
        links: Sequence[EngineLink],
        *,
        healthy_s: float,
        restart: Callable[[str, str], None],
        changed: Callable[[], None],
    ):
        self.links = list(links)
        self._healthy_s, self._restart, self._changed = healthy_s, restart, changed
        self.holds = False  # no rollout starts: a publish waits for those that run (`sync.wait`)
        self._home: dict[int, EngineLink] = {}  # by session
        self._prefix: dict[int, EngineLink] = {}  # by group
        self._held: deque[tuple[int, asyncio.Event]] = deque()  # sessions that wait for room

    def of_state(self, *states: EngineState) -> list[EngineLink]:
        return [link for link in self.links if link.state in states]

    @property
    def serving(self) -> list[EngineLink]:
        return self.of_state(EngineState.SERVING)

    @property
    def reachable(self) -> list[EngineLink]:
        """Engines that a version can be published to."""
        return self.of_state(EngineState.SERVING, EngineState.JOINING, EngineState.ASLEEP)

    @property
    def joining(self) -> list[EngineLink]:
        """Those of them that have no weights of this run."""
        return self.of_state(EngineState.JOINING, EngineState.ASLEEP)

    # --- states

    def healthy(self, link: EngineLink) -> None:
        self._move(link, EngineState.JOINING)

    def joined(self, link: EngineLink) -> None:
        """It holds the version of the others."""
        link.is_inherited = False
        self._move(link, EngineState.SERVING)

    def sleeps(self, link: EngineLink) -> None:
        """It leaves the device to the trainer. Its calls are dropped, as its cache is; their rollouts wait for an
        engine that serves, and go on from their tokens."""
        self._leave(link, EngineState.ASLEEP)

    def take_out(self, link: EngineLink, why: str) -> None:
        """Nothing more goes to it; its calls are gone on with elsewhere. It comes back as a new process.

        What is heard of an engine that is out or starting is of its predecessor.
        """
        if link in self.reachable:
            self._leave(link, EngineState.OUT)
            self._restart(link.name, why)

    def engine_ended(self, name: str) -> None:
        """Its process is gone; the supervisor starts another by itself."""
        link = self._named(name)
        if link.state is not EngineState.OUT:
            self._leave(link, EngineState.OUT)

    def is_out(self, name: str) -> bool:
        """Whether it is an engine that was heard to end. One that started before this orchestrator did, in whichever of
        its lives, is the one that was inherited."""
        return any(link.name == name and link.state is EngineState.OUT for link in self.links)

    def engine_started(self, name: str) -> EngineLink:
        """A new process took the place of one that is out: `wait_healthy`, then `healthy`."""
        link = self._named(name)
        self._move(link, EngineState.STARTING)
        link.client.forget()
        link.starts += 1
        link.is_inherited = False
        link.tokens_per_s = None
        return link

    def _leave(self, link: EngineLink, state: EngineState) -> None:
        self._home = {session: known for session, known in self._home.items() if known is not link}
        self._prefix = {group: known for group, known in self._prefix.items() if known is not link}
        link.sessions, link.is_braked = 0, False
        self._move(link, state)

    def _move(self, link: EngineLink, state: EngineState) -> None:
        link.move(state)
        self._let_in()

    def _named(self, name: str) -> EngineLink:
        return next(link for link in self.links if link.name == name)

    # --- sessions

    @property
    def room(self) -> int:
        """New sessions that may start now."""
        return sum(link.room for link in self.serving) - len({session for session, _ in self._held})

    def limit(self, link: EngineLink, limit: int, *, is_braked: bool) -> None:
        if (limit, is_braked) != (link.limit, link.is_braked):
            link.limit, link.is_braked = limit, is_braked
            self._let_in()

    def admit(self, session: int, group: int) -> None:
        """A new session, where there is `room`: on the engine that holds the prefix of its group, if that one has room,
        or on the one that is done soonest."""
        holder = self._prefix.get(group)
        if holder is None or not holder.room:
            holder = self._soonest()
            self._prefix.setdefault(group, holder)
        self._settle(session, holder)

    def release(self, session: int) -> None:
        """The session has ended."""
        link = self._home.pop(session, None)
        if link is not None:
            link.sessions -= 1
            link.ended += 1
            self._let_in()

    def forget(self, group: int) -> None:
        """No session of this group will start any more."""
        self._prefix.pop(group, None)

    async def engine_for(self, session: int) -> EngineLink:
        """The engine that holds the session's prefix; else one that has room, or for want of room the one that is done
        soonest.

        Errors: DeadlineError, if no engine serves in time.
        """
        until = time.monotonic() + self._healthy_s
        while session not in self._home:  # the engine that let it in may be gone before it is heard of
            if self.room > 0:
                self._settle(session, self._soonest())
            else:
                await self._hold(session, max(until - time.monotonic(), 0.0))
        return self._home[session]

    async def _hold(self, session: int, deadline_s: float) -> None:
        held = (session, asyncio.Event())
        self._held.append(held)
        try:
            hint = "see logs/engine-*.log"
            await within(deadline_s, held[1].wait(), waiting_for="an engine that serves", hint=hint)
        except DeadlineError:
            if not self.serving:
                raise
            if session not in self._home:
                self._settle(session, self._soonest())
        finally:
            self._held = deque(other for other in self._held if other is not held)

    def _soonest(self) -> EngineLink:
        """Of the serving engines with room, or of all where none has any."""
        known = [link.tokens_per_s for link in self.serving if link.tokens_per_s]
        typical = sum(known) / len(known) if known else 1.0
        able = [link for link in self.serving if link.room] or self.serving
        return min(able, key=lambda link: link.backlog(typical))

    def _settle(self, session: int, link: EngineLink) -> None:
        self._home[session] = link
        link.sessions += 1

    def _let_in(self) -> None:
        """Sessions that wait, in their order, as far as there is room; then whoever waits for a change."""
        while self._held and (self._held[0][0] in self._home or any(link.room for link in self.serving)):
            session, let_in = self._held.popleft()
            if session not in self._home:
                self._settle(session, self._soonest())
            let_in.set()
        self._changed()
