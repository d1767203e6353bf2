"""Write a word backwards."""

import hashlib
from collections.abc import Iterator
from itertools import count
from random import Random

from palestra.env import Environment, Rollout, Task, metric, ratio, reward

_DRAWS = 10_000  # in a row without a word that may be asked: there is none


class ReverseText(Environment):
    """The prompt is a word, the answer the same word backwards. A tenth of all words is held out for `test`."""

    alphabet: str = "abcdefghij"
    min_letters: int = 3
    max_letters: int = 6
    max_turns = 1

    def tasks(self) -> Iterator[Task]:
        return (Task(prompt=word, answer=word[::-1], gold=word[::-1], key=word) for word in self.words())

    def words(self) -> Iterator[str]:
        """Words of the split without end, every length equally often. Errors: ValueError, if there can be none."""
        if len(set(self.alphabet)) < 3 or not 3 <= self.min_letters <= self.max_letters:
            raise ValueError(
                f"alphabet={self.alphabet!r}, min_letters={self.min_letters}, max_letters={self.max_letters} "
                "make no words; give at least 3 letters, and 3 <= min_letters <= max_letters"
            )
        random, last = Random(f"{self.split} {self.seed}"), 0
        for draw in count():
            if draw - last > _DRAWS:
                raise ValueError(f"split={self.split!r} has no word of alphabet={self.alphabet!r}; allow longer words")
            word = "".join(random.choices(self.alphabet, k=random.randint(self.min_letters, self.max_letters)))
            if is_held_out(word) == (self.split != "train") and is_telling(word):
                last = draw
                yield word

    @reward
    def exact(self, task: Task, rollout: Rollout) -> float:
        return float(rollout.reply == task.answer)

    @metric
    def similarity(self, task: Task, rollout: Rollout) -> float:
        return ratio(rollout.reply, task.answer)


def is_held_out(word: str) -> bool:
    return hashlib.blake2b(word.encode(), digest_size=1).digest()[0] % 10 == 0


def is_telling(word: str) -> bool:
    """Whether neither copying the word nor sorting its letters is the right answer too."""
    return word[::-1] not in (word, "".join(sorted(word)))
