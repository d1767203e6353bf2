"""What every setting of a recipe means: the JSON schema, with the comments of its source as descriptions."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from palestra.config import schema
from palestra.config.schema import RunConfig, Section


@dataclass(frozen=True)
class Setting:
    """`section` as it stands in TOML: "train", "train.muon", "[env.mix]" of a list, "env.mix.seats.NAME" of a table
    whose keys are free."""

    section: str
    name: str
    values: str
    default: str  # "" where it must be given
    meaning: str

    @property
    def path(self) -> str:
        return f"{self.section.strip('[]')}.{self.name}"


def described() -> dict[str, Any]:
    """The JSON schema of a recipe; editors show its descriptions."""
    found = RunConfig.model_json_schema()
    for name, definition in {"RunConfig": found, **found["$defs"]}.items():
        for setting, words in _words_of(getattr(schema, name)).items():
            definition["properties"][setting]["description"] = words
    return found


def settings() -> Iterator[Setting]:
    """All of them, section by section, in the order of the schema."""
    found = described()
    yield from _settings(found, found["$defs"], "")


def sections() -> dict[str, str]:
    """What each is about, by its name as `Setting.section` has it."""
    found = described()
    return dict(_sections(found, found["$defs"], ""))


def _settings(definition: dict[str, Any], known: dict[str, Any], section: str) -> Iterator[Setting]:
    required = definition.get("required", ())
    for name, value in definition["properties"].items():
        if _inner(name, value, section) is None:
            default = "" if name in required else _literal(value.get("default"))
            yield Setting(section, name, _values(value), default, value.get("description", ""))
    for name, value in definition["properties"].items():
        if (inner := _inner(name, value, section)) is not None:
            yield from _settings(known[inner[1]], known, inner[0])


def _sections(definition: dict[str, Any], known: dict[str, Any], section: str) -> Iterator[tuple[str, str]]:
    for name, value in definition["properties"].items():
        if (inner := _inner(name, value, section)) is not None:
            yield inner[0], " ".join(known[inner[1]]["description"].split())
            yield from _sections(known[inner[1]], known, inner[0])


def _inner(name: str, value: dict[str, Any], section: str) -> tuple[str, str] | None:
    """A section's place in TOML, and the name of what it is; None for a plain value."""
    path = f"{section.strip('[]')}.{name}".removeprefix(".")
    alone = next(option for option in value.get("anyOf", [value]) if option.get("type") != "null")
    for place, reference in (
        (path, alone),
        (f"[{path}]", alone.get("items", {})),
        (f"{path}.NAME", alone.get("additionalProperties", {})),
    ):
        if isinstance(reference, dict) and "$ref" in reference:
            return place, reference["$ref"].rpartition("/")[2]
    return None


def _values(value: dict[str, Any]) -> str:
    options = [option for option in value.get("anyOf", [value]) if option.get("type") != "null"]
    return " or ".join(dict.fromkeys(_option(option) for option in options))


def _option(value: dict[str, Any]) -> str:
    if "enum" in value or "const" in value:
        return ", ".join(_literal(one) for one in value.get("enum", [value.get("const")]))
    match value.get("type"):
        case "array" if "prefixItems" in value:
            return f"{len(value['prefixItems'])} {_option(value['prefixItems'][0])}s"
        case "array" if "enum" in value["items"]:
            return f"list of: {_values(value['items'])}"
        case "array":
            return f"list of {_values(value['items'])}s"
        case "object":
            return "table"
        case "string":
            return "path" if value.get("format") == "path" else "text"
        case "boolean":
            return "true, false"
        case kind:
            bounds = [f"{sign} {value[key]}" for key, sign in _BOUNDS.items() if key in value]
            return " ".join([kind or "anything", ", ".join(bounds)]).strip()


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _literal(value: Any) -> str:
    """As TOML has it, but for None, which it cannot say."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case _:
            return str(value)


def _words_of(section: type[Section]) -> dict[str, str]:
    """Own comments, and those of what it is a kind of."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        found |= _comments().get(kind.__name__, {})
    return found


@cache
def _comments() -> dict[str, dict[str, str]]:
    """By class and field: what stands beside it, or alone on the line before it."""
    source = inspect.getsource(schema)
    lines, said = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said[token.start[0]] = token.string.removeprefix("#").strip()
    found: dict[str, dict[str, str]] = {}
    for kind in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in kind.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                first = field.lineno - lines[field.lineno - 2].strip().startswith("#")
                words = [said[line] for line in range(first, (field.end_lineno or first) + 1) if line in said]
                if words:
                    found.setdefault(kind.name, {})[field.target.id] = " ".join(words)
    return found
