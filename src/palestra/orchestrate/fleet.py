"""The fleet: which engines there are, in what state, and which one a call goes to.

    starting --healthy--> joining --published--> serving
        ^                    |                      |
        +------ out <--------+----------------------+   died, failed a publish, or did not answer

Consumes: what the supervisor says of engine processes, what publishes and calls find out about engines.
Produces: the engine for a call; word to the supervisor of engines that must be started again.
Waits for: an engine that serves, with a deadline. Woken by: an engine that joined. Ends: with the loop.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

from palestra.core.deadline import within
from palestra.core.ledger import Ledger
from palestra.wire.policy import EngineClient


class EngineState(StrEnum):
    STARTING = "starting"  # its process is not known to be healthy
    JOINING = "joining"  # healthy, without weights of this run
    SERVING = "serving"
    OUT = "out"  # dead, or not to be trusted until it was started again


_ALLOWED = {
    EngineState.STARTING: {EngineState.JOINING, EngineState.OUT},
    EngineState.JOINING: {EngineState.SERVING, EngineState.OUT},
    EngineState.SERVING: {EngineState.OUT},
    EngineState.OUT: {EngineState.STARTING},
}
_BEFORE_SERVING = {
    EngineState.STARTING: "start",
    EngineState.JOINING: "wait_for_weights",
    EngineState.OUT: "out",
}
_SPEED_WEIGHT = 0.05  # of one reply in an engine's measured speed


class EngineLink:
    """One engine as the gateway sees it. Its ledger books what the engine process does."""

    def __init__(self, name: str, client: EngineClient, ledger: Ledger):
        self.name, self.client, self.ledger = name, client, ledger
        self.state = EngineState.STARTING
        self.in_flight = 0
        self.tokens_per_s: float | None = None  # of one reply, smoothed
        self.gone = asyncio.Event()  # set while the engine is out
        self._is_stopped = self._refills = False

    @property
    def backlog(self) -> float:
        """How long its calls will take, relative to other engines: a slow engine gets less."""
        return (self.in_flight + 1) / (self.tokens_per_s or 1.0)

    def move(self, state: EngineState) -> None:
        if state not in _ALLOWED[self.state]:
            raise ValueError(f"{self.name} cannot go from {self.state} to {state}")
        self.state = state
        (self.gone.set if state is EngineState.OUT else self.gone.clear)()
        self._is_stopped = self._refills = False
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
        self._is_stopped = is_stopped
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
        if self.state is not EngineState.SERVING:
            return _BEFORE_SERVING[self.state]
        if self._is_stopped:
            return "publish"
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
        self._home: dict[int, EngineLink] = {}
        self._serves = asyncio.Event()

    def of_state(self, *states: EngineState) -> list[EngineLink]:
        return [link for link in self.links if link.state in states]

    @property
    def serving(self) -> list[EngineLink]:
        return self.of_state(EngineState.SERVING)

    @property
    def reachable(self) -> list[EngineLink]:
        """Engines that a version can be published to."""
        return self.of_state(EngineState.SERVING, EngineState.JOINING)

    @property
    def joining(self) -> list[EngineLink]:
        return self.of_state(EngineState.JOINING)

    # --- states

    def healthy(self, link: EngineLink) -> None:
        self._move(link, EngineState.JOINING)

    def joined(self, link: EngineLink) -> None:
        """It holds the version of the others."""
        self._move(link, EngineState.SERVING)

    def take_out(self, link: EngineLink, why: str) -> None:
        """Nothing more goes to it; its calls are gone on with elsewhere. It comes back as a new process."""
        if link.state is not EngineState.OUT:
            self._leave(link)
            self._restart(link.name, why)

    def engine_ended(self, name: str) -> None:
        """Its process is gone; the supervisor starts another by itself."""
        link = self._named(name)
        if link.state is not EngineState.OUT:
            self._leave(link)

    def engine_started(self, name: str) -> EngineLink:
        """A new process: `wait_healthy`, then `healthy`."""
        link = self._named(name)
        if link.state is not EngineState.OUT:
            self._leave(link)
        self._move(link, EngineState.STARTING)
        link.client.forget()
        link.tokens_per_s = None
        return link

    def _leave(self, link: EngineLink) -> None:
        self._home = {home: known for home, known in self._home.items() if known is not link}
        self._move(link, EngineState.OUT)

    def _move(self, link: EngineLink, state: EngineState) -> None:
        link.move(state)
        (self._serves.set if self.serving else self._serves.clear)()
        self._changed()

    def _named(self, name: str) -> EngineLink:
        return next(link for link in self.links if link.name == name)

    # --- calls

    async def engine_for(self, home: int) -> EngineLink:
        """The engine that holds the prefixes of `home` (a group), or the one that is done soonest.

        Errors: DeadlineError, if no engine serves in time.
        """
        if not self._serves.is_set():
            hint = "see logs/engine-*.log"
            await within(self._healthy_s, self._serves.wait(), waiting_for="an engine that serves", hint=hint)
        if home not in self._home:
            self._home[home] = min(self.serving, key=lambda link: link.backlog)
        return self._home[home]

    def forget(self, home: int) -> None:
        """The rollouts that share `home` have all ended."""
        self._home.pop(home, None)
