"""Random programs in all dialects: whatever they repeat, edit, drop or ask again, exactly what was sampled trains."""

import asyncio
import json
from random import Random
from typing import Any

import anthropic
import openai
import pytest
from tests.templates.families import FAMILIES, build_family
from tests.unit.env.programs import Engine, played, require_exact

from palestra.core.records import Ending
from palestra.env import Agent
from palestra.env.chat import ChatTokenizer, load_tokenizer

CALL = '<tool_call>\n{"name": "find", "arguments": {"query": "x"}}\n</tool_call>'
TEXTS = [
    "yes",
    "",
    "<think>hm</think>so",
    "<think>never ends",
    f"I look.\n{CALL}",
    CALL + "\n" + CALL,
    "{",
    "né\n\n",
    " a ",
]
SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "Find.", "parameters": SCHEMA}}
MAX_TURNS = 8


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> ChatTokenizer:
    return load_tokenizer(build_family(tmp_path_factory.mktemp("qwen3"), FAMILIES["qwen3"]))


class Program:
    """Keeps all conversations that it ever had, as chat messages, and goes on with any of them."""

    def __init__(self, agent: Agent, seed: int):
        self.chance = Random(seed)
        self.known: list[list[dict]] = [[]]
        self.openai = openai.AsyncOpenAI(base_url=f"{agent.url}/v1", api_key=agent.key, max_retries=0)
        self.anthropic = anthropic.AsyncAnthropic(base_url=agent.url, api_key=agent.key, max_retries=0)

    async def run(self) -> None:
        async with self.openai, self.anthropic:
            for _ in range(MAX_TURNS):
                await asyncio.gather(*(self.turn() for _ in range(self.chance.choice([1, 1, 1, 2]))))

    async def turn(self) -> None:
        messages = [dict(message) for message in self.chance.choice(self.known[-4:])]
        if messages and self.chance.random() < 0.2:
            edited = self.chance.randrange(len(messages))
            messages[edited] = {**messages[edited], "content": self.chance.choice(["another", "words"])}
        for call in messages[-1].get("tool_calls", ()) if messages else ():
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": self.chance.choice(["1", "none"])})
        if not messages or messages[-1]["role"] != "tool" or self.chance.random() < 0.2:
            messages.append({"role": "user", "content": self.chance.choice(["Go on.", "x " * 5, "?"])})
        ask = self.chance.choice([self.by_chat, self.by_responses, self.by_messages])
        said = await ask(messages, stream=self.chance.random() < 0.5)
        self.known.append([*messages, said])

    async def by_chat(self, messages: list[dict], *, stream: bool) -> dict:
        asked: Any = {"model": "m", "messages": messages, "tools": [TOOL]}
        if stream:
            async with self.openai.chat.completions.stream(**asked) as events:
                message = (await events.get_final_completion()).choices[0].message
        else:
            message = (await self.openai.chat.completions.create(**asked)).choices[0].message
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        return said_of(message.content or "", calls)

    async def by_responses(self, messages: list[dict], *, stream: bool) -> dict:
        items = [item for message in messages for item in items_of(message)]
        tool = {"type": "function", "name": "find", "description": "Find.", "parameters": SCHEMA, "strict": False}
        asked: Any = {"model": "m", "input": items, "tools": [tool]}
        if stream:
            async with self.openai.responses.stream(**asked) as events:
                reply = await events.get_final_response()
        else:
            reply = await self.openai.responses.create(**asked)
        calls = [(item.call_id, item.name, item.arguments) for item in reply.output if item.type == "function_call"]
        return said_of(reply.output_text, calls)

    async def by_messages(self, messages: list[dict], *, stream: bool) -> dict:
        turns = [turn for message in messages for turn in turns_of(message)]
        tool = {"name": "find", "description": "Find.", "input_schema": SCHEMA}
        asked: Any = {"model": "m", "max_tokens": 300, "messages": turns, "tools": [tool]}
        if stream:
            async with self.anthropic.messages.stream(**asked) as events:
                reply = await events.get_final_message()
        else:
            reply = await self.anthropic.messages.create(**asked)
        text = "".join(block.text for block in reply.content if block.type == "text")
        calls = [(block.id, block.name, json.dumps(block.input)) for block in reply.content if block.type == "tool_use"]
        return said_of(text, calls)


def said_of(content: str, calls: list[tuple[str, str, str]]) -> dict:
    made = [{"id": id, "type": "function", "function": {"name": n, "arguments": a}} for id, n, a in calls]
    return {"role": "assistant", "content": content, **({"tool_calls": made} if made else {})}


def items_of(message: dict) -> list[dict]:
    if message["role"] == "tool":
        return [{"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}]
    calls = [
        {"type": "function_call", "call_id": call["id"], **call["function"]} for call in message.get("tool_calls", ())
    ]
    return [{"role": message["role"], "content": message["content"]}, *calls]


def turns_of(message: dict) -> list[dict]:
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
        return [{"role": "user", "content": [result]}]
    if message["role"] == "user":
        return [message]
    uses = [
        {"type": "tool_use", "id": call["id"], "name": "find", "input": json.loads(call["function"]["arguments"])}
        for call in message.get("tool_calls", ())
    ]
    return [{"role": "assistant", "content": [{"type": "text", "text": message["content"]}, *uses]}]


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_a_program_does_exactly_what_was_sampled_trains(qwen, seed):
    chance = Random(f"texts {seed}")
    engine = Engine(qwen, iter(lambda: chance.choice(TEXTS), None))
    record = await played(lambda agent: Program(agent, seed).run(), engine)
    assert (record.ending, record.error) == (Ending.OK, "")
    assert MAX_TURNS <= len(engine.replies) <= 2 * MAX_TURNS
    require_exact(record, engine)
    assert len(record.seats[0].samples) < len(engine.replies), "some conversation was gone on with"


async def test_the_law_sees_one_token_that_is_another(qwen):
    """The control."""

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])

    engine = Engine(qwen, ["yes"])
    record = await played(program, engine)
    require_exact(record, engine)
    engine.replies[0].token_ids[0] += 1
    with pytest.raises(AssertionError):
        require_exact(record, engine)
