"""Small readers of replies for rewards. None of them raises, whatever a policy writes."""

import json
import re
from difflib import SequenceMatcher
from typing import Any


def xml(text: str, tag: str) -> str:
    """Content of the last complete `<tag>...</tag>`, stripped; "" if there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else ""


def boxed(text: str) -> str:
    r"""Content of the last `\boxed{...}` whose braces balance, stripped; "" if there is none. Linear in the length."""
    open_braces: list[tuple[int, bool]] = []  # where the content begins, and whether it is boxed
    last_start, last_end = 0, 0
    for match in _BRACES.finditer(text):
        if match.group().endswith("{") and not match.group().startswith("\\{"):
            open_braces.append((match.end(), match.group().startswith("\\")))
        elif match.group() == "}" and open_braces:
            start, is_boxed = open_braces.pop()
            if is_boxed and start > last_start:
                last_start, last_end = start, match.start()
    return text[last_start:last_end].strip()


_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def json_reply(text: str) -> Any:
    """The last JSON object or array in the text, inside a ``` fence or not; None if there is none."""
    fenced = [match[1] for match in _FENCED.finditer(text)]
    for candidate in (*reversed(fenced), text):
        found = _last_json(candidate)
        if found is not None:
            return found
    return None


def _last_json(text: str) -> Any:
    """What is inside another value is not a value of its own."""
    found, position, left = None, 0, _VAIN
    while left > 0 and (opening := _OPENING.search(text, position)):
        start = opening.start()
        try:
            found, position = _DECODER.raw_decode(text, start)
        except RecursionError:
            position, left = start + 1, left - _VAIN // 100
        except ValueError as error:  # to read a character costs 30 times as much as to count its line
            end = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
            position, left = start + 1, left - 30 * (end - start) - end
    return found


_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_OPENING = re.compile(r"[\[{]")
_DECODER = json.JSONDecoder()
_VAIN = 200_000_000  # nanoseconds, about, that are spent on what cannot be read


def ratio(one: str, other: str) -> float:
    """How alike two texts are: 2 x matching characters / characters of both, 0..1. Quadratic in the length."""
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
