"""Agents we did not write: a program that knows the API of a provider asks us, and what it gets is the policy's.

Consumes: requests in the dialects of `palestra.env.dialects`. Produces: replies; samples, under the seat of the agent
that the program speaks for. Waits for: the agent's voice, which has deadlines of its own.
Woken by: requests. Ends when: `close` is called; a door when its rollout ends.

A request goes on with the conversation whose messages it repeats: token by token what was sampled stays as it was. One
that repeats none, because the program edited the history, asked twice, or asks something else beside, begins another.
"""

import asyncio
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from palestra.core.deadline import within
from palestra.core.errors import PalestraError, UserError
from palestra.env.agent import Agent
from palestra.env.dialects import BY_PATH, Answer, Asked, BadRequest, Dialect
from palestra.env.dialects.shape import as_object, with_names
from palestra.env.endings import ContextFull, Limit

_PING_S = 10.0
_RETRIED = "x-stainless-retry-count"  # of the clients of both providers
_CLIENT_S = 60.0  # a program that neither reads nor writes for so long is gone
_LARGEST = 256 * 2**20  # bytes of a request
_BACKLOG = 1024
_LAST_WORD_S = 1.0
_REMEMBERED = 256  # answers of a session that a request may name, or ask for again


class Gone(Exception):
    """The rollout that the key belonged to has ended."""


