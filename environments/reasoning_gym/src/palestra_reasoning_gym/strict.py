"""Where a generator's verifier takes wrong answers for right ones: what must hold before it is asked."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

_NO_NUMBER = re.compile(r"nan|inf", re.IGNORECASE)


def may_be_right(generator: str, entry: dict[str, Any], answer: str) -> bool:
    """False, where the answer is wrong whatever the verifier says."""
    return _RULES.get(generator, _always)(entry, answer)


def _always(entry: dict[str, Any], answer: str) -> bool:
    return True


def _is_finite(entry: dict[str, Any], answer: str) -> bool:
    """nan equals nothing, and is neither too far from anything."""
    return _NO_NUMBER.search(answer) is None


def _is_said(entry: dict[str, Any], answer: str) -> bool:
    """The verifier compares whether there is an answer at all."""
    return answer.strip().lower() == str(entry["answer"]).strip().lower()


def _is_near(entry: dict[str, Any], answer: str) -> bool:
    """The verifier takes anything within 0.0001, and most of the probabilities are smaller."""
    try:
        said, right = Fraction(answer.replace(",", "")), Fraction(entry["answer"].replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return False
    return abs(said - right) <= abs(right) / 100


def _uses_its_numbers(entry: dict[str, Any], answer: str) -> bool:
    """The verifier takes any four numbers that make 24."""
    return sorted(map(int, re.findall(r"\d+", answer))) == sorted(entry["metadata"]["numbers"])


_RULES: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "coin_flip": _is_near,
    "complex_arithmetic": _is_finite,
    "game_of_life_halting": _is_said,
    "number_sorting": _is_finite,
    "puzzle24": _uses_its_numbers,
}
