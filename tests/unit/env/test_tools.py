"""Tools: what a model is told of a function, what its calls give back, and what ends a rollout."""

import asyncio
import time
from typing import Literal

import msgspec
import numpy as np
import pytest

from palestra.core.deadline import Unhurried
from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import NO_ROUTES, Ending, Reply, Sampling, Span, Task
from palestra.env import AgentError, Environment, Rollout, reward, tool
from palestra.env.chat import ChatTokenizer, Conversation, load_tokenizer
from palestra.env.play import play, score
from palestra.env.tools import ToolBox, as_tool_call
from palestra.env.voice import PolicyVoice
from palestra.wire.routes import as_array, routes_of
from tests.templates.families import FAMILIES, build_family


async def search(query: str, at_most: int = 3, order: Literal["new", "old"] = "new") -> list[str]:
    """Find pages.

    The newest come first.

    Args:
        query: what to look for
        at_most: number of pages
    """
    return [f"{query}-{number}" for number in range(at_most)]


def call(name: str, arguments, number: int = 0):
    return as_tool_call(number, name, arguments)


async def answers(tools, *calls, timeout_s: float = 20) -> list[str]:
    numbered = [call(name, arguments, number) for number, (name, arguments) in enumerate(calls)]
    messages = await ToolBox(tools).answer(numbered, timeout_s=timeout_s)
    assert [(message["role"], message["tool_call_id"]) for message in messages] == [
        ("tool", f"call{number:05d}") for number in range(len(calls))
    ]
    return [message["content"] for message in messages]


# --- what the model is told


def test_a_schema_is_made_of_hints_and_docstring():
    assert tool(search).schema == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Find pages.\n\nThe newest come first.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "what to look for"},
                    "at_most": {"type": "integer", "description": "number of pages", "default": 3},
                    "order": {"enum": ["new", "old"], "default": "new"},
                },
                "required": ["query"],
                "additionalProperties": False,
            },
        },
    }


def test_nested_types_are_defined_in_the_schema():
    class Point(msgspec.Struct):
        x: int
        y: int

    def draw(points: list[Point], name: str | None = None) -> str:
        return f"{name} {points[1].y}"

    draw.__annotations__["points"] = list[Point]
    parameters = tool(draw).schema["function"]["parameters"]
    assert parameters["properties"]["points"] == {"type": "array", "items": {"$ref": "#/$defs/Point"}}
    assert parameters["$defs"]["Point"]["required"] == ["x", "y"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda query: query, "parameter query has no type"),
        (lambda *words: words, r"\*words cannot be filled by name"),
    ],
)
def test_a_function_that_no_call_can_fill_is_refused(function, words):
    with pytest.raises(UserError, match=words):
        tool(function)


def test_a_type_that_json_lacks_is_refused():
    def odd(value: complex) -> None: ...

    with pytest.raises(
        UserError, match=r"tool odd: type .*complex.* is not supported; give its parameters types that JSON has"
    ):
        tool(odd)


def test_two_tools_of_one_name_are_refused():
    def other(query: str) -> str:
        return query

    other.__name__ = "search"
    with pytest.raises(UserError, match="two tools are called search"):
        ToolBox([search, other])


# --- what calls give back


async def test_results_are_text_and_others_are_json():
    def note(text: str) -> str:
        return text

    def nothing() -> None: ...

    def odd() -> complex:
        return 1j

    assert await answers(
        [search, note, nothing, odd], ("search", {"query": "a", "at_most": 2}), ("note", {"text": "x"})
    ) == [
        '["a-0","a-1"]',
        "x",
    ]
    assert await answers([nothing, odd], ("nothing", {}), ("odd", {})) == ["null", "1j"]


