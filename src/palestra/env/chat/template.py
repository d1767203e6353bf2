"""Chat templates, rendered as transformers' `apply_chat_template` renders them, with jinja2 alone.

A model without a template gets `plain_template`: the contents one after the other, the end-of-sequence token after each
assistant message, and the beginning-of-sequence token first if the tokenizer itself would put it there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from palestra.core.content import described, images_in
from palestra.core.errors import UserError
from palestra.env.endings import Unplayable

Message = dict[str, Any]


class TemplateError(UserError):
    """A conversation that the model's chat template refuses or cannot express."""


class ImageError(TemplateError, Unplayable):
    """A conversation with an image, which no text of a template shows to the model."""


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of one model by name ("default", and perhaps "tool_use") and the variables they always see.

    `where` names the model in errors. `variables` are the special tokens and the run's options (`enable_thinking`).
    """

    sources: Mapping[str, str]
    variables: Mapping[str, Any]
    where: str

    def __post_init__(self) -> None:
        for name in self.sources:
            self._compiled(name)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, generation: bool, now: datetime
    ) -> str:
        """The conversation as text; with `generation`, up to where the model starts to write.

        `now` is what the template's `strftime_now` shows: a conversation keeps one, so that midnight rewrites nothing.
        Errors: TemplateError with the template's own words; ImageError, if a message holds an image.
        """
        self._refuse_images(messages)
        compiled = self._compiled(self._choose(tools))
        names = {**self.variables, "strftime_now": now.strftime}
        names |= {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation}
        try:
            return compiled.render(names)
        except Exception as error:  # a template can raise anything
            raise TemplateError(
                f"{self.where}: the chat template refuses {_outline(messages)}: {error or type(error).__name__}; "
                "send the roles and fields that this model's template expects"
            ) from error

    def _refuse_images(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages):
            if found := images_in(message.get("content")):
                by = f"{message.get('role')} {message['name']}" if message.get("name") else message.get("role")
                raise ImageError(
                    f"{self.where}: messages[{number}] ({by}) holds an image ({described(found[0])}), and the model is "
                    "given tokens of text alone; send what it shows as text"
                )

    @property
    def has_tool_use(self) -> bool:
        """Whether conversations with tools have a template of their own."""
        return "tool_use" in self.sources

    def _choose(self, tools: Sequence[Any] | None) -> str:
        if tools is not None and self.has_tool_use:
            return "tool_use"
        if "default" in self.sources:
            return "default"
        raise TemplateError(
            f"{self.where}: templates {sorted(self.sources)}, none of them called 'default'; add chat_template.jinja"
        )

    def _compiled(self, name: str) -> jinja2.Template:
        try:
            return _compile(self.sources[name])
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"{self.where}: chat template {name!r}, line {error.lineno}: {error.message}; fix the template"
            ) from error


def plain_template(*, add_bos: bool) -> str:
    """The template of a model that has none."""
    bos = "{{ bos_token }}" if add_bos else ""
    return bos + (
        "{% for message in messages %}{{ message.content or '' }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote; the text inside is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_is"), [], [], body).set_lineno(line)

    def _as_is(self, caller: Any) -> str:
        return caller()


_DICT_METHODS = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a short way to what templates read most: the fields of a message."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _outline(messages: Sequence[Message], last: int = 6) -> str:
    roles = [str(message.get("role")) for message in messages]
    dots = ["..."] if len(roles) > last else []
    return f"{len(roles)} messages ({', '.join([*dots, *roles[-last:]])})"
