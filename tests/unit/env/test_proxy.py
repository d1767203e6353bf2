"""Programs that speak for an agent, by the clients that they use: what they get, and what is recorded of it."""

import asyncio
import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from palestra.core.errors import InfrastructureError
from palestra.core.records import Ending
from palestra.env import Agent, Environment, reward
from palestra.env.chat import ChatTokenizer, load_tokenizer
from palestra.env.dialects import BY_PATH, BadRequest
from palestra.env.proxy import Proxy, is_same
from tests.templates.families import FAMILIES, build_family
from tests.unit.env.programs import Engine, played, require_exact

SYSTEM, QUESTION = "Be brief.", "2 + 3, then times 4?"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
TWO_CALLS = CALL + '\n<tool_call>\n{"name": "add", "arguments": {"a": 5, "b": 15}}\n</tool_call>'
SAID = (CALL, "Now the other one.\n" + TWO_CALLS, "<think>20</think>It is 20.")
BEGUN: Any = {"role": "assistant", "content": "It is"}
ASK: Any = [{"role": "user", "content": "a"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> ChatTokenizer:
    return load_tokenizer(build_family(tmp_path_factory.mktemp("qwen3"), FAMILIES["qwen3"]))


def added(arguments: str | dict) -> str:
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return str(given["a"] + given["b"])


async def by_chat(agent: Agent, *, stream: bool) -> str:
    tools: Any = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": PARAMETERS}}]
    messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    async with openai.AsyncOpenAI(base_url=f"{agent.url}/v1", api_key=agent.key) as client:
        while True:
            if stream:
                async with client.chat.completions.stream(model="policy", messages=messages, tools=tools) as events:
                    reply = (await events.get_final_completion()).choices[0]
            else:
                whole = await client.chat.completions.create(model="policy", messages=messages, tools=tools)
                reply = whole.choices[0]
            calls: Any = reply.message.tool_calls or []
            assert reply.finish_reason == ("tool_calls" if calls else "stop")
            if not calls:
                return reply.message.content or ""
            messages.append(reply.message.model_dump(exclude_none=True, exclude={"parsed"}))
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": added(call.function.arguments)} for call in calls
            ]


async def by_responses(agent: Agent, *, stream: bool, after: bool = False, in_items: bool = False) -> str:
    """`in_items`: the system message is an item of the input, not the instructions of every request."""
    tools = [{"type": "function", "name": "add", "description": "Add.", "parameters": PARAMETERS, "strict": False}]
    items, previous = [{"role": "user", "content": QUESTION}], None
    items = [{"role": "developer", "content": SYSTEM}, *items] if in_items else items
    async with openai.AsyncOpenAI(base_url=f"{agent.url}/v1", api_key=agent.key) as client:
        while True:
            asked = {"model": "policy", "input": items, "tools": tools}
            asked |= {} if in_items else {"instructions": SYSTEM}
            asked |= {"previous_response_id": previous} if previous else {}
            if stream:
                async with client.responses.stream(**asked) as events:
                    reply = await events.get_final_response()
            else:
                reply = await client.responses.create(**asked)
            assert reply.status == "completed"
            calls = [item for item in reply.output if item.type == "function_call"]
            if not calls:
                return reply.output_text
            outputs = [
                {"type": "function_call_output", "call_id": call.call_id, "output": added(call.arguments)}
                for call in calls
            ]
            said = [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in reply.output]
            items, previous = (outputs, reply.id) if after else ([*items, *said, *outputs], None)


async def by_messages(agent: Agent, *, stream: bool) -> str:
    tools: Any = [{"name": "add", "description": "Add.", "input_schema": PARAMETERS}]
    messages: Any = [{"role": "user", "content": QUESTION}]
    asked: Any = {"model": "policy", "system": SYSTEM, "max_tokens": 400, "tools": tools}
    async with anthropic.AsyncAnthropic(base_url=agent.url, api_key=agent.key) as client:
        while True:
            if stream:
                async with client.messages.stream(**asked, messages=messages) as events:
                    reply = await events.get_final_message()
            else:
                reply = await client.messages.create(**asked, messages=messages)
            calls = [block for block in reply.content if block.type == "tool_use"]
            assert reply.stop_reason == ("tool_use" if calls else "end_turn")
            if not calls:
                return "".join(block.text for block in reply.content if block.type == "text")
            results = [{"type": "tool_result", "tool_use_id": c.id, "content": added(c.input)} for c in calls]
            messages += [
                {"role": "assistant", "content": [block.model_dump() for block in reply.content]},
                {"role": "user", "content": results},
            ]


CLIENTS = {"chat": by_chat, "responses": by_responses, "messages": by_messages}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CLIENTS)
async def test_three_turns_with_tools_are_one_sample_of_exactly_what_was_sampled(qwen, name, stream):
    engine, answers = Engine(qwen, SAID), []

    async def program(agent: Agent) -> None:
        answers.append(await CLIENTS[name](agent, stream=stream))

    record = await played(program, engine)
    assert (record.ending, record.error) == (Ending.OK, "")
    assert answers == ["It is 20."]
    assert len(record.seats[0].samples) == 1
    require_exact(record, engine)
    assert SYSTEM in engine.prompts[0]
    assert '"name": "add"' in engine.prompts[0]
    assert engine.prompts[2].count("<tool_response>") == 3
    assert [message["role"] for message in record.messages].count("assistant") == record.num_turns == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_are_signed_as_programs_repeat_unsigned_ones_as_text(qwen, stream):
    blocks = []

    async def program(agent: Agent) -> None:
        asked: Any = {"model": "policy", "max_tokens": 400, "messages": ASK}
        async with anthropic.AsyncAnthropic(base_url=agent.url, api_key=agent.key) as client:
            if stream:
                async with client.messages.stream(**asked) as events:
                    blocks.extend((await events.get_final_message()).content)
            else:
                blocks.extend((await client.messages.create(**asked)).content)

    await played(program, Engine(qwen, ["<think>Hm.</think>Yes."]))
    thought, text = blocks
    assert (thought.type, thought.thinking, bool(thought.signature), text.text) == ("thinking", "Hm.", True, "Yes.")


