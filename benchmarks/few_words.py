"""The environment of `curriculum.toml`."""

from collections.abc import Iterator

from palestra_reverse_text import ReverseText

from palestra.core.records import Task


class FewWords(ReverseText):
    """As reverse-text, over and over the same words: the first `num_words` different ones."""

    num_words: int = 512

    def tasks(self) -> Iterator[Task]:
        seen: dict[str, Task] = {}
        for task in super().tasks():
            seen.setdefault(task.answer, task)
            if len(seen) == self.num_words:
                return iter(seen.values())
        raise AssertionError("words never end")
