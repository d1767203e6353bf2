"""What all dialects are translated to and from: chat messages as our conversations keep them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from palestra.core.records import is_sendable

Message = dict[str, Any]
Body = Mapping[str, Any]


class BadRequest(Exception):
    """The request cannot be answered as it is: what, and what to do. Never retried."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request. `tools` are JSON schemas as chat templates expect them; `after` is an answer it goes on from.
    `is_instructed`: the first message holds for this request alone, and for none that goes on from it."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    model: str
    max_tokens: int | None = None
    is_streamed: bool = False
    wants_usage: bool = False  # at the end of the stream
    after: str | None = None
    is_instructed: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One reply. `message` is as a conversation keeps it; `is_cut`: a limit of tokens ended it."""

    id: str
    message: Message
    is_cut: bool
    num_prompt_tokens: int
    num_tokens: int
    created: int  # unix time

    @property
    def content(self) -> str:
        return self.message.get("content") or ""

    @property
    def reasoning(self) -> str:
        return self.message.get("reasoning_content") or ""

    @property
    def calls(self) -> list[Message]:
        return self.message.get("tool_calls") or []


class Dialect(Protocol):
    """Pure: no method waits for anything."""

    ping: bytes  # said while a streamed reply is on its way

    def read(self, body: Body) -> Asked:
        """Errors: BadRequest."""
        ...

    def whole(self, asked: Asked, answer: Answer) -> dict[str, Any]: ...

    def opening(self, asked: Asked, id: str, created: int) -> Iterable[bytes]:
        """Events of a stream before anything is known of the reply."""
        ...

    def events(self, asked: Asked, answer: Answer) -> Iterator[bytes]:
        """All others, to the end."""
        ...

    def error(self, status: int, kind: str, text: str) -> dict[str, Any]: ...

    def error_event(self, kind: str, text: str) -> bytes:
        """What ends a stream that cannot go on."""
        ...


def event(data: Any, *, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + (data if isinstance(data, bytes) else msgspec.json.encode(data)) + b"\n\n"


def refuse(body: Body, fields: Mapping[str, Sequence[Any]]) -> None:
    """Errors: BadRequest, naming the first field whose value is none of those that mean "as usual"."""
    for name, usual in fields.items():
        if name in body and body[name] not in usual:
            shown = json.dumps(body[name], default=str)[:100]
            raise BadRequest(f"{name}={shown} is not supported: the policy is sampled as its recipe says; leave it out")


def messages_in(body: Body, name: str = "messages") -> list[Body]:
    found = body.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise BadRequest(f"{name} must be a list of at least one message")
    return found


def number_in(body: Body, *names: str) -> int | None:
    """The first of the fields that is there."""
    for name in names:
        if (value := body.get(name)) is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadRequest(f"{name}={value!r} must be a whole number above 0")
            return value
    return None


def text_of(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{what} must be text, not {type(value).__name__}")
    return value


def joined(parts: list[Message]) -> str | list[Message]:
    """Text alone as one text; parts with images as they are."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def text_part(text: Any) -> Message:
    return {"type": "text", "text": text_of(text, "the text of a part")}


def image_part(url: Any, detail: Any = None) -> Message:
    """`detail`: how closely it should be looked at, where the program says so."""
    place = {"url": text_of(url, "the address of an image")}
    return {"type": "image_url", "image_url": place if detail is None else {**place, "detail": detail}}


def function_tool(name: Any, description: Any, parameters: Any) -> dict[str, Any]:
    function = {
        "name": text_of(name, "the name of a tool"),
        "description": description or "",
        "parameters": parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def call_of(id: Any, name: Any, arguments: Any) -> Message:
    """A tool call as conversations keep it: arguments are an object, where they are one."""
    return {
        "type": "function",
        "id": text_of(id, "the id of a tool call"),
        "function": {"name": text_of(name, "the name of a tool call"), "arguments": as_object(arguments)},
    }


def as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return arguments
        return read if isinstance(read, dict) and is_sendable(read) else arguments
    return arguments


def as_text(arguments: Any) -> str:
    """Arguments as APIs send them."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def with_names(messages: list[Message]) -> list[Message]:
    """Results of tools with the name of their tool, which some templates show."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    return [
        {**message, "name": names[message["tool_call_id"]]}
        if message["role"] == "tool" and message.get("tool_call_id") in names
        else message
        for message in messages
    ]
