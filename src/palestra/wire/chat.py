"""The client of an OpenAI-compatible endpoint: chat messages in, a message out. Nothing of it can be trained on."""

import asyncio
import os
import random
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec
from msgspec import Struct, field

from palestra.core.content import Part, as_parts, images_in, text_part
from palestra.core.deadline import within
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import ChatReply, Sampling, is_sendable

_TRIES = 6
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_REFUSED = {401, 403, 404}
_TOO_LONG = (
    "context_length_exceeded",
    "maximum context length",
    "maximum model length",
    "model's context length",
    "context window",
    "context size",
    "prompt is too long",
)
_SEES_NOTHING = (
    "is not a multimodal model",
    "at most 0 image",
    "image_url is only supported by certain models",
)
_CUT = {"length", "max_tokens", "model_length"}
_BROKEN = {"abort", "error", "content_filter", "insufficient_system_resource"}  # not the model's own end


class TooLongError(InfrastructureError):
    """The conversation does not fit into the model's context."""


class ChatClient:
    """One model behind `url`, such as http://127.0.0.1:8000/v1. The key is read from the environment."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None,
        call_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        """Errors: UserError, if `key_env` names no variable of the environment."""
        self.url, self.model, self._call_s = url.rstrip("/"), model, call_s
        key = os.environ.get(key_env, "").strip() if key_env else ""
        if key_env and not key:
            raise UserError(f"the environment has no {key_env}, which was named as the key of {url}; export it")
        if not key.isprintable() or not key.isascii():
            raise UserError(f"{key_env} holds what no key of an endpoint can: line breaks, or letters beyond ASCII")
        self._http = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], sampling: Sampling, *, seed: int
    ) -> ChatReply:
        """The next message. Busy answers and broken connections are tried again, later each time.

        Errors: UserError, if the endpoint refuses the key, knows no such model, or shows it no images; TooLongError;
        InfrastructureError.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": _as_all_sent(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
        }
        if tools:
            body["tools"] = list(tools)
        asking = self._tried(msgspec.json.encode(body))
        return await within(self._call_s, asking, waiting_for=f"a reply of {self.model} at {self.url}")

    async def _tried(self, content: bytes) -> ChatReply:
        headers = {"content-type": "application/json"}
        for number in range(_TRIES):
            try:
                response = await self._http.post(f"{self.url}/chat/completions", content=content, headers=headers)
            except httpx.LocalProtocolError as error:
                raise InfrastructureError(f"the request to {self.url} cannot be sent") from error
            except httpx.TransportError as error:
                failure, pause_s = f"{type(error).__name__} {error}", None
            else:
                if response.is_success:
                    return _reply(response.content, self.url)
                failure = self._failure(response)
                pause_s = _asked_pause_s(response)
            if number + 1 < _TRIES:
                longest_s = min(_FIRST_PAUSE_S * 2**number, _LONGEST_PAUSE_S)
                await asyncio.sleep(pause_s if pause_s is not None else longest_s * random.uniform(0.5, 1))
        raise InfrastructureError(f"{self.url} gave no reply in {_TRIES} tries: {failure}")

    def _failure(self, response: httpx.Response) -> str:
        """What a failed answer says, if another try may help. Errors: as `ask`."""
        said = f"{response.status_code}: {_message(response)}"
        if response.status_code in _BUSY:
            return said
        if response.status_code in _REFUSED:
            raise UserError(f"{self.url} refused model {self.model!r} ({said}); check the model's name and the key")
        if any(words in said.lower() for words in _TOO_LONG):
            raise TooLongError(f"{self.url}: {said}")
        if any(words in said.lower() for words in _SEES_NOTHING):
            raise UserError(f"{self.url} shows no images to {self.model!r} ({said}); name a model that sees")
        if "unsupported parameter" in said.lower() or "unsupported_parameter" in said:
            raise UserError(f"{self.url} does not know a parameter of ours for {self.model!r} ({said})")
        raise InfrastructureError(f"{self.url} refused the request ({said})")


class _Function(Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] = ""


class _Call(Struct, frozen=True):
    function: _Function
    id: str = ""


class _Message(Struct, frozen=True):
    content: str | None = None
    tool_calls: list[_Call] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(Struct, frozen=True):
    message: _Message
    finish_reason: str | None = None