@pytest.mark.parametrize("in_items", [False, True])
async def test_a_response_that_names_the_one_before_needs_no_history(qwen, in_items):
    engine = Engine(qwen, SAID)
    record = await played(lambda agent: by_responses(agent, stream=False, after=True, in_items=in_items), engine)
    assert all(prompt.count(SYSTEM) == 1 for prompt in engine.prompts)
    assert record.ending == Ending.OK
    assert len(record.seats[0].samples) == 1
    require_exact(record, engine)


async def test_an_edited_history_begins_a_sample_and_is_what_the_engine_sees(qwen):
    engine = Engine(qwen, ["one", "two", "three"])

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            messages: Any = list(ASK)
            for user in ("b", "c"):
                reply = await client.chat.completions.create(model="m", messages=messages)
                messages += [
                    {"role": "assistant", "content": reply.choices[0].message.content},
                    {"role": "user", "content": user},
                ]
            messages[1] = {"role": "assistant", "content": "uno"}
            await client.chat.completions.create(model="m", messages=messages)

    record = await played(program, engine)
    require_exact(record, engine)
    first, second = record.seats[0].samples
    assert ["uno" in prompt for prompt in engine.prompts] == [False, False, True]
    assert [len(sample.spans) for sample in (first, second)] == [2, 1]


async def test_programs_that_ask_beside_each_other_have_samples_of_their_own(qwen):
    engine = Engine(qwen, ["one", "two", "three", "four"])

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            await asyncio.gather(*(client.chat.completions.create(model="m", messages=ASK) for _ in range(3)))
            await client.chat.completions.create(model="m", messages=ASK)  # asks again what it asked before

    record = await played(program, engine)
    require_exact(record, engine)
    assert len(record.seats[0].samples) == 4


class Short(Environment):
    max_turns = 2


