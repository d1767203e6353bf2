"""What speaks for an agent: a policy asked for exact tokens, or a script."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

from palestra.core.errors import InfrastructureError
from palestra.core.records import ChatReply, Reply, Sample, Sampling
from palestra.env.endings import ContextFull, Limit
from palestra.env.tools import as_tool_call

if TYPE_CHECKING:  # authors of environments need no tokenizer
    from palestra.env.chat import Conversation

Call = Callable[[list[int], Sampling], Awaitable[Reply]]
"""One engine call: exact token ids in, a reply out. Errors: InfrastructureError."""


Ask = Callable[[list[dict[str, Any]], list[dict[str, Any]], Sampling], Awaitable[ChatReply]]
"""One call of an endpoint: messages and tools in, a message out. Errors: Limit, InfrastructureError."""

Script = Iterable[str | dict[str, Any]]
"""Replies, one a turn: text, or a dict with `content` and `calls`, which are pairs of a tool's name and arguments."""


@dataclass(frozen=True, slots=True)
class Said:
    """One reply. `message` is what the conversation keeps; `is_cut`: a token limit ended it before the policy did.

    `find` gives the number of its first tokens that end with a piece of its text, None if that is not in it.
    """

    message: dict[str, Any]
    num_tokens: int
    is_cut: bool = False
    num_prompt_tokens: int = 0
    find: Callable[[str], int | None] | None = None

    def up_to(self, piece: str) -> int:
        """How many of its first tokens it takes to say `piece`, the last one, to its end; 0, where nobody knows tokens.

        Errors: ValueError, if it does not say that.
        """
        in_text = 0 if piece and piece in self.message["content"] else None
        found = in_text if self.find is None else self.find(piece)
        if found is None:
            raise ValueError(f"the reply does not say {piece!r}")
        return found


class Voice(Protocol):
    async def say(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        num_tokens: int | None = None,
        at_most: int | None = None,
        turn: int = 0,
    ) -> Said:
        """Extend the conversation by `messages`, then by one reply.

        It has exactly `num_tokens` tokens, or `at_most` so many, where they are given.
        `tools` are JSON schemas, the same for every turn of a conversation; `turn` is the reply's number in the seat.

        Errors: Limit, InfrastructureError.
        """
        ...

    def fork(self) -> Self:
        """A voice that goes on from here, independent of this one."""
        ...

    def fresh(self) -> Self:
        """A voice of the same that has heard and said nothing."""
        ...

    def samples(self) -> tuple[Sample, ...]:
        """What can be trained on."""
        ...


class PolicyVoice:
    """The policy: token ids in, token ids, log-probabilities and versions out."""

    def __init__(self, conversation: "Conversation", call: Call, sampling: Sampling, *, max_model_len: int):
        self._conversation, self._call, self._sampling = conversation, call, sampling
        self._max_model_len = max_model_len

    async def say(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        num_tokens: int | None = None,
        at_most: int | None = None,
        turn: int = 0,
    ) -> Said:
        if self._conversation.messages:
            self._conversation.add(messages)
        else:
            self._conversation.start(messages, tools or None)
        prompt_ids = self._conversation.prompt_ids
        sampling = self._fitting(len(prompt_ids), num_tokens, at_most)
        reply = await self._call(prompt_ids, sampling)
        if reply.finish_reason not in ("stop", "length"):
            raise InfrastructureError(
                f"the engine ended a reply of {len(reply.token_ids)} tokens with {reply.finish_reason!r}"
            )
        message = self._conversation.add_reply(reply, turn=turn)
        is_cut = reply.finish_reason == "length" and len(reply.token_ids) != num_tokens
        find = partial(self._conversation.tokenizer.tokens_up_to, reply.token_ids)
        return Said(message, len(reply.token_ids), is_cut=is_cut, num_prompt_tokens=len(prompt_ids), find=find)

    def _fitting(self, prompt_tokens: int, num_tokens: int | None, at_most: int | None) -> Sampling:
        """Errors: Limit, if there is no room for a reply."""
        room = self._max_model_len - prompt_tokens
        if room < 1:
            raise ContextFull(
                f"the conversation of {prompt_tokens} tokens fills engine.max_model_len={self._max_model_len}"
            )
        sampling = self._sampling
        if sampling.routes_from is not None:
            sampling = msgspec.structs.replace(sampling, routes_from=self._conversation.num_routed)
        if num_tokens is not None:
            sampling = msgspec.structs.replace(sampling, max_tokens=num_tokens, stop_token_ids=(), ignores_stop=True)
        room = room if at_most is None else min(room, at_most)
        return sampling if sampling.max_tokens <= room else msgspec.structs.replace(sampling, max_tokens=room)

    def fork(self) -> "PolicyVoice":
        return self._of(self._conversation.fork())

    def fresh(self) -> "PolicyVoice":
        return self._of(self._conversation.fresh())

    def _of(self, conversation: "Conversation") -> "PolicyVoice":
        return PolicyVoice(conversation, self._call, self._sampling, max_model_len=self._max_model_len)

    def samples(self) -> tuple[Sample, ...]:
        return self._conversation.samples()