class _Usage(Struct, frozen=True):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class _Answer(Struct, frozen=True):
    choices: list[_Choice]
    usage: _Usage | None = field(default_factory=_Usage)


_decode = msgspec.json.Decoder(_Answer).decode


def _reply(content: bytes, url: str) -> ChatReply:
    try:
        answer = _decode(content)
        choice, usage = answer.choices[0], answer.usage or _Usage()
    except (msgspec.DecodeError, IndexError, RecursionError) as error:
        raise InfrastructureError(f"{url} answered what is no chat completion: {error}") from error
    if choice.finish_reason in _BROKEN:
        raise InfrastructureError(f"{url} ended a reply with {choice.finish_reason!r}")
    return ChatReply(
        message=_as_kept(choice.message),
        finish_reason="length" if choice.finish_reason in _CUT else "stop",
        num_tokens=usage.completion_tokens,
        num_prompt_tokens=usage.prompt_tokens,
    )


def _as_kept(message: _Message) -> dict[str, Any]:
    """As our conversations keep it: arguments as an object, where they are one."""
    kept: dict[str, Any] = {"role": "assistant", "content": message.content or ""}
    if reasoning := message.reasoning_content or message.reasoning:
        kept["reasoning_content"] = reasoning
    if message.tool_calls:
        kept["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or f"call{number:05d}",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return kept


def _arguments(given: str | dict[str, Any]) -> Any:
    if isinstance(given, dict):
        return given if is_sendable(given) else msgspec.json.encode(given).decode()
    try:
        read = msgspec.json.decode(given or "{}")
    except (msgspec.DecodeError, RecursionError):
        return given
    return read if isinstance(read, dict) and is_sendable(read) else given


def _as_all_sent(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the API wants them. What a tool gives is text there: its images follow the results of the turn, each behind
    the mark that stands in its place, as a message of the user or at the head of one."""
    sent: list[dict[str, Any]] = []
    waiting: list[Part] = []
    num_images = 0
    for message in messages:
        if waiting and message["role"] != "tool":
            is_users = message["role"] == "user"
            head = {**message, "content": [*waiting, *as_parts(message.get("content"))]} if is_users else _user(waiting)
            sent += [head] if is_users else [head, _as_sent(message)]
            waiting = []
        elif message["role"] == "tool" and images_in(message.get("content")):
            text, shown = _apart(message["content"], after=num_images)
            waiting, num_images = [*waiting, *shown], num_images + len(shown) // 2
            sent.append(_as_sent({**message, "content": text}))
        else:
            sent.append(_as_sent(message))
    return [*sent, _user(waiting)] if waiting else sent


def _user(parts: list[Part]) -> dict[str, Any]:
    return {"role": "user", "content": parts}


def _apart(parts: Sequence[Part], *, after: int) -> tuple[str, list[Part]]:
    """A tool's result as text with marks in place of its images; mark and image, one after the other."""
    lines, shown = list[str](), list[Part]()
    for part in parts:
        if images_in([part]):
            after += 1
            lines.append(f"[image {after}]")
            shown += [text_part(lines[-1]), part]
        else:
            lines.append(part["text"])
    return "\n".join(lines), shown


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """As the API wants it: arguments as text, no reasoning."""
    sent = {key: value for key, value in message.items() if key != "reasoning_content"}
    if calls := sent.get("tool_calls"):
        sent["tool_calls"] = [{**call, "function": _function_as_sent(call["function"])} for call in calls]
    return sent


def _function_as_sent(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    return {
        **function,
        "arguments": arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode(),
    }


def _asked_pause_s(response: httpx.Response) -> float | None:
    """What the endpoint asks for, within reason."""
    try:
        return min(float(response.headers["retry-after"]), _LONGEST_PAUSE_S)
    except (KeyError, ValueError):
        return None


def _message(response: httpx.Response) -> str:
    try:
        parsed = msgspec.json.decode(response.content)
        error = parsed.get("error", parsed)
        if not isinstance(error, dict):
            return str(error)
        return " ".join(str(error[key]) for key in ("message", "code") if error.get(key)) or str(error)
    except (msgspec.DecodeError, AttributeError):
        return response.text[:500]
