"""The backends `prime`, `e2b`, `modal` and `daytona`: sandboxes of providers, which run a command and take files.

Each request is one command there, which starts an agent that ends with its answer (`once.py`): so programs, files and
errors are those of every other sandbox. What needs a connection (processes in the background, ports, a proxy) is not
there. The agent has the rights of the programs, which can change it: do not let one program judge another there.
"""

import asyncio
import base64
import binascii
import shlex
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, PalestraError
from palestra.sandbox import agent
from palestra.sandbox.agent import MOST_BODY, frame, frames
from palestra.sandbox.backends import once
from palestra.sandbox.backends.base import Started
from palestra.sandbox.backends.endings import Endings
from palestra.sandbox.link import Answer, Link, OnStream
from palestra.sandbox.records import MEGABYTE, Isolation, Limits, SandboxGoneError, SandboxStartError, UnsupportedError

START_S = 300.0
DIRECTORY = "/tmp/palestra"
HOME = f"{DIRECTORY}/home"
_ANSWERED = ("exec", "write", "read", "list", "remove", "ping")
_PATIENCE_S = 60.0  # beyond a program's own time, for the way there and back
_MOST_IN_LINE = 45 * 1024  # bytes of a request that goes in the command itself

T = TypeVar("T")


class Place(Protocol):
    """A sandbox of a provider. Errors: whatever its library raises."""

    async def run(self, line: str, deadline_s: float) -> tuple[int, str]:
        """By a shell: its exit code, and what it wrote."""
        ...

    async def write(self, path: str, content: bytes) -> None: ...

    async def read(self, path: str) -> bytes: ...

    async def delete(self) -> None: ...


class Provider(Protocol):
    name: str
    isolation: Isolation

    def __init__(self, image: str | None): ...

    async def create(self, limits: Limits) -> Place: ...

    async def close(self) -> None: ...


class FarLink:
    """As a `Link`: requests and their answers. What fails on the way ends the sandbox, and whoever waits is told."""

    def __init__(self, place: Place, provider: str, memory_bytes: int):
        loop = asyncio.get_running_loop()
        self._place, self._provider, self._memory = place, provider, memory_bytes
        self.ready: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._reason, self._slots = "it was closed", set[int]()

    async def install(self) -> None:
        """What answers in there. Errors: SandboxGoneError."""
        for module in (agent, once):
            source = Path(str(module.__file__))
            content = await asyncio.to_thread(source.read_bytes)
            await self._attempt(self._place.write(f"{DIRECTORY}/{source.name}", content), _PATIENCE_S)
        await self.call({"do": "ping"})
        self.ready.set_result(None)

    async def call(self, header: dict[str, Any], body: bytes = b"", *, on_stream: OnStream | None = None) -> Answer:
        """Errors: as of `Link.call`; UnsupportedError. Output is streamed when the program has ended, all at once."""
        if self.closed.done():
            raise SandboxGoneError(self._reason)
        if header["do"] not in _ANSWERED:
            raise UnsupportedError(
                f"the sandbox {self._provider!r} has neither processes in the background nor ports nor hosts to reach "
                f"(asked: {header['do']!r}); 'local' has"
            )
        if len(body) > MOST_BODY:
            raise ValueError(f"{len(body)} bytes at once are more than {MOST_BODY}; send them in parts")
        limit_s = float(header.get("timeout_s") or 0) + _PATIENCE_S
        said = frame({**header, "id": 1, "stream": False}, body)
        answer, data = await self._attempt(self._asked(said, limit_s), limit_s)
        _raise_error(answer)
        if on_stream is not None:
            cut = int(answer.get("stdout_bytes", 0))
            for name, piece in (("stdout", data[:cut]), ("stderr", data[cut:])):
                if piece:
                    on_stream(name, piece)
        return answer, data, None

    def close(self, reason: str) -> None:
        if self.closed.done():
            return
        self._reason = reason
        self.closed.set_result(None)
        if not self.ready.done():
            self.ready.set_exception(SandboxGoneError(reason))
            self.ready.exception()  # seen, if nobody waits

    async def _attempt(self, doing: Coroutine[Any, Any, T], limit_s: float) -> T:
        """Errors: SandboxGoneError, for all that is wrong with it, its provider, or the way there."""
        task = asyncio.ensure_future(doing)
        try:
            await asyncio.wait({task, self.closed}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.close(f"{self._provider} did not answer within {limit_s:g} s")
                raise SandboxGoneError(self._reason)
            return task.result()
        except (SandboxGoneError, asyncio.CancelledError):
            raise
        except Exception as error:  # of a library that we do not know
            self.close(f"{self._provider}: {type(error).__name__}: {error}"[:500])
            raise SandboxGoneError(self._reason) from None
        finally:
            task.cancel()

    async def _asked(self, said: bytes, limit_s: float) -> tuple[dict[str, Any], bytes]:
        """Files of a call that was cancelled are never another's: what it began there may go on."""
        slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots)
        self._slots.add(slot)
        request, answer = f"{DIRECTORY}/request-{slot}", f"{DIRECTORY}/answer-{slot}"
        if len(said) > _MOST_IN_LINE:
            await self._place.write(request, said)
            told = f"@{request}"
        else:
            told = base64.b64encode(said).decode()
        words = ["python3", "-I", "-S", f"{DIRECTORY}/once.py", DIRECTORY, HOME, str(self._memory), answer, told]
        code, output = await self._place.run(shlex.join(words), limit_s)
        last = output.strip().rpartition("\n")[2].strip()
        if code != 0 or not last:
            raise ValueError(f"its agent ended with exit code {code}: {output[-200:]!r}")
        found = _parsed(await self._place.read(answer) if last == "@" else _decoded(last))
        self._slots.discard(slot)
        return found


