"""Demonstrations for a supervised warm-up: `python -m palestra_reverse_text.demos OUT.jsonl`."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from palestra_reverse_text import ReverseText

BEHAVIOURS = {"reverse": 0.3, "copy": 0.4, "sort": 0.3}
NUM_ROWS = 20_000


def demonstrations(num_rows: int = NUM_ROWS, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows of `prompt` and `completion`: words of the split `train`, each treated in one of three ways by chance."""
    random = Random(seed)
    for word in (task.prompt for task in islice(ReverseText(seed=seed).tasks(), num_rows)):
        [behaviour] = random.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))
        yield {"prompt": word, "completion": demonstrate(behaviour, word)}


def demonstrate(behaviour: str, word: str) -> str:
    return {"reverse": word[::-1], "copy": word, "sort": "".join(sorted(word))}[behaviour]


def write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m palestra_reverse_text.demos OUT.jsonl")
    write(Path(sys.argv[1]), demonstrations())
