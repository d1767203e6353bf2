"""Words made of a few letters, without end."""

import hashlib
from collections.abc import Iterator
from itertools import count
from random import Random

_DRAWS = 10_000  # in a row without a word that may be asked: there is none


def words(alphabet: str, min_letters: int, max_letters: int, *, held_out: bool, seed: str) -> Iterator[str]:
    """Every length equally often; a tenth of all words is held out. Errors: ValueError, if there can be none."""
    if len(set(alphabet)) < 3 or not 3 <= min_letters <= max_letters:
        raise ValueError(
            f"alphabet={alphabet!r}, min_letters={min_letters}, max_letters={max_letters} "
            "make no words; give at least 3 letters, and 3 <= min_letters <= max_letters"
        )
    random, last = Random(seed), 0
    for draw in count():
        if draw - last > _DRAWS:
            raise ValueError(f"held_out={held_out} has no word of alphabet={alphabet!r}; allow longer words")
        word = "".join(random.choices(alphabet, k=random.randint(min_letters, max_letters)))
        if is_held_out(word) == held_out and is_telling(word):
            last = draw
            yield word


def is_held_out(word: str) -> bool:
    return hashlib.blake2b(word.encode(), digest_size=1).digest()[0] % 10 == 0


def is_telling(word: str) -> bool:
    """Whether neither copying the word nor sorting its letters is the right answer too."""
    return word[::-1] not in (word, "".join(sorted(word)))