class Session:
    """The door of one agent: `ask` answers a program that speaks for it."""

    def __init__(
        self, agent: Agent, url: str, *, key: str | None = None, left: Callable[[str], None] = lambda key: None
    ):
        """`left` hears when it is closed. A key of its own, if none is given."""
        self.url, self.key = url, key or f"pal-{secrets.token_urlsafe(24)}"
        self._agent, self._left = agent, left
        self._talks: list[Agent] = []
        self._busy: set[Agent] = set()  # talks whose reply is on its way
        self._answered: dict[str, list[dict[str, Any]]] = {}  # conversations by the id of their last answer
        self._asking: set[asyncio.Task[Answer]] = set()
        self._by_body: dict[bytes, asyncio.Task[Answer]] = {}  # the last of each body, for a program that did not hear
        self._is_closed = False

    async def ask(self, asked: Asked, id: str, created: int, *, body: bytes = b"", is_retry: bool = False) -> Answer:
        """A program that tries again, as it did not hear the answer, gets the same one.

        Errors: BadRequest, Limit, Gone, PalestraError.
        """
        task = self._by_body.get(body) if is_retry else None
        if task is None or task.cancelled() or (task.done() and task.exception() is not None):
            self._by_body[body] = task = asyncio.ensure_future(self._ask(asked, id, created))
            _keep_newest(self._by_body, _REMEMBERED)
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Gone(f"the rollout of this key has ended; {self._agent.name} says nothing more") from None
            raise

    @property
    def is_asked(self) -> bool:
        """A reply is on its way."""
        return bool(self._asking)

    async def close(self) -> None:
        """No word is given any more; replies on their way are given up."""
        self._is_closed = True
        self._left(self.key)
        asking = list(self._asking)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    async def _ask(self, asked: Asked, id: str, created: int) -> Answer:
        if self._is_closed:
            raise Gone(f"the rollout of this key has ended; {self._agent.name} says nothing more")
        messages = self._whole(asked)
        if not messages:
            raise BadRequest("the messages are empty; say something in one of them")
        if messages[-1]["role"] == "assistant":
            raise BadRequest("the last message is the assistant's; what the policy says is not begun by others")
        talk, rest = self._talk_of(messages, asked.tools)
        self._busy.add(talk)
        try:
            said = await talk.relay(rest, schemas=asked.tools, at_most=asked.max_tokens)
        except UserError as refused:
            raise BadRequest(str(refused)) from refused
        finally:
            self._busy.discard(talk)
        self._answered[id] = list(talk.messages[asked.is_instructed :])
        _keep_newest(self._answered, _REMEMBERED)
        return Answer(
            id=id,
            message=said.message,
            is_cut=said.is_cut,
            num_prompt_tokens=said.num_prompt_tokens,
            num_tokens=said.num_tokens,
            created=created,
        )

    def _whole(self, asked: Asked) -> list[dict[str, Any]]:
        """With what was said up to the answer that a request goes on from, save what the system was told then."""
        if asked.after is None:
            return asked.messages
        if asked.after not in self._answered:
            raise BadRequest(f"previous_response_id={asked.after!r} is no answer of this rollout")
        instructions, rest = asked.messages[: asked.is_instructed], asked.messages[asked.is_instructed :]
        return with_names([*instructions, *self._answered[asked.after], *rest])

    def _talk_of(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> tuple[Agent, list[dict[str, Any]]]:
        """The longest conversation that `messages` go on with, and what is new in them; else one that begins."""
        for talk in sorted(self._talks, key=lambda talk: len(talk.messages), reverse=True):
            rest = messages[len(talk.messages) :]
            if talk in self._busy or not rest or talk.schemas != tools:
                continue
            if any(message["role"] == "assistant" for message in rest):
                continue
            if all(map(is_same, talk.messages, messages)):
                return talk, rest
        talk = self._agent.fork()
        self._talks.append(talk)
        return talk, messages


def _keep_newest(known: dict[Any, Any], count: int) -> None:
    while len(known) > count:
        del known[next(iter(known))]


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a program that repeats `one` as `other` means the same: ids, reasoning and white space at the ends, which
    programs drop or change, do not count."""
    return _meaning(one) == _meaning(other)


def _meaning(message: dict[str, Any]) -> tuple[Any, ...]:
    content = message.get("content") or ""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [(function["name"], as_object(function["arguments"])) for function in functions]
    return message["role"], content.strip() if isinstance(content, str) else content, calls


class Proxy:
    """The server, on a port that is opened when the first program is let in, or by `open`.

    `meet(key, url)` makes the session of a key that nobody was admitted with; without it such a key is refused.
    """

    def __init__(self, host: str = "127.0.0.1", *, port: int = 0, meet: Callable[[str, str], Session] | None = None):
        """`port` 0: a free one."""
        self._host, self._port, self._meet = host, port, meet
        self._sessions: dict[str, Session] = {}
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[web.AppRunner] | None = None

    def admit(self, agent: Agent) -> Session:
        """Let a program in that speaks for `agent`, until its session is closed."""
        session = Session(agent, self.open(), left=self.forget)
        self._sessions[session.key] = session
        return session

    async def close(self) -> None:
        for session in list(self._sessions.values()):
            await session.close()
        if self._serving is not None:
            await (await self._serving).cleanup()

    def forget(self, key: str) -> None:
        self._sessions.pop(key, None)

    def open(self) -> str:
        """Its address. Errors: OSError, if the port is taken."""
        if self._socket is None:
            self._socket = socket.create_server((self._host, self._port), backlog=_BACKLOG)
            self._serving = asyncio.get_running_loop().create_task(self._serve(self._socket))
        return f"http://{self._host}:{self._socket.getsockname()[1]}"

    async def _serve(self, listening: socket.socket) -> web.AppRunner:
        app = web.Application(client_max_size=_LARGEST)
        for prefix in ("", "/v1"):
            app.router.add_get(f"{prefix}/models", _models)
            for path, dialect in BY_PATH.items():
                app.router.add_post(f"{prefix}/{path}", self._answering(dialect))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_LAST_WORD_S)
        await runner.setup()
        await web.SockSite(runner, listening, backlog=_BACKLOG).start()
        return runner

    def _answering(self, dialect: Dialect) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            key = _key(request)
            if key and self._meet is not None and key not in self._sessions:
                self._sessions[key] = self._meet(key, self.open())
            if (session := self._sessions.get(key)) is None:
                text = "the key is that of no rollout in progress; use the agent's `key`, while its `run` lasts"
                return _error(dialect, 401, "invalid_api_key", text)
            try:
                body = await _heard(request.read())
                asked = _read(dialect, body)
            except BadRequest as bad:
                return _error(dialect, 400, "bad_request", str(bad))
            return await _answer(dialect, session, asked, request, body)

        return answer


async def _answer(
    dialect: Dialect, session: Session, asked: Asked, request: web.Request, body: bytes
) -> web.StreamResponse:
    id, created = secrets.token_hex(12), int(time.time())
    is_retry = request.headers.get(_RETRIED, "0") != "0"
    asking = asyncio.ensure_future(_tried(session.ask(asked, id, created, body=body, is_retry=is_retry)))
    if not asked.is_streamed:
        answer = await asking
        if isinstance(answer, Answer):
            return web.json_response(dialect.whole(asked, answer))
        return _error(dialect, *answer)
    response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
    await _heard(response.prepare(request))
    for piece in dialect.opening(asked, id, created):
        await _heard(response.write(piece))
    while not asking.done():
        await asyncio.wait({asking}, timeout=_PING_S)
        if not asking.done():
            await _heard(response.write(dialect.ping))
    answer = asking.result()
    ends = dialect.events(asked, answer) if isinstance(answer, Answer) else [dialect.error_event(*answer[1:])]
    for piece in ends:
        await _heard(response.write(piece))
    await _heard(response.write_eof())
    return response


async def _heard(saying: Awaitable[Any]) -> Any:
    return await within(_CLIENT_S, saying, waiting_for="a program to read its answer, or to send its request")


async def _tried(asking: Awaitable[Answer]) -> Answer | tuple[int, str, str]:
    """The answer, or status, kind and words of an error."""
    try:
        return await asking
    except BadRequest as bad:
        return 400, "bad_request", str(bad)
    except ContextFull as full:
        return 400, "context_length_exceeded", str(full)
    except Limit as limit:
        return 400, "limit_reached", str(limit)
    except Gone as gone:
        return 401, "invalid_api_key", str(gone)
    except PalestraError as failure:
        return 503, "unavailable", str(failure)
    except Exception as failure:
        return 500, "internal_error", f"{type(failure).__name__}: {failure}"


def _error(dialect: Dialect, status: int, kind: str, text: str) -> web.Response:
    """Nothing that a second try would mend: what can be tried again was."""
    return web.json_response(dialect.error(status, kind, text), status=status, headers={"x-should-retry": "false"})


def _read(dialect: Dialect, content: bytes) -> Asked:
    """Errors: BadRequest."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the request is no JSON object")
    try:
        return dialect.read(body)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise BadRequest(f"the request has not the shape that its API says: {error}") from error


def _key(request: web.Request) -> str:
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    return bearer or request.headers.get("x-api-key", "")


async def _models(request: web.Request) -> web.Response:
    model = {"id": "policy", "object": "model", "created": 0, "owned_by": "palestra"}
    return web.json_response({"object": "list", "data": [model]})
