"""A reply while it is on its way: what an engine has streamed of it so far."""

from collections.abc import Callable, Sequence

from palestra.core.records import Reply, Span

BROKEN_OFF = "abort"


class Draft:
    """Tokens of one reply in the order they arrive.

    An engine names the versions that sampled a reply with its last tokens only. Until then tokens are put down to the
    version that was in the engine when the tokens before them arrived: the older one, where a publish fell in between.
    """

    def __init__(self, version: Callable[[], int | None], on_tokens: Callable[[], None] = lambda: None):
        """`version` says what the engine serves now; `on_tokens` is called whenever tokens have arrived."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self._version, self._on_tokens = version, on_tokens
        self._sampling_version = version()
        self._spans: list[Span] = []

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        start, version = len(self.token_ids), self._sampling_version
        self.token_ids += token_ids
        self.logprobs += logprobs
        end = len(self.token_ids)
        if version is not None and end > start:
            if self._spans and self._spans[-1].version == version:
                start = self._spans.pop().start
            self._spans.append(Span(version, start, end))
        self._sampling_version = self._version()
        self._on_tokens()

    @property
    def partial(self) -> Reply:
        """What is known, as a reply that broke off; nothing, if the engine had no version yet."""
        if self._spans and self._spans[-1].end == len(self.token_ids) and not self._spans[0].start:
            spans = tuple(self._spans)
            return Reply(token_ids=self.token_ids, logprobs=self.logprobs, spans=spans, finish_reason=BROKEN_OFF)
        return NOTHING


NOTHING = Reply(token_ids=[], logprobs=[], spans=(), finish_reason=BROKEN_OFF)
