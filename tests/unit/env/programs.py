"""Rollouts whose agent is a program: an engine that says given texts and remembers what it was asked, and the law that
what it sampled is what trains."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from palestra.core.records import Reply, RolloutRecord, Sampling, Span, Task
from palestra.env import Agent, Environment
from palestra.env.chat import ChatTokenizer, Conversation
from palestra.env.play import play
from palestra.env.proxy import Proxy
from palestra.env.voice import PolicyVoice

MAX_MODEL_LEN = 4000


@dataclass
class Engine:
    """Says the texts, one a call; no two of its tokens have one log-probability."""

    tokenizer: ChatTokenizer
    texts: Iterable[str]
    asked: list[list[int]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._left = iter(self.texts)

    async def __call__(self, token_ids: list[int], sampling: Sampling) -> Reply:
        ids = [*self.tokenizer.encode(next(self._left)), self.tokenizer.eos_id][: sampling.max_tokens]
        first = sum(len(reply.token_ids) for reply in self.replies)
        self.asked.append(list(token_ids))
        self.replies.append(
            Reply(
                token_ids=ids,
                logprobs=[-float(first + place + 1) for place in range(len(ids))],
                spans=(Span(len(self.replies), 0, len(ids)),),
                finish_reason="stop" if ids[-1] in self.tokenizer.stop_ids else "length",
            )
        )
        return self.replies[-1]

    @property
    def prompts(self) -> list[str]:
        return [self.tokenizer.decode(ids) for ids in self.asked]


async def played(
    program: Callable[[Agent], Awaitable[object]],
    engine: Engine,
    *,
    environment: type[Environment] = Environment,
    proxy: Proxy | None = None,
) -> RolloutRecord:
    """A rollout in which `program` speaks for the agent. By default its proxy ends with it."""

    class Program(environment):
        async def run(self, task, agent):
            await program(agent)

    sampling = Sampling(max_tokens=500, stop_token_ids=engine.tokenizer.stop_ids)

    def voice(seat: str) -> PolicyVoice:
        return PolicyVoice(Conversation(engine.tokenizer), engine, sampling, max_model_len=MAX_MODEL_LEN)

    return await play(Program(), Task(prompt="?"), voice, admit=proxy and proxy.admit)


def require_exact(record: RolloutRecord, engine: Engine) -> None:
    """Every call is in exactly one sample, its prompt before it, its tokens, log-probabilities and version as sampled;
    and nothing else is trained."""
    samples = [sample for seat in record.seats for sample in seat.samples]
    trained = {
        (logprob, place, number)
        for number, sample in enumerate(samples)
        for place, (logprob, sampled) in enumerate(zip(sample.logprobs, sample.sampled, strict=True))
        if sampled
    }
    assert len(trained) == sum(len(reply.token_ids) for reply in engine.replies)
    where = {logprob: (place, number) for logprob, place, number in trained}
    for version, (prompt, reply) in enumerate(zip(engine.asked, engine.replies, strict=True)):
        start, number = where[reply.logprobs[0]]
        sample, end = samples[number], start + len(reply.token_ids)
        assert start == len(prompt)
        assert sample.token_ids[:end] == [*prompt, *reply.token_ids]
        assert sample.logprobs[start:end] == reply.logprobs
        assert Span(version, start, end) in sample.spans
    turns = [span for sample in samples for span in sample.turns]
    assert len({span.turn for span in turns}) == len(turns) == len(engine.replies)
    for sample in samples:  # every reply has a version of its own here
        assert [(span.start, span.end) for span in sample.turns] == [(span.start, span.end) for span in sample.spans]
