"""OpenAI chat completions. Source: platform.openai.com/docs/api-reference/chat, and the types of package `openai`."""

from collections.abc import Iterable, Iterator
from typing import Any

from palestra.env.dialects.shape import (
    Answer,
    Asked,
    BadRequest,
    Body,
    Message,
    as_text,
    call_of,
    event,
    function_tool,
    image_part,
    joined,
    messages_in,
    number_in,
    refuse,
    text_of,
    text_part,
    with_names,
)

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_PIECE = 4096  # characters of a streamed piece


class Chat:
    ping = b": still at work\n\n"

    def read(self, body: Body) -> Asked:
        refuse(
            body,
            {
                "n": (1, None),
                "stop": (None, [], ""),
                "logprobs": (False, None),
                "logit_bias": (None, {}),
                "response_format": (None, {"type": "text"}),
                "functions": (None, []),
            },
        )
        options = body.get("stream_options") or {}
        return Asked(
            messages=with_names([_read_message(message) for message in messages_in(body)]),
            tools=[_read_tool(tool) for tool in body.get("tools") or ()],
            model=str(body.get("model", "")),
            max_tokens=number_in(body, "max_completion_tokens", "max_tokens"),
            is_streamed=bool(body.get("stream")),
            wants_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        )

    def whole(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        message: Message = {"role": "assistant", "content": answer.content or None, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
        head = _head("chat.completion", asked, answer.id, answer.created)
        return {**head, "choices": [choice], "usage": _usage(answer)}

    def opening(self, asked: Asked, id: str, created: int) -> Iterable[bytes]:
        yield _chunk(_head("chat.completion.chunk", asked, id, created), {"role": "assistant", "content": ""})

    def events(self, asked: Asked, answer: Answer) -> Iterator[bytes]:
        head = _head("chat.completion.chunk", asked, answer.id, answer.created)
        for piece in _pieces(answer.reasoning):
            yield _chunk(head, {"reasoning_content": piece})
        for piece in _pieces(answer.content):
            yield _chunk(head, {"content": piece})
        for index, call in enumerate(answer.calls):
            yield _chunk(head, {"tool_calls": [{"index": index, **_call(call)}]})
        yield _chunk(head, {}, finish=_finish(answer))
        if asked.wants_usage:
            yield event({**head, "choices": [], "usage": _usage(answer)})
        yield event(b"[DONE]")

    def error(self, status: int, kind: str, text: str) -> dict[str, Any]:
        return {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": kind}}

    def error_event(self, kind: str, text: str) -> bytes:
        return event(self.error(500, kind, text))


def _read_message(given: Body) -> Message:
    role = _ROLES.get(str(given.get("role")))
    if role is None:
        raise BadRequest(f"a message has the role {given.get('role')!r}; there are {', '.join(_ROLES)}")
    message: Message = {"role": role, "content": _read_content(given.get("content"))}
    if role == "tool":
        message["tool_call_id"] = text_of(given.get("tool_call_id"), "the tool_call_id of a tool's message")
    if role == "assistant":
        if reasoning := given.get("reasoning_content") or given.get("reasoning"):
            message["reasoning_content"] = text_of(reasoning, "reasoning")
        if calls := given.get("tool_calls"):
            message["tool_calls"] = [_read_call(call) for call in calls]
    return message


def _read_content(content: Any) -> str | list[Message]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadRequest("the content of a message is text or a list of parts")
    return joined([_read_part(part) for part in content])


def _read_part(part: Any) -> Message:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return text_part(part.get("text"))
    if kind == "refusal":
        return text_part(part.get("refusal"))
    if kind == "image_url" and isinstance(part.get("image_url"), dict):
        return image_part(part["image_url"].get("url"), part["image_url"].get("detail"))
    raise BadRequest(f"a part of a message is of type {kind!r}; text and image_url can be read")


def _read_call(call: Any) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadRequest("a tool call of a message has no function")
    return call_of(call.get("id"), function.get("name"), function.get("arguments"))


def _read_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise BadRequest("tools are functions: {'type': 'function', 'function': {...}}")
    function = tool["function"]
    return function_tool(function.get("name"), function.get("description"), function.get("parameters"))


def _call(call: Message) -> Message:
    function = call["function"]
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": as_text(function["arguments"])},
    }


def _head(kind: str, asked: Asked, id: str, created: int) -> dict[str, Any]:
    return {"id": f"chatcmpl-{id}", "object": kind, "created": created, "model": asked.model}


def _chunk(head: dict[str, Any], delta: Message, *, finish: str | None = None) -> bytes:
    return event({**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})


def _finish(answer: Answer) -> str:
    return "length" if answer.is_cut else "tool_calls" if answer.calls else "stop"


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.num_prompt_tokens + answer.num_tokens
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_tokens,
        "total_tokens": total,
    }


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