async def test_parts_of_a_message_stay_parts():
    parts = [
        {"type": "text", "text": "a plot"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]

    def plot() -> list:
        return parts

    [message] = await ToolBox([plot]).answer([call("plot", {})], timeout_s=20)
    assert message["content"] == parts


async def test_numbers_that_a_model_writes_as_text_are_read():
    assert await answers([search], ("search", {"query": "a", "at_most": "1"})) == ['["a-0"]']


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("find", {}, "Error: there is no tool 'find'; there are: search"),
        ("find" * 1000, {}, "... (4002 characters); there are: search"),
        ("search", {}, "Error: search: Object missing required field query; its arguments: query, at_most, order"),
        ("search", {"query": 1}, "Expected str, got int - at $.query"),
        ("search", {"query": "a", "limit": 2}, "unknown field limit"),
        ("search", {"query": "a", "order": "best"}, "Invalid enum value 'best'"),
        ("search", '{"query": "a', 'Error: the arguments of search are no JSON object: \'{"query": "a\''),
        ("search", None, "are no JSON object: None"),
    ],
)
async def test_a_call_that_does_not_fit_is_told_to_the_model(name, arguments, words):
    [text] = await answers([search], (name, arguments))
    assert words in text


async def test_what_a_tool_raises_is_told_to_the_model_and_counted():
    def divide(a: int, b: int) -> float:
        return a / b

    box = ToolBox([divide])
    calls = [call("divide", {"a": 1, "b": 0}), call("divide", {"a": 1, "b": 2}, 1)]
    messages = await box.answer(calls, timeout_s=20)
    assert [message["content"] for message in messages] == ["Error: ZeroDivisionError: division by zero", "0.5"]
    assert (box.num_calls, box.num_errors) == (2, 1)


async def test_calls_of_a_reply_run_at_the_same_time():
    both = asyncio.Barrier(2)

    async def meet() -> str:
        async with asyncio.timeout(20):
            await both.wait()
        return "met"

    assert await answers([meet], ("meet", {}), ("meet", {})) == ["met", "met"]


async def test_a_tool_that_takes_too_long_is_stopped():
    async def sleep() -> None:
        await asyncio.sleep(60)

    assert await answers([sleep], ("sleep", {}), timeout_s=0.1) == [
        "Error: sleep took longer than 0.1 s and was stopped"
    ]


async def test_a_timeout_of_the_tools_own_is_an_error_like_any_other():
    async def fetch() -> None:
        raise TimeoutError("no answer")

    assert await answers([fetch], ("fetch", {})) == ["Error: TimeoutError: no answer"]


async def test_time_in_which_the_event_loop_was_blocked_is_not_counted():
    """The planted fault: `asyncio.timeout` counts it, and ends a wait of 0.1 s that was given 0.5."""

    async def waiting(limit) -> bool:
        try:
            async with limit:
                await asyncio.sleep(0.1)
        except TimeoutError:
            return False
        return True

    async def block() -> None:
        await asyncio.sleep(0)
        time.sleep(0.8)  # noqa: ASYNC251 - another rollout's scorer

    [unhurried, hurried, _] = await asyncio.gather(waiting(Unhurried(0.5)), waiting(asyncio.timeout(0.5)), block())
    assert unhurried
    assert not hurried


async def test_code_that_exits_is_told_so_and_ends_nothing():
    def run(code: str) -> None:
        exec(code)

    assert await answers([run], ("run", {"code": "exit(3)"})) == ["Error: SystemExit: 3"]


@pytest.mark.parametrize("error", [InfrastructureError("the sandbox is gone"), AgentError("cheated")])
async def test_infrastructure_and_broken_rules_are_not_told_to_the_model(error):
    def use() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        await answers([use], ("use", {}))


# --- in a rollout


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> ChatTokenizer:
    return load_tokenizer(build_family(tmp_path_factory.mktemp("qwen3"), FAMILIES["qwen3"]))


def saying(tokenizer: ChatTokenizer, *texts: str, prompts: list[str] | None = None):
    """An engine that says these texts, one a call."""
    left = iter(texts)

    async def engine(token_ids: list[int], sampling: Sampling) -> Reply:
        if prompts is not None:
            prompts.append(tokenizer.decode(token_ids))
        ids = [*tokenizer.encode(next(left)), tokenizer.eos_id][: sampling.max_tokens]
        reason = "stop" if ids[-1] in tokenizer.stop_ids else "length"
        return Reply(token_ids=ids, logprobs=[-0.5] * len(ids), spans=(Span(0, 0, len(ids)),), finish_reason=reason)

    return engine


async def played(environment: Environment, tokenizer: ChatTokenizer, engine, *, task: Task | None = None):
    sampling = Sampling(max_tokens=500, stop_token_ids=tokenizer.stop_ids)

    def voice(seat: str) -> PolicyVoice:
        return PolicyVoice(Conversation(tokenizer), engine, sampling, max_model_len=4000)

    return await play(environment, task or Task(prompt="2 + 3?"), voice)


