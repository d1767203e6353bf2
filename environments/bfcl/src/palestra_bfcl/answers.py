"""Whether calls are those that a question asks for, and what such calls are.

An answer is a list of calls, `{function: {parameter: [accepted value, ...]}}`; "" among the values: it may be left out.
"""

import re
from collections.abc import Sequence
from typing import Any

from palestra_bfcl.data import called

Call = tuple[str, Any]
"""A function's name, and what stands as its arguments."""

_UNHEARD = re.compile(r"[ ,./\-_*^]")
_OPTIONAL = ""


def is_right(calls: Sequence[Call], answer: Sequence[dict[str, Any]], functions: Sequence[dict[str, Any]]) -> bool:
    """Whether each call of the answer is made once, in whatever order, and nothing else."""
    declared = {function["name"]: function["parameters"] for function in functions}
    wanted = [(called(name), accepted) for one in answer for name, accepted in one.items()]
    fitting = [[_fits_call(call, want, declared.get(want[0], {})) for call in calls] for want in wanted]
    return len(calls) == len(wanted) and _can_be_matched(fitting)


def gold(answer: Sequence[dict[str, Any]], functions: Sequence[dict[str, Any]]) -> list[Call]:
    """The first accepted values, and nothing that may be left out."""
    required = {function["name"]: function["parameters"].get("required", ()) for function in functions}
    wanted = [(called(name), accepted) for one in answer for name, accepted in one.items()]
    return [(name, _fields(accepted, required.get(name, ()))) for name, accepted in wanted]


def fits(value: Any, accepted: Any) -> bool:
    """Whether they say the same. Text is compared without case, spaces and some punctuation, as the benchmark does."""
    if isinstance(accepted, str):
        return isinstance(value, str) and _heard(value) == _heard(accepted)
    if isinstance(accepted, bool) or accepted is None:
        return value is accepted
    if isinstance(accepted, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and value == accepted
    if isinstance(accepted, list):
        return isinstance(value, list) and len(value) == len(accepted) and all(map(fits, value, accepted))
    return isinstance(value, dict) and _fits_fields(value, accepted)


def _fits_call(call: Call, wanted: Call, declared: dict[str, Any]) -> bool:
    (name, arguments), (wanted_name, accepted) = call, wanted
    if name != wanted_name or not isinstance(arguments, dict):
        return False
    properties = declared.get("properties", {})
    return (
        set(declared.get("required", ())) <= arguments.keys() <= properties.keys()
        and _fits_fields(arguments, accepted)
        and all(_is_whole(value, properties[field]) for field, value in arguments.items())
    )


def _is_whole(value: Any, schema: dict[str, Any]) -> bool:
    """Whether what is declared as a whole number is written as one: 5, not 5.0."""
    if isinstance(value, list):
        return all(_is_whole(part, schema.get("items", {})) for part in value)
    return not (isinstance(value, float) and schema.get("type") == "integer")


def _fits_fields(fields: dict[str, Any], accepted: dict[str, Any]) -> bool:
    if not fields.keys() <= accepted.keys():
        return False
    return all(
        any(fits(fields[name], one) for one in _values(values)) if name in fields else _OPTIONAL in _values(values)
        for name, values in accepted.items()
    )


def _values(accepted: Any) -> list[Any]:
    """Of fields of fields the benchmark sometimes keeps the value itself."""
    return accepted if isinstance(accepted, list) else [accepted]


def _can_be_matched(fitting: list[list[bool]]) -> bool:
    """Whether every row can have a column of its own where it is true."""
    taken: dict[int, int] = {}  # row by column

    def settle(row: int, seen: set[int]) -> bool:
        for column, fits in enumerate(fitting[row]):
            if fits and column not in seen:
                seen.add(column)
                if column not in taken or settle(taken[column], seen):
                    taken[column] = row
                    return True
        return False

    return all(settle(row, set()) for row in range(len(fitting)))


def _fields(accepted: dict[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    told = {name: _values(values) for name, values in accepted.items()}
    return {name: _first(values) for name, values in told.items() if name in required or _OPTIONAL not in values}


def _first(values: list[Any]) -> Any:
    return _written(next((value for value in values if value != _OPTIONAL), _OPTIONAL))


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return _fields(value)
    return [_written(part) for part in value] if isinstance(value, list) else value


def _heard(text: str) -> str:
    return _UNHEARD.sub("", text).lower().replace("'", '"')
