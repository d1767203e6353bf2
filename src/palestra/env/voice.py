"""What speaks for an agent: a policy asked for exact tokens, or a script."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

from palestra.core.errors import InfrastructureError
from palestra.core.records import Reply, Sample, Sampling

if TYPE_CHECKING:  # authors of environments need no tokenizer
    from palestra.env.chat import Conversation

Call = Callable[[list[int], Sampling], Awaitable[Reply]]
"""One engine call: exact token ids in, a reply out. Errors: InfrastructureError."""


class Limit(BaseException):
    """A limit of turns or tokens ended the rollout. Not an Exception: an author's `except Exception` lets it pass."""


@dataclass(frozen=True, slots=True)
class Said:
    """One reply. `message` is what the conversation keeps; `is_cut`: a token limit ended it before the policy did."""

    message: dict[str, Any]
    num_tokens: int
    is_cut: bool = False


class Voice(Protocol):
    async def say(self, messages: list[dict[str, Any]], *, num_tokens: int | None = None) -> Said:
        """Extend the conversation by `messages`, then by one reply, of exactly `num_tokens` where they are given.

        Errors: Limit, InfrastructureError.
        """
        ...

    def fork(self) -> Self:
        """A voice that goes on from here, independent of this one."""
        ...

    def samples(self) -> tuple[Sample, ...]:
        """What can be trained on."""
        ...


class PolicyVoice:
    """The policy: token ids in, token ids, log-probabilities and versions out."""

    def __init__(self, conversation: "Conversation", call: Call, sampling: Sampling, *, max_model_len: int):
        self._conversation, self._call, self._sampling = conversation, call, sampling
        self._max_model_len = max_model_len

    async def say(self, messages: list[dict[str, Any]], *, num_tokens: int | None = None) -> Said:
        if self._conversation.messages:
            self._conversation.add(messages)
        else:
            self._conversation.start(messages)
        prompt_ids = self._conversation.prompt_ids
        sampling = self._fitting(len(prompt_ids), num_tokens)
        reply = await self._call(prompt_ids, sampling)
        if reply.finish_reason not in ("stop", "length"):
            raise InfrastructureError(
                f"the engine ended a reply of {len(reply.token_ids)} tokens with {reply.finish_reason!r}"
            )
        message = self._conversation.add_reply(reply).as_message()
        is_cut = reply.finish_reason == "length" and len(reply.token_ids) != num_tokens
        return Said(message, len(reply.token_ids), is_cut=is_cut)

    def _fitting(self, prompt_tokens: int, num_tokens: int | None) -> Sampling:
        """Errors: Limit, if there is no room for a reply."""
        room = self._max_model_len - prompt_tokens
        if room < 1:
            raise Limit(f"the conversation of {prompt_tokens} tokens fills engine.max_model_len={self._max_model_len}")
        sampling = self._sampling
        if num_tokens is not None:
            sampling = msgspec.structs.replace(sampling, max_tokens=num_tokens, stop_token_ids=(), ignores_stop=True)
        return sampling if sampling.max_tokens <= room else msgspec.structs.replace(sampling, max_tokens=room)

    def fork(self) -> "PolicyVoice":
        return PolicyVoice(self._conversation.fork(), self._call, self._sampling, max_model_len=self._max_model_len)

    def samples(self) -> tuple[Sample, ...]:
        return self._conversation.samples()


class ScriptVoice:
    """Given replies, one a turn, and nothing to train on: what a known answer earns, without a model."""

    def __init__(self, replies: Iterable[str]):
        self._replies: Iterator[str] = iter(replies)

    async def say(self, messages: list[dict[str, Any]], *, num_tokens: int | None = None) -> Said:
        content = next(self._replies, None)
        if content is None:
            raise Limit("the script has no further reply")
        return Said({"role": "assistant", "content": content}, num_tokens=0)

    def fork(self) -> "ScriptVoice":
        """Forks speak the same script in turns."""
        return ScriptVoice(self._replies)

    def samples(self) -> tuple[Sample, ...]:
        return ()
