"""Verifiers that run what the policy says as Python, and what may be given to them.

The rest of an answer is data to its verifier.
"""

import ast

EVALUATED = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
"""By `eval`, of answers that are no exact match: lists of literals."""

ARITHMETIC = {"countdown", "puzzle24"}
"""By sympy: whole numbers, + - * / and brackets."""

FORMULAS = {"intermediate_integration", "polynomial_multiplication", "simple_integration"}
"""By sympy: numbers, variables of one letter, functions of a list, powers within bounds."""

_FUNCTIONS = {"exp", "log", "ln", "sqrt", "Abs", "Rational", "sin", "cos", "tan", "cot", "sec", "csc"}
_FUNCTIONS |= {f"a{name}" for name in ("sin", "cos", "tan", "cot")} | {f"{name}h" for name in ("sin", "cos", "tan")}
_LONGEST = 2000  # characters
_HIGHEST = 5000  # degree
_SIGNS = set("0123456789+-*/() ")


def is_harmless(generator: str, answer: str) -> bool:
    """Whether the verifier of this generator does nothing but its work with the answer."""
    if len(answer) > _LONGEST:
        return generator not in EVALUATED | ARITHMETIC | FORMULAS
    try:
        if generator in EVALUATED:
            return _is_data(answer)
        if generator in ARITHMETIC:
            return set(answer.strip()) <= _SIGNS and "**" not in answer and "//" not in answer
        return generator not in FORMULAS or _is_formula(ast.parse(answer.strip(), mode="eval").body)
    except (RecursionError, MemoryError, SyntaxError, ValueError):
        return False


def _is_data(answer: str) -> bool:
    """A list of literals, or nothing that Python would run at all."""
    try:
        ast.parse(answer.strip(), mode="eval")
    except SyntaxError:
        return True
    try:
        ast.literal_eval(answer.strip())
    except (ValueError, TypeError):
        return answer.strip().isidentifier() and answer.strip().isupper()  # a word of capitals, which means nothing
    return True


def _is_formula(tree: ast.expr) -> bool:
    return all(map(_computes, ast.walk(tree))) and _degree(tree) <= _HIGHEST


def _computes(node: ast.AST) -> bool:
    match node:
        case ast.Constant():
            return type(node.value) in (int, float)
        case ast.Name():
            return len(node.id) == 1 or node.id in _FUNCTIONS | {"pi"}
        case ast.Call():
            return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
        case _:
            return isinstance(node, ast.BinOp | ast.UnaryOp | ast.Load | _Operator)


_Operator = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow | ast.USub | ast.UAdd


def _degree(node: ast.AST) -> float:
    """What powers multiply to, so that no computation grows beyond bounds."""
    match node:
        case ast.BinOp(op=ast.Pow(), right=power):
            return _degree(node.left) * _size(power)
        case ast.BinOp(op=ast.Mult() | ast.Div()):
            return _degree(node.left) + _degree(node.right)
        case _:
            return max(map(_degree, ast.iter_child_nodes(node)), default=1.0)


def _size(power: ast.AST) -> float:
    """At most; what is no plain number, variable, fraction or sum of these is too large."""
    match power:
        case ast.Constant(value=int() | float() as value):
            return max(abs(value), 1.0)
        case ast.Name():
            return 1.0
        case ast.UnaryOp():
            return _size(power.operand)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Div()):
            return _size(power.left) + _size(power.right)
        case _:
            return float("inf")