async def test_each_turn_asks_for_the_routes_of_tokens_that_have_none(qwen):
    """A token's experts are its id, in two layers of one choice; the last token of a reply comes with the next turn."""
    asked: list[int | None] = []
    engine = saying(qwen, CALL, "5")

    async def routed(token_ids: list[int], sampling: Sampling) -> Reply:
        reply, start = await engine(token_ids, sampling), sampling.routes_from
        asked.append(start)
        computed = np.array([*token_ids, *reply.token_ids][start:-1], np.uint16)
        return msgspec.structs.replace(reply, routes=routes_of(np.stack([computed] * 2, 1)[..., None]))

    sampling = Sampling(max_tokens=500, stop_token_ids=qwen.stop_ids, routes_from=0)
    record = await play(
        Adder(), Task(prompt="2 + 3?"), lambda _: PolicyVoice(Conversation(qwen), routed, sampling, max_model_len=4000)
    )
    ((sample,),) = (seat.samples for seat in record.seats)
    first, second = sample.turns
    assert asked == [0, first.end - 1]
    assert as_array(sample.routes)[:, 1, 0].tolist() == sample.token_ids[:-1]
    assert second.end == len(sample.token_ids)
    assert record.unrouted().seats[0].samples[0] == msgspec.structs.replace(sample, routes=NO_ROUTES)


class Adder(Environment):
    """Has a method as a tool; what it is told is counted on the rollout."""

    max_turns = 3

    async def add(self, a: int, b: int) -> int:
        """The sum of two numbers."""
        return a + b

    tools = (add,)

    @reward
    def right(self, task: Task, rollout: Rollout) -> bool:
        return rollout.reply == "5"


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


async def test_the_default_run_plays_until_a_reply_calls_nothing(qwen):
    prompts: list[str] = []
    record = await played(Adder(), qwen, saying(qwen, CALL, "5", prompts=prompts))
    assert (record.ending, record.reward, record.num_turns) == (Ending.OK, 1.0, 2)
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[2]["content"] == "5"
    assert record.metrics == {"tool_calls": 1.0, "tool_errors": 0.0}
    assert "The sum of two numbers." in prompts[0]
    assert "<tool_response>\n5\n</tool_response>" in prompts[1]
    assert prompts[1].startswith(prompts[0] + CALL)
    assert [sum(sample.sampled) for sample in record.seats[0].samples] == [len(qwen.encode(CALL + "5")) + 2]


async def test_a_rollout_that_only_calls_ends_at_its_limit_and_is_scored(qwen):
    record = await played(Adder(), qwen, saying(qwen, CALL, CALL, CALL, "5"))
    assert (record.ending, record.reward, record.num_turns) == (Ending.TRUNCATED, 0.0, 3)
    assert "max_turns=3" in record.error


async def test_tokens_are_limited_over_all_turns_of_an_agent(qwen):
    size = len(qwen.encode(CALL)) + 1
    record = await played(Adder(max_tokens=size + 1), qwen, saying(qwen, CALL, "55555"))
    assert (record.ending, record.num_sampled_tokens) == (Ending.TRUNCATED, size + 1)
    assert "cut off after 1 tokens" in record.error
    record = await played(Adder(max_tokens=size), qwen, saying(qwen, CALL, "5"))
    assert (record.ending, record.num_sampled_tokens) == (Ending.TRUNCATED, size)
    assert f"max_tokens={size}" in record.error


async def test_without_tools_what_looks_like_a_call_is_the_answer(qwen):
    class Plain(Environment):
        @reward
        def said(self, task, rollout):
            return rollout.reply == CALL

    record = await played(Plain(), qwen, saying(qwen, CALL))
    assert (record.ending, record.reward, record.num_turns) == (Ending.OK, 1.0, 1)


