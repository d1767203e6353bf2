"""Rollouts whose agent is a program: an engine that says given texts and remembers what it was asked, and the law that
what it sampled is what trains."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import pytest

from palestra.config import RunConfig
from palestra.core.records import Reply, RolloutRecord, Sample, Sampling, Span, Task
from palestra.env import Agent, Environment
from palestra.env.chat import ChatTokenizer, Conversation
from palestra.env.play import play
from palestra.env.proxy import Proxy
from palestra.env.voice import PolicyVoice
from palestra.orchestrate.batcher import make_batch, rules_of
from palestra.orchestrate.state import Group
from palestra.wire.batches import decode, encode

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
    max_model_len: int = MAX_MODEL_LEN,
) -> RolloutRecord:
    """A rollout in which `program` speaks for the agent. By default its proxy ends with it."""

    class Program(environment):
        async def run(self, task, agent):
            await program(agent)

    sampling = Sampling(max_tokens=500, stop_token_ids=engine.tokenizer.stop_ids)

    def voice(seat: str) -> PolicyVoice:
        return PolicyVoice(Conversation(engine.tokenizer), engine, sampling, max_model_len=max_model_len)

    return await play(Program(), Task(prompt="?"), voice, admit=proxy and proxy.admit)


def require_exact(record: RolloutRecord, engine: Engine) -> None:
    """Every call is in exactly one sample, its prompt before it, its tokens, log-probabilities and version as sampled;
    and nothing else is trained."""
    _require_recorded(record, engine)
    _require_trained(record, engine)


def require_exact_and_no_other(record: RolloutRecord, engine: Engine) -> None:
    """The law, and its controls: a record that differs by one token, log-probability or weight breaks it."""
    require_exact(record, engine)
    require_exact(_altered(record, lambda sample, place: None), engine)
    for alter in (_another_token, _another_logprob, _not_sampled, _another_prompt):
        with pytest.raises(AssertionError):
            require_exact(_altered(record, alter), engine)


def _altered(record: RolloutRecord, alter: Callable[[Sample, int], None]) -> RolloutRecord:
    """A copy, changed at the last token that was sampled."""
    copy = msgspec.json.decode(msgspec.json.encode(record), type=RolloutRecord)
    sample = copy.seats[0].samples[-1]
    alter(sample, max(place for place, sampled in enumerate(sample.sampled) if sampled))
    return copy


def _another_token(sample: Sample, place: int) -> None:
    sample.token_ids[place] ^= 1


def _another_logprob(sample: Sample, place: int) -> None:
    sample.logprobs[place] -= 0.5


def _not_sampled(sample: Sample, place: int) -> None:
    sample.sampled[place] = 0


def _another_prompt(sample: Sample, place: int) -> None:
    sample.token_ids[0] ^= 1


def _require_recorded(record: RolloutRecord, engine: Engine) -> None:
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


def _require_trained(record: RolloutRecord, engine: Engine) -> None:
    """Of a batch as a trainer reads it."""
    settings = {"log": {"name": "exact"}, "model": {"path": "nowhere"}, "train": {"max_pack_tokens": 2**20}}
    rules = rules_of(RunConfig.model_validate(settings))
    group = Group(group_id=record.rollout_id, source="", task=record.task, size=1, records={record.rollout_id: record})
    batch, _, _ = make_batch([group], {}, step=0, attempt=1, rules=rules)
    batch = decode(encode(batch))
    told = [sample.token_ids for seat in record.seats for sample in seat.samples]
    assert [batch.token_ids[start:end].tolist() for start, end in pairwise(batch.offsets)] == told
    trains = batch.rl_weight > 0
    trained = zip(batch.engine_logprobs[trains].tolist(), batch.token_ids[trains].tolist(), strict=True)
    said = [pair for reply in engine.replies for pair in zip(reply.logprobs, reply.token_ids, strict=True)]
    assert sorted(trained) == sorted(said)
