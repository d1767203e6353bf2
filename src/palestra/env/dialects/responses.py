"""OpenAI responses. Source: platform.openai.com/docs/api-reference/responses, and the types of package `openai`."""

import itertools
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

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Responses:
    ping = b": still at work\n\n"

    def read(self, body: Body) -> Asked:
        text = body.get("text")
        format = text.get("format") if isinstance(text, dict) else None
        refuse({"text.format": format}, {"text.format": (None, {"type": "text"})})
        refuse(body, {"background": (None, False), "conversation": (None,), "prompt": (None,)})
        after = body.get("previous_response_id")
        instructions = body.get("instructions")
        messages = [{"role": "system", "content": text_of(instructions, "instructions")}] if instructions else []
        return Asked(
            messages=with_names([*messages, *_read_input(body)]),
            tools=[_read_tool(tool) for tool in body.get("tools") or ()],
            model=str(body.get("model", "")),
            max_tokens=number_in(body, "max_output_tokens"),
            is_streamed=bool(body.get("stream")),
            after=None if after is None else text_of(after, "previous_response_id").removeprefix("resp_"),
            is_instructed=bool(instructions),
        )

    def whole(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        return _response(asked, answer.id, answer.created, "incomplete" if answer.is_cut else "completed", answer)

    def opening(self, asked: Asked, id: str, created: int) -> Iterable[bytes]:
        response = _response(asked, id, created, "in_progress", None)
        yield _named({"type": "response.created", "sequence_number": 0, "response": response})
        yield _named({"type": "response.in_progress", "sequence_number": 1, "response": response})

    def events(self, asked: Asked, answer: Answer) -> Iterator[bytes]:
        numbers = itertools.count(2)
        for index, item in enumerate(_items(answer)):
            for data in _item_events(index, item):
                yield _named({**data, "sequence_number": next(numbers)})
        kind = "response.incomplete" if answer.is_cut else "response.completed"
        yield _named({"type": kind, "sequence_number": next(numbers), "response": self.whole(asked, answer)})

    def error(self, status: int, kind: str, text: str) -> dict[str, Any]:
        return {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": kind}}

    def error_event(self, kind: str, text: str) -> bytes:
        return _named({"type": "error", "code": kind, "message": text, "param": None, "sequence_number": 2})


# --- requests


def _read_input(body: Body) -> list[Message]:
    given = body.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    for item in messages_in(body, "input"):
        match item.get("type", "message"):
            case "message":
                _add(messages, _read_message(item))
            case "reasoning":
                _add(messages, {"role": "assistant", "content": "", "reasoning_content": _read_reasoning(item)})
            case "function_call":
                call = call_of(item.get("call_id"), item.get("name"), item.get("arguments"))
                _add(messages, {"role": "assistant", "content": "", "tool_calls": [call]})
            case "function_call_output":
                id = text_of(item.get("call_id"), "the call_id of an output")
                messages.append({"role": "tool", "tool_call_id": id, "content": _read_content(item.get("output"))})
            case kind:
                raise BadRequest(
                    f"an item of input is of type {kind!r}; message, reasoning, function_call and "
                    "function_call_output can be read"
                )
    return messages


def _add(messages: list[Message], message: Message) -> None:
    """What one reply consists of are several items here, and one message elsewhere."""
    last = messages[-1] if messages else None
    if message["role"] != "assistant" or last is None or last["role"] != "assistant":
        messages.append(message)
        return
    if message["content"]:
        last["content"] = f"{last['content']}{message['content']}"
    if message.get("reasoning_content"):
        last["reasoning_content"] = last.get("reasoning_content", "") + message["reasoning_content"]
    if message.get("tool_calls"):
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]


def _read_message(item: Body) -> Message:
    role = _ROLES.get(str(item.get("role")))
    if role is None:
        raise BadRequest(f"a message has the role {item.get('role')!r}; there are {', '.join(_ROLES)}")
    return {"role": role, "content": _read_content(item.get("content"))}


def _read_content(content: Any) -> str | list[Message]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadRequest("content is text or a list of parts")
    return joined([_read_part(part) for part in content])


def _read_part(part: Any) -> Message:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text"):
        return text_part(part.get("text"))
    if kind == "refusal":
        return text_part(part.get("refusal"))
    if kind == "input_image" and part.get("image_url"):
        return image_part(part["image_url"], part.get("detail"))
    raise BadRequest(f"a part of a message is of type {kind!r}; input_text, output_text and input_image can be read")


def _read_reasoning(item: Body) -> str:
    return "".join(str(part.get("text", "")) for part in item.get("content") or () if isinstance(part, dict))


def _read_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise BadRequest("tools are functions: {'type': 'function', 'name': ...}; tools of the server are not offered")
    return function_tool(tool.get("name"), tool.get("description"), tool.get("parameters"))


# --- answers


def _response(asked: Asked, id: str, created: int, status: str, answer: Answer | None) -> dict[str, Any]:
    response: dict[str, Any] = {
        "id": f"resp_{id}",
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "model": asked.model,
        "output": [] if answer is None else list(_items(answer)),
        "parallel_tool_calls": True,
        "previous_response_id": asked.after and f"resp_{asked.after}",
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
    }
    if answer is not None:
        response["usage"] = {
            "input_tokens": answer.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
        }
    return response


def _items(answer: Answer) -> Iterator[Message]:
    status = "incomplete" if answer.is_cut else "completed"
    if answer.reasoning:
        thoughts = [{"type": "reasoning_text", "text": answer.reasoning}]
        yield {"id": f"rs_{answer.id}", "type": "reasoning", "summary": [], "content": thoughts, "status": status}
    if answer.content or not answer.calls:
        parts = [{"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}]
        yield {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "status": status, "content": parts}
    for number, call in enumerate(answer.calls):
        yield {
            "id": f"fc_{answer.id}_{number}",
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": as_text(call["function"]["arguments"]),
            "status": status,
        }


def _item_events(index: int, item: Message) -> Iterator[dict[str, Any]]:
    place = {"output_index": index, "item_id": item["id"]}
    yield {"type": "response.output_item.added", "output_index": index, "item": _begun(item)}
    if item["type"] == "function_call":
        arguments = item["arguments"]
        yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
        done = {"arguments": arguments, "name": item["name"]}
        yield {"type": "response.function_call_arguments.done", **place, **done}
    else:
        part = item["content"][0]
        kind = "response.output_text" if item["type"] == "message" else "response.reasoning_text"
        place["content_index"] = 0
        yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
        logprobs = {"logprobs": []} if item["type"] == "message" else {}
        yield {"type": f"{kind}.delta", **place, "delta": part["text"], **logprobs}
        yield {"type": f"{kind}.done", **place, "text": part["text"], **logprobs}
        yield {"type": "response.content_part.done", **place, "part": part}
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _begun(item: Message) -> Message:
    if item["type"] == "function_call":
        return {**item, "arguments": "", "status": "in_progress"}
    return {**item, "content": [], "status": "in_progress"}


def _named(data: dict[str, Any]) -> bytes:
    return event(data, name=data["type"])
