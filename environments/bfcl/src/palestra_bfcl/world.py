"""The simulated APIs of bfcl-eval, and the calls that change them."""

import ast
import copy
import importlib
import inspect
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from palestra.core.errors import PalestraError, UserError
from palestra.env.aside import limited
from palestra_bfcl.answers import Call
from palestra_bfcl.data import APIS, INSTALL

CALL_CPU_S = 2.0
_MODULES = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
_WITHOUT_STATE = "MathAPI"  # what is asked of it may take for ever


class World:
    """A set of APIs, each with a state. `results` are what all calls gave, as text."""

    def __init__(self, apis: Sequence[str], config: dict[str, Any], *, is_long: bool):
        self.results: list[str] = []
        self._apis = {name: api_class(name)() for name in apis}
        for name, made in self._apis.items():
            if name != _WITHOUT_STATE:
                made._load_scenario(copy.deepcopy(config.get(name, {})), long_context=is_long)
        self._owners = {
            function: name
            for name, made in self._apis.items()
            for function, _ in inspect.getmembers(made, inspect.ismethod)
            if not function.startswith("_")
        }

    async def call(self, function: str, arguments: dict[str, Any]) -> str:
        """What it gives, or why it does not, as the benchmark tells it. Arguments stay as they are."""
        owner, arguments = self._owners.get(function), copy.deepcopy(arguments)  # APIs keep them, and change them later
        try:
            if owner is None:
                raise NameError(f"name '{function}' is not defined")
            if owner == _WITHOUT_STATE:
                result = await limited(CALL_CPU_S, calculated, function, arguments)
            else:
                result = as_text(getattr(self._apis[owner], function)(**arguments))
        except PalestraError:
            raise
        except Exception as error:  # whatever a call raises, the model may try to do better
            result = f"Error during execution: {error}"
        self.results.append(result)
        return result

    def state(self) -> dict[str, dict[str, Any]]:
        return {
            name: {field: value for field, value in vars(made).items() if not field.startswith("_")}
            for name, made in self._apis.items()
        }


def calculated(function: str, arguments: dict[str, Any]) -> str:
    return as_text(getattr(api_class(_WITHOUT_STATE)(), function)(**arguments))


def contains(results: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether all that is wanted is among the results, as often, in whatever order."""
    return not Counter(wanted) - Counter(results)


def as_text(result: Any) -> str:
    if not isinstance(result, dict):
        return str(result)
    try:
        return json.dumps(result)
    except TypeError:
        return str(result)


def api_class(name: str) -> type:
    """Errors: UserError, if bfcl-eval is missing or cannot be imported."""
    try:
        return getattr(importlib.import_module(f"{_MODULES}.{APIS[name]}"), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"bfcl-eval's {name} cannot be imported: {error}; {INSTALL}, and pip install mpmath") from error


def written_call(text: str, functions: Sequence[dict[str, Any]]) -> Call:
    """A call of the benchmark's, such as `sort('a.txt')`; arguments without a name get the one of their place."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call), text
    assert isinstance(call.func, ast.Name), text
    [names] = [list(told["parameters"]["properties"]) for told in functions if told["name"] == call.func.id] or [[]]
    arguments = dict(zip(names, map(ast.literal_eval, call.args), strict=False))
    return call.func.id, arguments | {str(given.arg): ast.literal_eval(given.value) for given in call.keywords}