async def test_limits_are_of_the_seat_and_end_the_rollout_truncated(qwen):
    engine, errors = Engine(qwen, ["one", "two", "three"]), []

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            for user in "abc":
                try:
                    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": user}])
                except openai.BadRequestError as error:
                    errors.append(error.code)

    record = await played(program, engine, environment=Short)
    assert (record.ending, errors) == (Ending.TRUNCATED, ["limit_reached"])
    assert "max_turns=2" in record.error
    require_exact(record, engine)


async def test_the_programs_own_limit_of_tokens_cuts_a_reply_and_ends_nothing(qwen):
    engine, reasons = Engine(qwen, ["12345678", "ok"]), []

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            for limit in (3, 100):
                reply = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": str(limit)}], max_tokens=limit
                )
                reasons.append((reply.choices[0].finish_reason, reply.usage and reply.usage.completion_tokens))

    record = await played(program, engine)
    assert record.ending == Ending.OK
    assert reasons[0] == ("length", 3)
    assert reasons[1][0] == "stop"
    require_exact(record, engine)


async def test_what_infrastructure_breaks_is_told_once_and_makes_the_rollout_invalid(qwen):
    class Broken(Engine):
        async def __call__(self, token_ids, sampling):
            raise InfrastructureError("the engine is gone")

    asked = []

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            with pytest.raises(openai.InternalServerError, match="the engine is gone"):
                asked.append(
                    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
                )

    record = await played(program, Broken(qwen, []))
    assert (record.ending, asked, record.seats) == (Ending.INVALID, [], ())
    assert "the engine is gone" in record.error


async def test_a_key_is_worth_nothing_when_its_rollout_has_ended(qwen):
    proxy, places = Proxy(), []

    async def program(agent: Agent) -> None:
        places.append((agent.url, agent.key))

    engine = Engine(qwen, ["one"])
    await played(program, engine, proxy=proxy)
    (url, key) = places[0]
    async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
        with pytest.raises(openai.AuthenticationError, match="no rollout in progress"):
            await client.chat.completions.create(model="m", messages=ASK)
    await proxy.close()
    assert engine.asked == []


async def test_what_is_on_its_way_when_run_ends_is_given_up_and_never_trains(qwen):
    is_asked = asyncio.Event()

    class Slow(Engine):
        async def __call__(self, token_ids, sampling):
            is_asked.set()
            await asyncio.sleep(60)
            raise AssertionError("it was not given up")

    engine, heard = Slow(qwen, []), []

    async def ask(agent: Agent, url: str, key: str) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
            try:
                await client.chat.completions.create(model="m", messages=ASK)
            except openai.APIStatusError as error:
                heard.append(error.status_code)

    async def program(agent: Agent) -> None:
        asking.append(asyncio.create_task(ask(agent, agent.url, agent.key)))
        await is_asked.wait()

    asking: list[asyncio.Task] = []
    proxy = Proxy()
    record = await asyncio.wait_for(played(program, engine, proxy=proxy), 10)
    await asyncio.wait_for(asking[0], 10)
    await asyncio.wait_for(proxy.close(), 10)
    assert (record.ending, record.num_sampled_tokens, heard) == (Ending.OK, 0, [401])


async def test_a_client_that_tries_again_as_it_did_not_hear_gets_the_same_answer(qwen):
    class Slow(Engine):
        async def __call__(self, token_ids, sampling):
            await asyncio.sleep(1.0)
            return await super().__call__(token_ids, sampling)

    engine, said = Slow(qwen, ["one", "two"]), []

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key, timeout=0.7, max_retries=3) as client:
            reply = await client.chat.completions.create(model="m", messages=ASK)
            said.append(reply.choices[0].message.content)

    record = await played(program, engine)
    assert (said, len(engine.replies)) == (["one"], 1)
    require_exact(record, engine)


