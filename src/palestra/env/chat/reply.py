"""What a model wrote, taken apart: reasoning, answer, tool calls. Nothing here raises, whatever the model wrote."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from palestra.core.records import is_sendable
from palestra.env.tools import as_tool_call

THINKING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Known pairs; a model uses the first one that its template or vocabulary knows, or the first one."""

MARKERS = frozenset(
    {tag for pair in THINKING_TAGS for tag in pair}
    | {"<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"}
    | {"[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"}
)
"""Tokens that give a reply its structure: read even where the tokenizer calls them special."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the model wrote it. `arguments` stays text where it is not a JSON object."""

    name: str
    arguments: dict[str, Any] | str


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """A reply taken apart. `content` is empty while thinking is unfinished: what is not answered is not an answer."""

    content: str = ""
    reasoning: str = ""
    finished_thinking: bool = True
    tool_calls: tuple[ToolCall, ...] = field(default=())

    def as_message(self, *, first_call: int = 0) -> dict[str, Any]:
        """The message a chat template expects; the template decides what it shows of the reasoning.

        Its calls are numbered from `first_call` on, so that no two of a conversation have one id.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                as_tool_call(number, call.name, call.arguments)
                for number, call in enumerate(self.tool_calls, first_call)
            ]
        return message


def parse_text(text: str, *, inside_thinking: bool, tags: tuple[str, str], tools: bool) -> AssistantMessage:
    """Take apart a reply whose special tokens are gone except `MARKERS`."""
    content, reasoning, finished = split_thinking(text, inside=inside_thinking, tags=tags)
    calls: tuple[ToolCall, ...] = ()
    if tools:
        content, calls = split_tool_calls(content)
    return AssistantMessage(content, reasoning, finished, calls)


def split_thinking(text: str, *, inside: bool, tags: tuple[str, str]) -> tuple[str, str, bool]:
    """Answer, reasoning, and whether thinking is finished.

    `inside`: the prompt already opened a thought. A close without an open turns everything before it into reasoning.
    Any thought left open makes the answer empty, even after an earlier answer.
    """
    if not inside and tags[0] not in text and tags[1] not in text:
        return text, "", True
    answer: list[str] = []
    thoughts: list[str] = []
    thinking = inside
    for piece in re.split(f"({re.escape(tags[0])}|{re.escape(tags[1])})", text):
        if piece == tags[0]:
            thinking = True
        elif piece == tags[1]:
            thoughts += [] if thinking else answer
            answer = answer if thinking else []
            thinking = False
        else:
            (thoughts if thinking else answer).append(piece)
    reasoning = "\n".join(thought.strip() for thought in thoughts if thought.strip())
    return ("" if thinking else "".join(answer).lstrip()), reasoning, not thinking


def split_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The text without its tool calls, and the calls.

    Shapes: Hermes and Qwen, GLM-4.5, Qwen-Coder, Mistral, Llama 3.
    A call that cannot be read stays in the text.
    """
    for read in (_tagged, _mistral, _llama):
        content, calls = read(text)
        if calls and all(is_sendable([call.name, call.arguments]) for call in calls):
            return content, calls
    return text.replace("[TOOL_CALLS]", "").replace("<|python_tag|>", ""), ()


# Each is given what ends with the last of its closing tags: else every opening that is never closed would be looked for
# to the end of the text, and a model that says nothing but openings would hold up its worker for minutes.
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CODER_CALL = re.compile(r"<function=([^<>\n]+)>(.*?)</function>", re.DOTALL)
_CODER_ARGUMENT = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\]\s*)?(\{.*)", re.DOTALL)
_SPACE = re.compile(r"\s*")


def _tagged(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = _hermes(match[1]) or _coder(match[1]) or _glm(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    closed, rest = _closed(text, "</tool_call>")
    content = _TAGGED.sub(take, closed) + rest
    return (content.rstrip() if calls else text), tuple(calls)


def _closed(text: str, tag: str) -> tuple[str, str]:
    """Up to the last `tag`, which is a part of it, and what comes after."""
    end = text.rfind(tag) + len(tag) if tag in text else 0
    return text[:end], text[end:]


def _hermes(body: str) -> ToolCall | None:
    return _from_json(_json(body))


def _coder(body: str) -> ToolCall | None:
    match = _CODER_CALL.search(_closed(body, "</function>")[0])
    if match is None:
        return None
    arguments = _CODER_ARGUMENT.findall(_closed(match[2], "</parameter>")[0])
    return ToolCall(match[1].strip(), {key.strip(): _value(text) for key, text in arguments})


def _glm(body: str) -> ToolCall | None:
    name = body.split("<arg_key>", 1)[0].strip()
    if not name or any(character in name for character in "\n{}<>"):
        return None
    return ToolCall(name, {key.strip(): _value(text) for key, text in _glm_arguments(body)})


def _glm_arguments(body: str) -> Iterator[tuple[str, str]]:
    """Each key with the value that follows it."""
    at = 0
    while (opened := body.find("<arg_key>", at)) >= 0 and (closed := body.find("</arg_key>", opened)) >= 0:
        at = closed + len("</arg_key>")
        space = _SPACE.match(body, at)
        value = space.end() if space else at
        if not body.startswith("<arg_value>", value):
            continue
        end = body.find("</arg_value>", value)
        if end < 0:
            return
        yield body[opened + len("<arg_key>") : closed], body[value + len("<arg_value>") : end]
        at = end + len("</arg_value>")


def _mistral(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    content, *bodies = text.split("[TOOL_CALLS]")
    return content, tuple(call for body in bodies for call in _mistral_calls(body))


def _mistral_calls(body: str) -> Iterator[ToolCall]:
    value = _json(body)
    if isinstance(value, list):
        yield from (call for call in map(_from_json, value) if call)
    elif match := _MISTRAL_CALL.match(body):
        arguments = _json(match[2])
        yield ToolCall(match[1], arguments if isinstance(arguments, dict) else match[2])


def _llama(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    body = text.replace("<|python_tag|>", "").strip()
    call = _from_json(_json(body)) if body.startswith("{") else None
    return ("", (call,)) if call else (text, ())


def _from_json(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    for key in ("arguments", "parameters"):
        if isinstance(value.get(key), dict | str):
            return ToolCall(value["name"], value[key])
    return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _value(text: str) -> Any:
    value = _json(text)
    return text if value is None else value