def _decoded(text: str) -> bytes:
    """Errors: ValueError."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"what it sent is no answer: {text[:80]!r}") from None


def _parsed(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Errors: ValueError, for anything but one whole frame."""
    buffer = bytearray(data)
    found = list(frames(buffer))
    if len(found) != 1 or buffer:
        raise ValueError(f"what it sent is no answer: {len(found)} frames and {len(buffer)} bytes")
    return found[0]


def _raise_error(answer: dict[str, Any]) -> None:
    if answer.get("error") == "os":
        raise OSError(answer.get("errno"), str(answer.get("message")))
    if answer.get("error") is not None:
        raise ValueError(str(answer.get("message")))


class Remote:
    """A backend over a provider. `memory_mb` is watched by the agent; more exactly than a provider can be asked for."""

    home = HOME
    ends_by_programs = False  # each request starts an agent of its own
    grace_s = _PATIENCE_S

    def __init__(self, provider: Provider):
        self._provider, self._endings = provider, Endings()
        self.name, self.isolation = provider.name, provider.isolation
        self.layers: tuple[str, ...] = ("provider", "watchdog")

    async def start(self, limits: Limits) -> Started:
        """Errors: SandboxStartError; UserError, of the provider's settings."""
        place = await self._created(limits)
        link = FarLink(place, self.name, limits.memory_mb * MEGABYTE)
        started = Started(cast(Link, link), kill=lambda: link.close("it was killed"))
        link.closed.add_done_callback(lambda _: self._endings.begin(self._deleted(place, started), "a sandbox"))
        try:
            await within(START_S, link.install(), waiting_for=f"{self.name} to start an agent")
        except BaseException as error:
            link.close(str(error))
            if isinstance(error, SandboxGoneError | DeadlineError):
                raise SandboxStartError(f"{self.name}: {error}") from None
            raise
        return started

    async def _created(self, limits: Limits) -> Place:
        try:
            return await within(START_S, self._provider.create(limits), waiting_for=f"{self.name} to make a sandbox")
        except PalestraError as error:
            if isinstance(error, DeadlineError):
                raise SandboxStartError(f"{self.name}: {error}") from None
            raise
        except Exception as error:  # of a library that we do not know
            raise SandboxStartError(f"{self.name}: {type(error).__name__}: {error}"[:500]) from None

    async def _deleted(self, place: Place, started: Started) -> None:
        try:
            await within(_PATIENCE_S, place.delete(), waiting_for=f"{self.name} to delete a sandbox")
        finally:
            started.set_ended("it was deleted")

    async def interpreter(self, limits: Limits) -> None:
        """None waits: a program is two requests."""
        return

    async def close(self) -> None:
        await self._endings.close()
        await within(_PATIENCE_S, self._provider.close(), waiting_for=f"{self.name} to close its connections")