async def test_what_the_models_template_refuses_is_told_and_harms_nothing(tmp_path):
    mistral = load_tokenizer(build_family(tmp_path, FAMILIES["mistral"]))
    engine, errors = Engine(mistral, ["one", "two"]), []

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            await client.chat.completions.create(model="m", messages=ASK)
            try:
                await client.chat.completions.create(model="m", messages=[*ASK, *ASK])
            except openai.BadRequestError as error:
                errors.append(str(error))
            await client.chat.completions.create(model="m", messages=ASK)

    record = await played(program, engine)
    assert (record.ending, len(errors), len(engine.replies)) == (Ending.OK, 1, 2)
    require_exact(record, engine)


async def test_an_answer_is_not_begun_by_the_program(qwen):
    engine, errors = Engine(qwen, []), []

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            try:
                await client.chat.completions.create(model="m", messages=[*ASK, BEGUN])
            except openai.BadRequestError as error:
                errors.append(str(error))

    record = await played(program, engine)
    assert (record.ending, len(errors), engine.asked) == (Ending.OK, 1, [])


async def test_the_longest_conversation_is_the_one_that_is_shown_and_scored(qwen):
    engine = Engine(qwen, ["one", "two", "a title"])

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=agent.url, api_key=agent.key) as client:
            messages: Any = list(ASK)
            for _ in range(2):
                reply = await client.chat.completions.create(model="m", messages=messages)
                said = {"role": "assistant", "content": reply.choices[0].message.content}
                messages += [said, {"role": "user", "content": "on"}]
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "A title?"}])
            agent.credit("told", 0.5)

    class Told(Environment):
        @reward
        def right(self, task, rollout):
            return rollout.reply == "two"

    record = await played(program, engine, environment=Told)
    assert (record.rewards, record.num_turns) == ({"right": 1.0, "told": 0.5}, 2)
    assert record.seats[0].credits == {2: 0.5}


async def test_a_wrong_key_a_wrong_body_and_a_wrong_path_are_refused_in_words(qwen):
    seen = {}

    async def program(agent: Agent) -> None:
        async with httpx.AsyncClient(base_url=agent.url) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
            good = {"authorization": f"Bearer {agent.key}"}
            seen["key"] = await client.post("/v1/chat/completions", headers={"authorization": "Bearer x"}, json=body)
            seen["json"] = await client.post("/v1/chat/completions", headers=good, content=b"{")
            seen["path"] = await client.post("/v1/embeddings", headers=good, json=body)
            seen["stop"] = await client.post("/v1/chat/completions", headers=good, json=body | {"stop": ["x"]})
            empty = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": []}]}
            seen["empty"] = await client.post("/v1/messages", headers=good, json=empty)
            seen["models"] = await client.get("/v1/models", headers=good)

    record = await played(program, Engine(qwen, []))
    assert record.ending == Ending.OK
    assert {name: answer.status_code for name, answer in seen.items()} == {
        "key": 401,
        "json": 400,
        "path": 404,
        "stop": 400,
        "empty": 400,
        "models": 200,
    }
    assert "the messages are empty" in seen["empty"].json()["error"]["message"]
    assert "stop=" in seen["stop"].json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {}),
        ("chat/completions", {"messages": []}),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "a"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": "many"}),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}),
        ("responses", {"input": [{"type": "computer_call"}]}),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}),
        ("responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}),
        ("messages", {"messages": [{"role": "system", "content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": "a"}], "stop_sequences": ["x"]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "document"}]}]}),
    ],
)
def test_what_cannot_be_answered_is_refused(path, body):
    with pytest.raises(BadRequest):
        BY_PATH[path].read(body)


def test_what_a_program_drops_or_trims_is_the_same_message():
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": "ok\n", "reasoning_content": "hm", "tool_calls": [call]}
    assert is_same(said, {"role": "assistant", "content": "ok", "tool_calls": [{**call, "id": "x"}]})
    as_text = {**call, "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert is_same({**said, "tool_calls": [as_text]}, said)
    other = {**call, "function": {"name": "f", "arguments": {"a": 2}}}
    assert not is_same(said, {"role": "assistant", "content": "ok", "tool_calls": [other]})
    assert not is_same(said, {"role": "assistant", "content": "ok"})
    assert not is_same({"role": "user", "content": "a"}, {"role": "system", "content": "a"})
