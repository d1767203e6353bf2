"""Questions with known answers: as the package carries them, and what an answer must say."""

import hashlib
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import msgspec
from msgspec import Struct

from palestra.core.errors import UserError

DATA = files("palestra_doc_search") / "data" / "questions.jsonl"


class Question(Struct, frozen=True, kw_only=True):
    """`answers` are all that is accepted, the first as it would be said. `evidence` has a line for each of `pages`."""

    key: str
    kind: str
    question: str
    answers: list[str]
    pages: list[str]
    evidence: list[str]


def read_questions(file: str = "") -> list[Question]:
    """Those of the package, or of a file of JSON lines. Errors: UserError, saying what is wrong with it."""
    try:
        text = Path(file).expanduser().read_bytes() if file else DATA.read_bytes()
        return msgspec.json.Decoder(Question).decode_lines(text)
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"doc-search: questions={file!r} cannot be read: {error}") from error


def written(questions: Iterable[Question]) -> bytes:
    return b"".join(msgspec.json.encode(question) + b"\n" for question in questions)


def is_held_out(page: str) -> bool:
    """For the split `test`: all questions of a page, a fifth of the pages."""
    return hashlib.blake2b(page.encode(), digest_size=1).digest()[0] % 5 == 0


def is_right(answer: str, accepted: Iterable[str]) -> bool:
    said = normal(answer)
    return said != "" and any(said == normal(one) for one in accepted)


_LEAD = re.compile(r"^(?:(?:the|python|sqlite|pep|version|release|module|function|class|method|parameter|constant) )+")


def normal(text: str) -> str:
    """As it is compared: without case, quotes around it, "()" and "." at its end, commas in numbers, spaces at commas,
    and words that say of what kind it is."""
    text = _LEAD.sub("", _bare(" ".join(text.casefold().split())))
    text = _bare(text).removesuffix("()")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return re.sub(r"\s*,\s*", ",", text)


def _bare(text: str) -> str:
    """Without the marks around it."""
    before = None
    while text != before:
        before, text = text, text.strip().removesuffix(".")
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`*":
            text = text[1:-1]
    return text
