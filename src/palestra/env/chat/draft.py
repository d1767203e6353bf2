"""A training sample while it grows."""

from collections.abc import Sequence

from palestra.core.records import NO_ROUTES, Reply, Sample, Span, TurnSpan


class Draft:
    """Token ids with what is known of each: sampled or not, by which version, with which log-probability."""

    def __init__(self, token_ids: Sequence[int] = ()):
        self.token_ids = list(token_ids)
        self._logprobs = [0.0] * len(self.token_ids)
        self._sampled = [0] * len(self.token_ids)
        self._spans: list[Span] = []
        self._turns: list[TurnSpan] = []
        self._num_replied = 0  # tokens up to the end of the last reply
        self._routes = NO_ROUTES

    @property
    def replied_ids(self) -> list[int]:
        """The tokens up to the end of the last reply."""
        return self.token_ids[: self._num_replied]

    @property
    def num_routed(self) -> int:
        """How many of the first tokens have routes: what a reply's routes go on from."""
        return self._routes.num_tokens

    def add_reply(self, reply: Reply, turn: int) -> None:
        start = len(self.token_ids)
        self.token_ids += reply.token_ids
        self._logprobs += reply.logprobs
        self._sampled += [1] * len(reply.token_ids)
        self._spans += [
            Span(span.version, start + span.start, start + span.end) for span in reply.spans if span.end > span.start
        ]
        self._num_replied = len(self.token_ids)
        self._turns.append(TurnSpan(turn, start, self._num_replied))
        self._routes = self._routes.then(reply.routes)

    def continue_with(self, token_ids: Sequence[int]) -> None:
        """Let `token_ids`, which nobody sampled, follow the last reply; what followed it before is dropped."""
        del self.token_ids[self._num_replied :], self._logprobs[self._num_replied :], self._sampled[self._num_replied :]
        self.token_ids += token_ids
        self._logprobs += [0.0] * len(token_ids)
        self._sampled += [0] * len(token_ids)

    def samples(self) -> tuple[Sample, ...]:
        """The sample up to its last sampled token; none if nothing was sampled."""
        if not self._spans:
            return ()
        end = self._spans[-1].end
        sample = Sample(
            token_ids=self.token_ids[:end],
            logprobs=self._logprobs[:end],
            sampled=self._sampled[:end],
            spans=tuple(self._spans),
            turns=tuple(turn for turn in self._turns if turn.end > turn.start),
            routes=self._routes.first(end),
        )
        return (sample,)

    def as_context(self) -> "Draft":
        """The same tokens, none of them to be trained."""
        context = Draft(self.token_ids)
        context._num_replied, context._routes = self._num_replied, self._routes
        return context
