"""The exact token history of one agent.

What the engine sampled stays as it was sampled: later turns *extend* the tokens, and a reply is never encoded again.
What stands between a reply and the next generation prompt must be proved (`palestra.env.chat.bridge` says what that
means). Where it cannot be, there is a *break*: the current sample is closed, a new one starts from a full rendering of
the messages with the replies as parsed, and `breaks` says why.

Thinking that a template strips from history stays in the tokens: the model really saw it. A template that moves other
text as the conversation grows (Mistral moves its tools and its system prompt to the last user message) breaks at each
such move.
"""

import re
from collections.abc import Sequence
from copy import copy
from datetime import datetime
from typing import Any

from palestra.core.records import Reply, Sample
from palestra.env.chat.bridge import History, Turn, Unproved, find_bridge
from palestra.env.chat.draft import Draft
from palestra.env.chat.reply import AssistantMessage
from palestra.env.chat.template import Message
from palestra.env.chat.tokenizer import ChatTokenizer

_CALL = re.compile(r"call([0-9]{1,9})")  # as `as_tool_call` numbers them


class Conversation:
    """One agent's conversation: `start`, then `prompt_ids` to the engine, `add_reply`, `add`, `prompt_ids`, ...

    `messages` is the conversation for people, `reply` the last reply taken apart, `breaks` why new samples started.
    `now` is the date a template shows; a conversation keeps one.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, now: datetime | None = None):
        self.tokenizer = tokenizer
        self.messages: list[Message] = []
        self.reply = AssistantMessage()
        self.breaks: list[str] = []
        self.num_turns = self._num_calls = 0
        self._now = now or datetime.now()
        self._tools: list[Any] | None = None
        self._closed: tuple[Sample, ...] = ()
        self._draft = Draft()
        self._turns: list[Turn] = []  # the sampled turns of the draft
        self._after = ""  # the text encoded after the last of them
        self._reply_ids: list[int] = []
        self._num_done = 0  # messages up to the last reply
        self._awaits_reply = False

    def start(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> None:
        """Begin with these messages; `tools` are JSON schemas. Errors: TemplateError if the template refuses them."""
        if self.messages:
            raise ValueError(
                "Conversation.start was called twice; add(messages) continues, Conversation(...) begins anew"
            )
        if not messages:
            raise ValueError("Conversation.start got no messages; give at least one user message")
        self._tools = None if tools is None else list(tools)
        self._num_calls = _first_free(messages)
        self._render([dict(message) for message in messages])

    @property
    def prompt_ids(self) -> list[int]:
        """What the engine continues now: the whole current token history."""
        self._expect_prompt("prompt_ids")
        return self._draft.token_ids.copy()

    @property
    def num_tokens(self) -> int:
        """Length of the current token history."""
        return len(self._draft.token_ids)

    @property
    def num_routed(self) -> int:
        """How many of its first tokens have routes."""
        return self._draft.num_routed

    def add_reply(self, reply: Reply, *, turn: int | None = None) -> Message:
        """Append what the engine sampled for `prompt_ids`, token by token as it was sampled; the message it is.

        `turn` is its number in the seat; by default in this conversation.
        """
        self._expect_prompt("add_reply")
        _check(reply)
        inside = self.tokenizer.ends_inside_thinking(self._after)
        self.reply = self.tokenizer.parse_reply(reply.token_ids, inside_thinking=inside, tools=bool(self._tools))
        self._draft.add_reply(reply, self.num_turns if turn is None else turn)
        self._turns.append(Turn(index=len(self.messages), before=self._after))
        self.messages.append(self.reply.as_message(first_call=self._num_calls))
        self._num_calls += len(self.reply.tool_calls)
        self._reply_ids, self._num_done = reply.token_ids, len(self.messages)
        self.num_turns, self._awaits_reply = self.num_turns + 1, False
        return self.messages[-1]

    def add(self, messages: Sequence[Message]) -> None:
        """Continue with the environment's messages (user, tool, ...) up to the next generation prompt.

        Errors: TemplateError if the template refuses the conversation; nothing has changed then.
        """
        if not self.messages:
            raise ValueError("Conversation.add: there is no conversation yet; start(messages) first")
        grown = [*self.messages, *(dict(message) for message in messages)]
        if not self._turns:
            self._render(grown)
            return
        try:
            self._extend(grown)
        except Unproved as unproved:
            closed = self._draft.samples()
            self._render(grown)
            self._closed += closed
            self.breaks.append(f"after turn {self.num_turns}: {unproved}")

    def samples(self) -> tuple[Sample, ...]:
        """The training samples so far, the current one last; each ends with its last sampled token."""
        return (*self._closed, *self._draft.samples())

    def fork(self) -> "Conversation":
        """A conversation that continues from here on its own.

        Its samples hold the history as context only: what was sampled before the fork is trained in the original.
        """
        other = copy(self)
        other.messages, other.breaks, other._turns = self.messages.copy(), self.breaks.copy(), self._turns.copy()
        other._draft, other._closed = self._draft.as_context(), ()
        return other

    def fresh(self) -> "Conversation":
        """One that has not begun, of the same model on the same day."""
        return Conversation(self.tokenizer, now=self._now)

    def _render(self, messages: list[Message]) -> None:
        """Start a new draft from a full rendering."""
        text = self.tokenizer.render(messages, self._tools, generation=True, now=self._now)
        self._draft = Draft(self.tokenizer.encode(text))
        self.messages, self._turns, self._after, self._awaits_reply = messages, [], text, True

    def _extend(self, messages: list[Message]) -> None:
        history = History(
            messages=messages,
            num_done=self._num_done,
            tools=self._tools,
            now=self._now,
            turns=self._turns,
            token_ids=self._draft.replied_ids,
            reply_ids=self._reply_ids,
        )
        bridge = find_bridge(self.tokenizer, history)
        self._draft.continue_with(bridge.token_ids)
        self.messages, self._turns[-1], self._after, self._awaits_reply = messages, bridge.turn, bridge.text, True

    def _expect_prompt(self, what: str) -> None:
        if not self._awaits_reply:
            missing = "add(messages)" if self.messages else "start(messages)"
            raise ValueError(f"Conversation.{what}: no prompt is waiting for a reply; call {missing} first")


def _check(reply: Reply) -> None:
    num_tokens = len(reply.token_ids)
    if len(reply.logprobs) != num_tokens:
        raise ValueError(
            f"reply has {num_tokens} tokens but {len(reply.logprobs)} log-probabilities; the engine must give one each"
        )
    position = 0
    for span in reply.spans:
        if span.start != position or span.end < span.start:
            break
        position = span.end
    if position != num_tokens:
        raise ValueError(
            f"version spans {reply.spans} do not cover the reply's {num_tokens} tokens one after the other"
        )


def _first_free(messages: Sequence[Message]) -> int:
    """The number of the next call: no call of these messages has it, also where earlier ones were left out."""
    ids = [str(call.get("id", "")) for message in messages for call in message.get("tool_calls") or ()]
    numbers = [int(found[1]) for id in ids if (found := _CALL.fullmatch(id))]
    return max([len(ids), *(number + 1 for number in numbers)])