async def test_tools_made_in_run_keep_the_rollouts_state_and_may_end_it(qwen):
    class Counter(Environment):
        async def run(self, task, agent):
            total = 0

            def add(number: int) -> str:
                nonlocal total
                total += number
                return f"{total}"

            def finish() -> str:
                agent.stop()
                return "done"

            agent.tools = [add, finish]
            await agent(task.prompt)
            agent.rewards["total"] = total

    def written(name: str, **arguments) -> str:
        return f'<tool_call>{{"name": "{name}", "arguments": {msgspec.json.encode(arguments).decode()}}}</tool_call>'

    two = written("add", number=2) + written("add", number=3)
    one, other = await asyncio.gather(
        played(Counter(), qwen, saying(qwen, two, written("finish"))),
        played(Counter(), qwen, saying(qwen, written("add", number=7), "that is all")),
    )
    assert (one.ending, one.reward, one.num_turns) == (Ending.OK, 5.0, 2)
    assert [message["content"] for message in one.messages if message["role"] == "tool"] == ["2", "5", "done"]
    assert (other.reward, other.num_turns) == (7.0, 2)


async def test_a_tool_that_fails_for_infrastructure_makes_the_rollout_invalid_even_if_run_catches_it(qwen):
    class Careless(Environment):
        async def run(self, task, agent):
            def use() -> None:
                raise InfrastructureError("the sandbox is gone")

            agent.tools = [use]
            try:
                await agent(task.prompt)
            except Exception:
                agent.rewards["got away"] = 1.0

    record = await played(Careless(), qwen, saying(qwen, '<tool_call>{"name": "use", "arguments": {}}</tool_call>'))
    assert (record.ending, record.reward) == (Ending.INVALID, 0.0)
    assert "the sandbox is gone" in record.error


async def test_a_tool_that_says_the_rules_are_broken_ends_the_rollout_failed_and_scored(qwen):
    class Strict(Adder):
        async def add(self, a: int, b: int) -> int:
            raise AgentError("no calculators")

        tools = (add,)

        @reward
        def right(self, task, rollout):
            return 0.25

    record = await played(Strict(), qwen, saying(qwen, CALL, "5"))
    assert (record.ending, record.reward, record.error) == (Ending.FAILED, 0.25, "no calculators")


async def test_a_failure_counts_more_than_a_limit_that_came_before_it(qwen):
    class Both(Environment):
        max_turns = 1

        async def run(self, task, one, other):
            is_over = asyncio.Event()

            async def use() -> None:
                await is_over.wait()
                raise InfrastructureError("the sandbox is gone")

            async def go_on() -> None:
                try:
                    await other("again")
                finally:
                    is_over.set()

            await other("hello")
            one.tools = [use]
            await asyncio.gather(one(task.prompt), go_on(), return_exceptions=True)

    use = '<tool_call>{"name": "use", "arguments": {}}</tool_call>'
    record = await played(Both(), qwen, saying(qwen, "hi", use, "x"))
    assert record.ending == Ending.INVALID
    assert "the sandbox is gone" in record.error


async def test_a_number_that_no_message_can_hold_is_no_call(qwen):
    record = await played(Adder(), qwen, saying(qwen, CALL.replace("2", "1" + "0" * 30)))
    assert (record.ending, record.num_turns) == (Ending.OK, 1)
    assert "1000000" in record.messages[-1]["content"]


async def test_results_of_a_tool_that_ended_the_matter_are_heard_with_the_next_message(qwen):
    class Again(Environment):
        async def run(self, task, agent):
            def finish() -> str:
                agent.stop()
                return "done"

            agent.tools = [finish]
            await agent(task.prompt)
            await agent("And now?")

    prompts: list[str] = []
    finish = '<tool_call>{"name": "finish", "arguments": {}}</tool_call>'
    record = await played(Again(), qwen, saying(qwen, finish, "bye", prompts=prompts))
    assert record.ending == Ending.OK
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "user", "assistant"]
    assert "done" in prompts[1]
    assert "And now?" in prompts[1]


async def test_tools_are_fixed_after_the_first_turn(qwen):
    class Late(Environment):
        async def run(self, task, agent):
            await agent(task.prompt)
            agent.tools = [search]

    record = await played(Late(), qwen, saying(qwen, "hm"))
    assert record.ending == Ending.INVALID
    assert "set them before it" in record.error


async def test_a_known_answer_may_call_tools():
    record = await score(Adder(), Task(prompt="2 + 3?"), [{"calls": [("add", {"a": 2, "b": 3})]}, "5"])
    assert (record.reward, record.num_turns, record.messages[2]["content"]) == (1.0, 2, "5")
    assert record.metrics == {"tool_calls": 1.0, "tool_errors": 0.0}
