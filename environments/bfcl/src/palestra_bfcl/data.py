"""Rows of the benchmark, as the installed bfcl-eval keeps them; nothing of it is imported."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from palestra.core.errors import UserError

INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"
ONE_ANSWER = ("simple_python", "multiple", "parallel", "parallel_multiple", "simple_java", "simple_javascript")
LIVE_ANSWER = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
NO_CALL = ("irrelevance", "live_irrelevance")
ANY_CALL = ("live_relevance",)
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
GROUPS = {
    "simple": ONE_ANSWER[:1],
    "non_live": (*ONE_ANSWER, *NO_CALL[:1]),
    "live": (*LIVE_ANSWER, *NO_CALL[1:], *ANY_CALL),
    "multi_turn": MULTI_TURN,
}
CATEGORIES = (*ONE_ANSWER, *LIVE_ANSWER, *NO_CALL, *ANY_CALL, *MULTI_TURN)
APIS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Simulated ones, by class: the name of the module, and of the file that describes the functions."""

_TYPES = {
    "string": ("string", "String", "char", "any"),
    "integer": ("integer", "long"),
    "number": ("float", "double"),
    "boolean": ("boolean", "Boolean"),
    "array": ("array", "tuple", "Array", "ArrayList"),
    "object": ("dict", "HashMap"),
}
TYPES = {name: type for type, names in _TYPES.items() for name in names}
"""What JSON calls a type that the benchmark names."""


def chosen(categories: str | list[str]) -> list[str]:
    """Groups written out. Errors: UserError naming a category that there is not."""
    names = [categories] if isinstance(categories, str) else categories
    found = [name for given in names for name in GROUPS.get(given, (given,))]
    if unknown := [name for name in found if name not in CATEGORIES]:
        raise UserError(
            f"args.categories names {unknown[0]!r}; there are {', '.join(CATEGORIES)}, "
            f"and the groups {', '.join(GROUPS)}"
        )
    if not found:
        raise UserError("args.categories is empty; name at least one, such as simple")
    return list(dict.fromkeys(found))


@cache
def folder() -> Path:
    """Errors: UserError, if bfcl-eval is missing."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the data of bfcl-eval is missing; {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data"


@cache
def rows(category: str) -> list[dict[str, Any]]:
    """With what counts as right as `answer`: None, where that is to call nothing, or anything."""
    found, file = [], f"BFCL_v4_{category}.json"
    has_answers = category not in (*NO_CALL, *ANY_CALL)
    answers = {row["id"]: row["ground_truth"] for row in _lines(f"possible_answer/{file}")} if has_answers else {}
    for row in _lines(file):
        found.append({**row, "category": category, "answer": answers[row["id"]] if has_answers else None})
    return found


@cache
def api(name: str) -> list[dict[str, Any]]:
    """What the functions of a simulated API are said to do."""
    return _lines(f"multi_turn_func_doc/{APIS[name]}.json")


def called(name: str) -> str:
    """A function's name, as far as chat APIs allow it."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]


def told(function: dict[str, Any]) -> dict[str, Any]:
    """A function as a tool is declared."""
    description, parameters = function.get("description", ""), _schema(function["parameters"])
    return {"name": called(function["name"]), "description": description, "parameters": parameters}


def _schema(given: dict[str, Any]) -> dict[str, Any]:
    schema = {key: value for key, value in given.items() if key not in ("type", "properties", "items", "optional")}
    if given.get("type") in TYPES:
        schema["type"] = TYPES[given["type"]]
    if "properties" in given:
        schema["properties"] = {name: _schema(part) for name, part in given["properties"].items()}
    if isinstance(given.get("items"), dict):
        schema["items"] = _schema(given["items"])
    return schema


def _lines(file: str) -> list[dict[str, Any]]:
    path = folder() / file
    if not path.is_file():
        raise UserError(f"the installed bfcl-eval has no {file}; {INSTALL}")
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines() if line.strip()]