class ChatVoice:
    """A model behind an endpoint that takes messages: its replies are heard, and cannot be trained on."""

    def __init__(self, ask: Ask, sampling: Sampling):
        self._ask, self._sampling = ask, sampling
        self._messages: list[dict[str, Any]] = []

    async def say(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        num_tokens: int | None = None,
        at_most: int | None = None,
        turn: int = 0,
    ) -> Said:
        if num_tokens is not None:
            raise ValueError(f"a reply of exactly num_tokens={num_tokens} needs an engine that takes tokens")
        self._messages += messages
        most = self._sampling.max_tokens if at_most is None else min(self._sampling.max_tokens, at_most)
        sampling = msgspec.structs.replace(self._sampling, max_tokens=most)
        reply = await self._ask(list(self._messages), list(tools), sampling)
        self._messages.append(reply.message)
        is_cut = reply.finish_reason == "length"
        return Said(reply.message, reply.num_tokens, is_cut=is_cut, num_prompt_tokens=reply.num_prompt_tokens)

    def fork(self) -> "ChatVoice":
        fork = ChatVoice(self._ask, self._sampling)
        fork._messages = list(self._messages)
        return fork

    def fresh(self) -> "ChatVoice":
        return ChatVoice(self._ask, self._sampling)

    def samples(self) -> tuple[Sample, ...]:
        return ()


class ScriptVoice:
    """Given replies and nothing to train on: what a known answer earns, without a model."""

    def __init__(self, replies: Script):
        self._replies: Iterator[str | dict[str, Any]] = iter(replies)
        self._num_calls = 0

    async def say(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        num_tokens: int | None = None,
        at_most: int | None = None,
        turn: int = 0,
    ) -> Said:
        reply = next(self._replies, None)
        if reply is None:
            raise Limit("the script has no further reply")
        message = scripted(reply, first_call=self._num_calls)
        self._num_calls += len(message.get("tool_calls", ()))
        return Said(message, num_tokens=0)

    def fork(self) -> "ScriptVoice":
        """Forks speak the same script in turns."""
        return ScriptVoice(self._replies)

    def fresh(self) -> "ScriptVoice":
        return ScriptVoice(self._replies)

    def samples(self) -> tuple[Sample, ...]:
        return ()


def scripted(reply: str | dict[str, Any], *, first_call: int = 0) -> dict[str, Any]:
    """A reply of a script as a conversation keeps it."""
    if isinstance(reply, str):
        return {"role": "assistant", "content": reply}
    calls = [as_tool_call(number, *call) for number, call in enumerate(reply.get("calls", ()), first_call)]
    message = {"role": "assistant", "content": reply.get("content", "")}
    return {**message, "tool_calls": calls} if calls else message
