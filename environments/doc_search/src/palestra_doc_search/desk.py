"""The tools of one rollout, and what a conversation shows of their use."""

from collections.abc import Callable
from typing import Any

from palestra_doc_search.corpus import Corpus, Hit, Window

MOST_HITS = 20
MOST_ANSWER_CHARS = 300
REFUSED = "Error: "  # what an environment's tools say begins so where a call went wrong


class Desk:
    """Remembers the last search and whether the answer was given."""

    def __init__(self, corpus: Corpus, stop: Callable[[], None], window_chars: int):
        self._corpus, self._stop, self._window_chars = corpus, stop, window_chars
        self._hits: list[Hit] = []
        self._is_answered = False

    @property
    def tools(self) -> list[Callable[..., Any]]:
        return [self.search, self.click, self.open, self.finish]

    def search(self, query: str, at_most: int = 10) -> str:
        """Find passages of the documentation that have words of the query, best first.

        Args:
            query: words to look for, such as names of functions or what they do
            at_most: number of results, 1 to 20
        """
        if not 1 <= at_most <= MOST_HITS:
            raise ValueError(f"at_most={at_most}; give 1 to {MOST_HITS}")
        self._hits = self._corpus.search(query, at_most)
        if not self._hits:
            return "No passage has any of these words."
        return "\n".join(_told(number, hit) for number, hit in enumerate(self._hits, 1))

    def click(self, number: int) -> str:
        """Read a result of the last search, from the line it was found at.

        Args:
            number: of the result, from 1
        """
        if not 1 <= number <= len(self._hits):
            there_is = f"the last search has results 1 to {len(self._hits)}" if self._hits else "there are no results"
            raise LookupError(f"there is no result {number}; {there_is}")
        hit = self._hits[number - 1]
        return self.open(hit.page, hit.line)

    def open(self, page: str, line: int = 1) -> str:
        """Read a page from a line on, as much as is shown at a time.

        Args:
            page: its name, as search gives it
            line: the first to read, from 1
        """
        return _shown(self._corpus.window(page.strip().removesuffix(".html"), line, self._window_chars))

    def finish(self, answer: str) -> str:
        """Give the final answer, which ends the task.

        Args:
            answer: the answer alone, without a sentence around it
        """
        if self._is_answered:
            raise ValueError("the answer was given already; the first one counts")
        if not answer.strip() or len(answer) > MOST_ANSWER_CHARS:
            raise ValueError(f"an answer has 1 to {MOST_ANSWER_CHARS} characters, this one {len(answer.strip())}")
        self._is_answered = True
        self._stop()
        return answer


def _told(number: int, hit: Hit) -> str:
    section = f": {hit.section[:150]}" if hit.section not in ("", hit.title) else ""
    return f"{number}. {hit.title}{section} ({hit.page}, line {hit.line})\n   {' '.join(hit.snippet.split())}"


def _shown(window: Window) -> str:
    rest = f"\n(goes on at line {window.last + 1})" if window.last < window.num_lines else ""
    where = f"{window.page}: {window.title} (lines {window.first} to {window.last} of {window.num_lines})"
    return f"{where}\n\n{window.text}{rest}"


# --- what was done


def answer_in(messages: list[dict[str, Any]]) -> str:
    """What `finish` was given and did not refuse; "" if nothing."""
    return next((text for text in _given(messages, "finish")), "")


def searches_in(messages: list[dict[str, Any]]) -> int:
    return len(_given(messages, "search"))


def pages_opened_in(messages: list[dict[str, Any]]) -> set[str]:
    return {text.split(": ", 1)[0] for text in _given(messages, "click", "open")}


def _given(messages: list[dict[str, Any]], *tools: str) -> list[str]:
    """What these tools gave, where they did not refuse."""
    said = [message for message in messages if message["role"] == "tool" and message["name"] in tools]
    return [message["content"] for message in said if not message["content"].startswith(REFUSED)]
