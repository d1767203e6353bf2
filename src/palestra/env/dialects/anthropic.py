"""Anthropic messages. Source: docs.anthropic.com/en/api/messages, and the types of the `anthropic` package."""

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

_UNREAD = "__unread__"  # the only argument of a call whose arguments are no JSON object
_SIGNATURE = "palestra"  # of thoughts: clients repeat unsigned ones as text, if at all
_EMPTY = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


class Messages:
    ping = event({"type": "ping"}, name="ping")

    def read(self, body: Body) -> Asked:
        refuse(body, {"stop_sequences": (None, [])})
        messages = [{"role": "system", "content": system}] if (system := _system(body.get("system"))) else []
        for given in messages_in(body):
            messages += _read_message(given)
        return Asked(
            messages=with_names(messages),
            tools=[_read_tool(tool) for tool in body.get("tools") or ()],
            model=str(body.get("model", "")),
            max_tokens=number_in(body, "max_tokens"),
            is_streamed=bool(body.get("stream")),
        )

    def whole(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        usage = {"input_tokens": answer.num_prompt_tokens, "output_tokens": answer.num_tokens}
        return {
            **_head(asked, answer.id),
            "content": list(_blocks(answer)),
            "stop_reason": _stop_reason(answer),
            "usage": usage,
        }

    def opening(self, asked: Asked, id: str, created: int) -> Iterable[bytes]:
        message = {**_head(asked, id), "content": [], "usage": {"input_tokens": 0, "output_tokens": 0}}
        yield _named({"type": "message_start", "message": message})

    def events(self, asked: Asked, answer: Answer) -> Iterator[bytes]:
        for index, block in enumerate(_blocks(answer)):
            yield _named({"type": "content_block_start", "index": index, "content_block": _empty(block)})
            for delta in _deltas(block):
                yield _named({"type": "content_block_delta", "index": index, "delta": delta})
            yield _named({"type": "content_block_stop", "index": index})
        usage = {"input_tokens": answer.num_prompt_tokens, "output_tokens": answer.num_tokens}
        delta = {"stop_reason": _stop_reason(answer), "stop_sequence": None}
        yield _named({"type": "message_delta", "delta": delta, "usage": usage})
        yield _named({"type": "message_stop"})

    def error(self, status: int, kind: str, text: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": _KINDS.get(status, "api_error"), "message": f"{kind}: {text}"}}

    def error_event(self, kind: str, text: str) -> bytes:
        return event(self.error(500, kind, text), name="error")


def _system(system: Any) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    if not isinstance(system, list):
        raise BadRequest("system is text or a list of text blocks")
    return "\n".join(text_of(block.get("text"), "a block of system") for block in system)


def _read_message(given: Body) -> list[Message]:
    role, content = given.get("role"), given.get("content")
    if role not in ("user", "assistant"):
        raise BadRequest(f"a message has the role {role!r}; there are user and assistant, and `system` beside them")
    blocks: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise BadRequest("the content of a message is text or a list of blocks")
    return _read_user(blocks) if role == "user" else [_read_assistant(blocks)]


def _read_user(blocks: list[Body]) -> list[Message]:
    """Results of tools are messages of their own, before what the user says."""
    results: list[Message] = [
        {
            "role": "tool",
            "tool_call_id": text_of(block.get("tool_use_id"), "the tool_use_id of a result"),
            "content": _read_result(block),
        }
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    parts = [_read_part(block) for block in blocks if block.get("type") != "tool_result"]
    return [*results, {"role": "user", "content": joined(parts)}] if parts else results


def _read_result(block: Body) -> str | list[Message]:
    content = block.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return joined([_read_part(part) for part in content])


def _read_part(block: Any) -> Message:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return text_part(block.get("text"))
    if kind == "image" and isinstance(source := block.get("source"), dict):
        if source.get("type") == "base64":
            return image_part(f"data:{source.get('media_type')};base64,{source.get('data')}")
        return image_part(source.get("url"))
    raise BadRequest(f"a block of a message is of type {kind!r}; text, image, tool_use and tool_result can be read")


def _read_assistant(blocks: list[Body]) -> Message:
    text = "".join(text_of(block.get("text"), "a text block") for block in blocks if block.get("type") == "text")
    message: Message = {"role": "assistant", "content": text}
    thoughts = [str(block.get("thinking", "")) for block in blocks if block.get("type") == "thinking"]
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls := [_read_call(block) for block in blocks if block.get("type") == "tool_use"]:
        message["tool_calls"] = calls
    return message


def _read_call(block: Body) -> Message:
    given = block.get("input")
    if isinstance(given, dict) and given.keys() == {_UNREAD}:
        given = given[_UNREAD]
    return call_of(block.get("id"), block.get("name"), given)


def _read_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or "input_schema" not in tool:
        raise BadRequest("tools have a name and an input_schema; tools of the server are not offered")
    return function_tool(tool.get("name"), tool.get("description"), tool["input_schema"])


def _head(asked: Asked, id: str) -> dict[str, Any]:
    head = {"id": f"msg_{id}", "type": "message", "role": "assistant", "model": asked.model}
    return {**head, "stop_reason": None, "stop_sequence": None}


def _blocks(answer: Answer) -> Iterator[Message]:
    if answer.reasoning:
        yield {"type": "thinking", "thinking": answer.reasoning, "signature": _SIGNATURE}
    if answer.content:
        yield {"type": "text", "text": answer.content}
    for call in answer.calls:
        given = call["function"]["arguments"]
        arguments = given if isinstance(given, dict) else {_UNREAD: given}
        yield {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}


def _empty(block: Message) -> Message:
    return {**block, **_EMPTY[block["type"]]}


def _deltas(block: Message) -> Iterator[Message]:
    if block["type"] == "text":
        yield {"type": "text_delta", "text": block["text"]}
    elif block["type"] == "thinking":
        yield {"type": "thinking_delta", "thinking": block["thinking"]}
        yield {"type": "signature_delta", "signature": block["signature"]}
    else:
        yield {"type": "input_json_delta", "partial_json": as_text(block["input"])}


def _stop_reason(answer: Answer) -> str:
    return "max_tokens" if answer.is_cut else "tool_use" if answer.calls else "end_turn"


def _named(data: dict[str, Any]) -> bytes:
    return event(data, name=data["type"])
