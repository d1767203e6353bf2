"""Functions that a model may call: what it is told of them, and what its calls give back as text."""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, get_type_hints

import docstring_parser
import msgspec

from palestra.core.content import as_content, is_image, is_part
from palestra.core.deadline import Unhurried
from palestra.core.errors import PalestraError, UserError
from palestra.env.endings import AgentError
from palestra.env.images import require_small

Message = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """Something that can be called, with what the model is told of it. `parameters` is a JSON schema of an object;
    `function` takes what the model wrote as that object."""

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[[dict[str, Any]], Any]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """As chat templates and APIs expect it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    async def __call__(self, arguments: Any) -> Any:
        """Call with what the model wrote. Errors: BadCall, if it does not fit; whatever the function raises."""
        if not isinstance(arguments, dict):
            raise BadCall(f"the arguments of {self.name} are no JSON object: {_short(arguments)}")
        given = self.function(arguments)
        return await given if inspect.isawaitable(given) else given


class BadCall(Exception):
    """A call that names no tool, does not fit the one it names, or is refused by it: told to the model as it is."""


def tool(function: Callable[..., Any] | Tool) -> Tool:
    """What a typed function, sync or async, is as a tool: its name, its docstring, its parameters.

    Errors: UserError naming the parameter that has no type, or one that no JSON can express.
    """
    if isinstance(function, Tool):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    text = docstring_parser.parse(inspect.getdoc(function) or "")
    told = {parameter.arg_name: parameter.description for parameter in text.params if parameter.description}
    hints = get_type_hints(function, include_extras=True)
    fields = [_field(name, parameter, hints, told) for parameter in inspect.signature(function).parameters.values()]
    arguments = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
    try:
        parameters = _parameters(arguments)
        msgspec.json.Decoder(arguments)
    except TypeError as error:
        raise UserError(
            f"tool {name}: {str(error).splitlines()[-1]}; give its parameters types that JSON has, "
            "such as str, int, list[str], Literal"
        ) from error
    return Tool(name, (text.description or "").strip(), parameters, partial(_called, function, arguments))


def _called(function: Callable[..., Any], fields: type[msgspec.Struct], arguments: dict[str, Any]) -> Any:
    """Errors: BadCall, if the arguments do not fit the function's parameters."""
    try:
        fitting = msgspec.convert(arguments, fields, strict=False)
    except msgspec.ValidationError as error:
        raise BadCall(f"{fields.__name__}: {error}; its arguments: {_names(fields)}".replace("`", "")) from None
    return function(**{name: getattr(fitting, name) for name in fields.__struct_fields__})


def _field(tool: str, parameter: inspect.Parameter, hints: Mapping[str, Any], told: Mapping[str, str]) -> Any:
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise UserError(
            f"tool {tool}: the parameter {parameter} cannot be filled by name; give every argument its name"
        )
    if parameter.name not in hints:
        raise UserError(f"tool {tool}: the parameter {parameter.name} has no type; write {parameter.name}: str")
    hint = hints[parameter.name]
    if parameter.name in told:
        hint = Annotated[hint, msgspec.Meta(description=told[parameter.name])]
    if parameter.default is parameter.empty:
        return (parameter.name, hint)
    default = parameter.default
    is_mutable = isinstance(default, list | dict | set)
    return (parameter.name, hint, msgspec.field(default_factory=default.copy) if is_mutable else default)


def _parameters(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    _, components = msgspec.json.schema_components((arguments,), ref_template="#/$defs/{name}")
    schema = components.pop(arguments.__name__)
    schema = {key: value for key, value in schema.items() if key not in ("title", "description")}
    return {**schema, "$defs": components} if components else schema


def _names(arguments: type[msgspec.Struct]) -> str:
    return ", ".join(arguments.__struct_fields__) or "none"


def as_tool_call(number: int, name: str, arguments: dict[str, Any] | str) -> Message:
    """One call of a reply, as chat messages hold it. Ids have nine letters and digits: every template accepts those."""
    return {"type": "function", "id": f"call{number:05d}", "function": {"name": name, "arguments": arguments}}


class ToolBox:
    """The tools of one agent. `num_calls` and `num_errors` count what was asked of them, and what failed."""

    def __init__(self, tools: Iterable[Callable[..., Any] | Tool] = ()):
        """Errors: UserError, if a function cannot be a tool, or two have one name."""
        self._tools: dict[str, Tool] = {}
        for made in map(tool, tools):
            if self._tools.setdefault(made.name, made) is not made:
                raise UserError(f"two tools are called {made.name}; rename one")
        self.num_calls = self.num_errors = 0

    def __bool__(self) -> bool:
        return bool(self._tools)

    @property
    def tools(self) -> tuple[Tool, ...]:
        return tuple(self._tools.values())

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools]

    async def answer(self, calls: Sequence[Message], *, timeout_s: float) -> list[Message]:
        """A message for each call of a reply, in their order; the calls run at the same time.

        What a tool raises is told to the model. Errors: PalestraError, which is nothing the model can mend, before
        AgentError, before what is no Exception.
        """
        try:
            async with asyncio.TaskGroup() as running:
                tasks = [running.create_task(self._answer(call, timeout_s)) for call in calls]
        except BaseExceptionGroup as raised:
            raise min(raised.exceptions, key=lambda error: not isinstance(error, PalestraError)) from None
        return [task.result() for task in tasks]

    async def _answer(self, call: Message, timeout_s: float) -> Message:
        name = call["function"]["name"]
        self.num_calls += 1
        try:
            content = _content(name, await self._call(name, call["function"]["arguments"], timeout_s))
        except (PalestraError, AgentError):
            raise
        except (Exception, SystemExit) as error:  # whatever a tool raises, the model may try to do better
            self.num_errors += 1
            content = f"Error: {error}" if isinstance(error, BadCall) else f"Error: {type(error).__name__}: {error}"
        return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}

    async def _call(self, name: str, arguments: Any, timeout_s: float) -> Any:
        if name not in self._tools:
            raise BadCall(f"there is no tool {_short(name)}; there are: {', '.join(self._tools)}")
        limit = Unhurried(timeout_s)
        try:
            async with limit:
                return await self._tools[name](arguments)
        except TimeoutError:
            if limit.expired:
                raise BadCall(f"{name} took longer than {timeout_s:g} s and was stopped") from None
            raise


def _content(name: str, given: Any) -> str | list[Message]:
    """Text; an image, and texts and images, as parts of a message; anything else as JSON.

    Errors: UserError, if an image is too large, or stands where it would be text.
    """
    if isinstance(given, str):
        return given
    if parts := _parts(given):
        require_small(parts, f"the result of tool {name}")
        return as_content(parts)
    try:
        text = msgspec.json.encode(given).decode()
    except (TypeError, ValueError):
        return str(given)
    if '"image_url":{"url":"data:' in text:
        raise UserError(
            f"tool {name} gave an image inside of a {type(given).__name__}, where the model would read its bytes as "
            "text; return the image itself, or a list of texts and images"
        )
    return text


def _parts(given: Any) -> list[Any]:
    """An image; or a list of parts, in which texts may be plain where there is an image."""
    if is_image(given):
        return [given]
    if not isinstance(given, list | tuple):
        return []
    has_image = any(map(is_image, given))
    return list(given) if all(is_part(one) or (has_image and isinstance(one, str)) for one in given) else []


def _short(value: Any, at_most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= at_most else f"{text[:at_most]}... ({len(text)} characters)"
