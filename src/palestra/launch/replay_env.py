"""`palestra replay --from replies --only env`: environments and rewards alone, answered from the journal.

Every finished rollout of the run is played again with the engine replies it got. Its prompts must be the same tokens
and its reward the same number: what differs has changed in the environment, the chat template or the code since.
"""

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from palestra.config import RunConfig, read_resolved
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import ChatReply, Ending, Reply, RolloutRecord, Sampling
from palestra.env.chat import load_tokenizer
from palestra.env.play import play
from palestra.env.sandbox import Sandboxes
from palestra.env.worker import MakeVoice, Stage, policy_voice, set_stages
from palestra.orchestrate.endpoints import hash_of_chat
from palestra.orchestrate.sources import seed_for
from palestra.orchestrate.state import (
    Event,
    JournalledReply,
    Replied,
    RolloutEnded,
    RolloutRetried,
    SeatReplied,
    SeatReply,
)
from palestra.wire.framelog import read_frames
from palestra.wire.rundir import RunDir


@dataclass(frozen=True)
class Outcome:
    """How many rollouts were played again and what differed. `first` says how the first difference looks."""

    rollouts: int
    same: int
    other_reward: int
    other_prompt: int
    first: str


def show(run: RunDir, *, as_json: bool) -> int:
    """Prints the outcome; 1 if anything differs."""
    outcome = asyncio.run(replay(run))
    if as_json:
        json.dump(asdict(outcome), sys.stdout, indent=2)
        print()
    else:
        print(
            f"{outcome.rollouts} rollouts played again: {outcome.same} the same, {outcome.other_reward} with another "
            f"reward, {outcome.other_prompt} with another prompt"
            + (f"\nfirst: {outcome.first}" if outcome.first else "")
        )
    return int(outcome.same != outcome.rollouts)


async def replay(run: RunDir) -> Outcome:
    """Errors: UserError, if the run has no journal, or an environment or the tokenizer cannot be loaded."""
    config = read_resolved(run.config)
    stages, voice = set_stages(config), policy_voice(load_tokenizer(config.model_dir), config.engine.max_model_len)
    found: list[str] = []
    rollouts = 0
    async with Sandboxes(config.env.sandbox, config.sandbox):
        for record, replies in recorded(run):
            rollouts += 1
            if record.environment not in stages:
                raise UserError(
                    f"{run.path}: its config has no environment {record.environment!r}, which its rollouts name"
                )
            found.append(await _difference(record, replies, stages[record.environment], voice, config))
    if not rollouts:
        raise UserError(f"{run.path} has no finished rollout in its journal; it is kept from a run's first step on")
    return Outcome(
        rollouts=rollouts,
        same=found.count(""),
        other_reward=sum(text.startswith("reward") for text in found),
        other_prompt=sum(text.startswith("prompt") for text in found),
        first=next((text for text in found if text), ""),
    )


def recorded(run: RunDir) -> Iterator[tuple[RolloutRecord, list[JournalledReply | SeatReply]]]:
    """Finished rollouts that are valid, each with the replies of the try that finished."""
    replies: dict[int, list[JournalledReply | SeatReply]] = {}
    for path in sorted(run.journal.glob("*.frames")):
        for frame in read_frames(path):
            match msgspec.msgpack.decode(frame, type=Event):
                case Replied(rollout_id=rollout_id, reply=reply) | SeatReplied(rollout_id=rollout_id, reply=reply):
                    replies.setdefault(rollout_id, []).append(reply)
                case RolloutRetried(rollout_id=rollout_id):
                    replies.pop(rollout_id, None)
                case RolloutEnded(record=record):
                    known = replies.pop(record.rollout_id, [])
                    if record.ending != Ending.INVALID:
                        yield record, known


async def _difference(
    record: RolloutRecord, replies: list[JournalledReply | SeatReply], stage: Stage, make: MakeVoice, config: RunConfig
) -> str:
    """Empty if prompts and reward are the same."""
    answers = _Answers(replies)
    own = config.sampling_of(record.environment)
    sampling = Sampling(temperature=own.temperature, max_tokens=own.max_tokens)
    again = await play(
        stage.environment,
        record.task,
        lambda seat: stage.voice(seat, answers, sampling, make),
        rollout_id=record.rollout_id,
        source=record.environment,
        seed=seed_for(config.train.seed, "play", record.rollout_id),
        frozen=stage.seats,
    )
    if answers.complaint:
        return f"prompt of rollout {record.rollout_id}: {answers.complaint}"
    if (again.ending, again.reward) != (record.ending, record.reward):
        return (
            f"reward of rollout {record.rollout_id}: {record.reward} was {record.ending}, {again.reward} {again.ending}"
        )
    return ""


class _Answers:
    """Recorded replies, found by the call's number; a prompt that is not the recorded one is not answered."""

    def __init__(self, replies: list[JournalledReply | SeatReply]):
        self._replies = {known.call: known for known in replies}
        self._next = 0
        self.complaint = ""

    async def __call__(self, token_ids: list[int], sampling: Sampling) -> Reply:
        reply = self._find(seed_for(*token_ids))
        assert isinstance(reply, Reply)
        return reply

    async def ask(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], sampling: Sampling, *, seat: str = ""
    ) -> ChatReply:
        reply = self._find(hash_of_chat(seat, messages, tools))
        assert isinstance(reply, ChatReply)
        return reply

    def _find(self, prompt_hash: int) -> Reply | ChatReply:
        number, self._next = self._next, self._next + 1
        known = self._replies.get(number)
        if known is None or known.prompt_hash != prompt_hash:
            self.complaint = self.complaint or f"call {number} asks what the recorded rollout did not ask"
            raise InfrastructureError(self.complaint)
        return known.reply
