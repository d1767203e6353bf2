"""Who answers the calls of an evaluation: engines of ours, that give tokens, or an endpoint, that gives messages."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from palestra.config.schema import Endpoint, RunConfig
from palestra.core.deadline import within
from palestra.core.errors import InfrastructureError
from palestra.core.ledger import Ledger, LedgerEntry
from palestra.core.records import ChatReply, Reply
from palestra.orchestrate.endpoints import ChatEndpoint
from palestra.orchestrate.fleet import EngineLink, EngineState, Fleet
from palestra.orchestrate.gateway import Gateway
from palestra.wire.messages import Call
from palestra.wire.policy import EngineClient
from palestra.wire.rundir import Attempt

VERSION = 0  # of the weights that an engine is started with


class Answers(Protocol):
    """`max_in_flight` rollouts may ask at once. `joining` are tasks that wait for engines beside the evaluation."""

    max_in_flight: int
    joining: set[asyncio.Task[None]]

    async def start(self) -> None:
        """Errors: DeadlineError, if nobody is there in time."""
        ...

    async def answer(self, session: int, call: Call, *, seed: int) -> Reply | ChatReply:
        """Errors: InfrastructureError; UserError, if every call would be refused."""
        ...

    def release(self, session: int) -> None: ...

    def ended(self, process: str) -> bool:
        """A process is gone. Whether it is one of its own."""
        ...

    def started(self, process: str) -> None:
        """A process took the place of one that ended."""
        ...

    def close_ledgers(self) -> list[LedgerEntry]: ...

    async def close(self) -> None: ...


class EndpointAnswers:
    """An OpenAI-compatible API."""

    def __init__(self, endpoint: Endpoint, model: str):
        """Errors: UserError, if its key is not there."""
        self._endpoint = ChatEndpoint(endpoint, model)
        self.max_in_flight = endpoint.max_in_flight
        self.joining: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        pass

    async def answer(self, session: int, call: Call, *, seed: int) -> ChatReply:
        return await self._endpoint.ask(call, seed=seed)

    def release(self, session: int) -> None:
        pass

    def ended(self, process: str) -> bool:
        return False

    def started(self, process: str) -> None:
        pass

    def close_ledgers(self) -> list[LedgerEntry]:
        return []

    async def close(self) -> None:
        await self._endpoint.close()


class EngineAnswers:
    """Engines with the weights they were started with. One that dies is started again by the supervisor."""

    def __init__(
        self,
        config: RunConfig,
        attempt: Attempt,
        restart: Callable[[str, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
        *,
        make_client: Callable[[str], EngineClient] = EngineClient,
    ):
        engine = config.engine
        links = [
            EngineLink(
                f"engine-{index}",
                make_client(url),
                Ledger(f"engine-{index}", since=attempt.started_at),
                limit=engine.max_in_flight,
            )
            for index, url in enumerate(attempt.engines)
        ]
        self._healthy_s, self._spawn = engine.healthy_s, spawn
        self._fleet = Fleet(links, healthy_s=engine.healthy_s, restart=restart, changed=lambda: None)
        self._gateway = Gateway.by(engine, self._fleet)
        self.max_in_flight = engine.max_in_flight * len(links)
        self.joining: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """One engine is enough; the others join beside."""
        for link in self._fleet.links:
            self._join_beside(link)
        session = 0  # no rollout's
        await self._fleet.engine_for(session)
        self._fleet.release(session)

    def _join_beside(self, link: EngineLink) -> None:
        self.joining.add(task := self._spawn(self._join(link, link.starts)))
        task.add_done_callback(self.joining.discard)

    async def _join(self, link: EngineLink, start: int) -> None:
        """The process of this `start`, which is the supervisor's affair until it is healthy."""
        try:
            await link.client.wait_healthy(self._healthy_s)
            await link.client.label(VERSION)
        except InfrastructureError as failure:
            print(f"{link.name} is not there yet: {failure}", file=sys.stderr)
            return
        if link.starts == start and link.state is EngineState.STARTING:
            self._fleet.healthy(link)
            self._fleet.joined(link)

    async def answer(self, session: int, call: Call, *, seed: int) -> Reply:
        return await self._gateway.call(session, call.token_ids, call.sampling, seed=seed)

    def release(self, session: int) -> None:
        self._fleet.release(session)

    def ended(self, process: str) -> bool:
        is_own = process in self._names
        if is_own:
            self._fleet.engine_ended(process)
        return is_own

    def started(self, process: str) -> None:
        if self._fleet.is_out(process):
            self._join_beside(self._fleet.engine_started(process))

    @property
    def _names(self) -> set[str]:
        return {link.name for link in self._fleet.links}

    def close_ledgers(self) -> list[LedgerEntry]:
        return [link.ledger.close() for link in self._fleet.links]

    async def close(self) -> None:
        await within(self._healthy_s, self._gateway.close(), waiting_for="engine calls to end")
