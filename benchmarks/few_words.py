"""The environment of `curriculum.toml`."""

from collections.abc import Iterator
from itertools import islice

from palestra_reverse_text import ReverseText


class FewWords(ReverseText):
    """As reverse-text, over and over the same words: the first `num_words` different ones."""

    num_words: int = 512

    def words(self) -> Iterator[str]:
        return islice(self._different_words(), self.num_words)

    def _different_words(self) -> Iterator[str]:
        seen: set[str] = set()
        for word in super().words():
            if word not in seen:
                seen.add(word)
                yield word
