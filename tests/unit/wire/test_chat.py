"""The client of an endpoint: what is sent, what is kept, what is tried again, and what each refusal means."""

import json

import httpx
import pytest

from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import Sampling
from palestra.wire import chat
from palestra.wire.chat import ChatClient, TooLongError

ASKED = [{"role": "user", "content": "hello"}]


def completion(message: dict | None = None, reason: str | None = "stop") -> dict:
    usage = {"completion_tokens": 3, "prompt_tokens": 5}
    return {"choices": [{"message": message or {"content": "hi"}, "finish_reason": reason}], "usage": usage}


def client(*answers: httpx.Response, asked: list[httpx.Request] | None = None, **settings) -> ChatClient:
    """An endpoint that gives these answers in turn, and the last one for ever."""
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        if asked is not None:
            asked.append(request)
        given = left.pop(0) if len(left) > 1 else left[0]
        return httpx.Response(given.status_code, content=given.content, headers=given.headers)

    settings = {"key_env": None, "call_s": 10, **settings}
    return ChatClient("http://there/v1/", "wise", transport=httpx.MockTransport(answer), **settings)


def ok(**fields) -> httpx.Response:
    return httpx.Response(200, json=completion(**fields))


def refusal(status: int, message: str, **more: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, **more}})


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(chat, "_FIRST_PAUSE_S", 0.001)


async def test_what_is_asked_and_what_is_said():
    asked: list[httpx.Request] = []
    sampling = Sampling(temperature=0.5, max_tokens=7)
    reply = await client(ok(), asked=asked).ask(ASKED, (), sampling, seed=11)
    assert (reply.message, reply.finish_reason) == ({"role": "assistant", "content": "hi"}, "stop")
    assert (reply.num_tokens, reply.num_prompt_tokens) == (3, 5)
    [request] = asked
    assert request.url == "http://there/v1/chat/completions"
    body = json.loads(request.content)
    assert body == {
        "model": "wise",
        "messages": ASKED,
        "temperature": 0.5,
        "top_p": 1.0,
        "max_tokens": 7,
        "seed": 11,
    }
    assert "authorization" not in request.headers


async def test_tool_calls_come_and_go_as_text_and_are_kept_as_objects():
    call = {"id": "c7", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked: list[httpx.Request] = []
    there = client(ok(message={"content": None, "tool_calls": [call]}, reason="tool_calls"), asked=asked)
    reply = await there.ask(ASKED, [{"type": "function"}], Sampling(), seed=0)
    [kept] = reply.message["tool_calls"]
    assert (kept["id"], kept["function"]) == ("c7", {"name": "add", "arguments": {"a": 1}})
    result = {"role": "tool", "tool_call_id": "c7", "content": "1"}
    await there.ask([*ASKED, {**reply.message, "reasoning_content": "hm"}, result], (), Sampling(), seed=0)
    sent = json.loads(asked[1].content)["messages"][1]
    assert sent["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a":1}'}
    assert "reasoning_content" not in sent


@pytest.mark.parametrize(
    "arguments", ['{"a": 1000000000000000000000000}', '{"a": ', "[1]", '{"a": ' * 3000, '{"a": "\\ud800"}']
)
async def test_arguments_that_no_message_of_ours_can_hold_stay_text(arguments):
    call = {"function": {"name": "add", "arguments": arguments}}
    reply = await client(ok(message={"content": "", "tool_calls": [call]})).ask(ASKED, (), Sampling(), seed=0)
    assert reply.message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("reason", "kept"),
    [("stop", "stop"), ("eos", "stop"), (None, "stop"), ("length", "length"), ("max_tokens", "length")],
)
async def test_a_whole_reply_and_one_that_was_cut(reason, kept):
    assert (await client(ok(reason=reason)).ask(ASKED, (), Sampling(), seed=0)).finish_reason == kept


@pytest.mark.parametrize("reason", ["abort", "error", "content_filter"])
async def test_a_reply_that_the_endpoint_broke_off_is_no_reply(reason):
    with pytest.raises(InfrastructureError, match=reason):
        await client(ok(reason=reason)).ask(ASKED, (), Sampling(), seed=0)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (refusal(401, "wrong key"), UserError, "check the model's name and the key"),
        (refusal(404, "no such model"), UserError, "check the model's name and the key"),
        (refusal(400, "Unsupported parameter: 'max_tokens'"), UserError, "does not know a parameter"),
        (refusal(400, "max_tokens is too large"), InfrastructureError, "refused the request"),
        (refusal(400, "This model's maximum context length is 9"), TooLongError, "context length"),
        (refusal(400, "too much", code="context_length_exceeded"), TooLongError, "context_length_exceeded"),
        (refusal(400, "The input (9 tokens) is longer than the model's context length (8)"), TooLongError, "longer"),
        (refusal(400, "prompt is too long: 9 tokens"), TooLongError, "too long"),
        (httpx.Response(200, text="<html>"), InfrastructureError, "no chat completion"),
        (httpx.Response(200, json={"choices": []}), InfrastructureError, "no chat completion"),
    ],
)
async def test_what_a_refusal_means(answer, error, words):
    asked: list[httpx.Request] = []
    with pytest.raises(error, match=words) as raised:
        await client(answer, asked=asked).ask(ASKED, (), Sampling(), seed=0)
    assert type(raised.value) is error
    assert len(asked) == 1


async def test_busy_answers_are_tried_again_and_not_for_ever():
    asked: list[httpx.Request] = []
    there = client(refusal(503, "busy"), refusal(429, "slow down"), ok(), asked=asked)
    assert (await there.ask(ASKED, (), Sampling(), seed=0)).message["content"] == "hi"
    assert len(asked) == 3
    with pytest.raises(InfrastructureError, match="no reply in 6 tries: 500: broken"):
        await client(refusal(500, "broken")).ask(ASKED, (), Sampling(), seed=0)


async def test_a_key_is_read_from_the_environment_and_shown_nowhere(monkeypatch):
    asked: list[httpx.Request] = []
    monkeypatch.setenv("THEIR_KEY", "sk-123\r\n")
    await client(ok(), asked=asked, key_env="THEIR_KEY").ask(ASKED, (), Sampling(), seed=0)
    assert asked[0].headers["authorization"] == "Bearer sk-123"
    monkeypatch.setenv("THEIR_KEY", "sk-1\n23")
    with pytest.raises(UserError) as raised:
        client(ok(), key_env="THEIR_KEY")
    assert "sk-1" not in str(raised.value)
    with pytest.raises(UserError, match="no OTHER_KEY"):
        client(ok(), key_env="OTHER_KEY")


# --- images


def shown(name: str) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name}"}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def result(number: int, content: str | list) -> dict:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": content}


def turn(*numbers: int) -> dict:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "look", "arguments": "{}"}} for n in numbers]
    return {"role": "assistant", "content": "", "tool_calls": calls}


async def sent(*messages: dict) -> list[dict]:
    asked: list[httpx.Request] = []
    await client(ok(), asked=asked).ask(messages, (), Sampling(), seed=0)
    return json.loads(asked[0].content)["messages"]


async def test_an_image_of_the_user_is_sent_as_it_is():
    message = {"role": "user", "content": [text("What is it?"), shown("AAAA")]}
    assert await sent(message) == [message]


async def test_images_of_tools_follow_all_results_of_the_turn_each_behind_its_mark():
    """Between the results of one turn an API takes no other message."""
    asked = [*ASKED, turn(1, 2, 3), result(1, [text("first"), shown("AAAA"), shown("BBBB")]), result(2, "no image")]
    asked.append(result(3, [shown("CCCC")]))
    assert await sent(*asked) == [
        *ASKED,
        turn(1, 2, 3),
        result(1, "first\n[image 1]\n[image 2]"),
        result(2, "no image"),
        result(3, "[image 3]"),
        {
            "role": "user",
            "content": [
                *(text("[image 1]"), shown("AAAA")),
                *(text("[image 2]"), shown("BBBB")),
                *(text("[image 3]"), shown("CCCC")),
            ],
        },
    ]


async def test_what_was_sent_stays_as_it_was_when_the_conversation_goes_on():
    """Else no endpoint would find its prefix again. Marks are counted over the whole conversation."""
    first = [*ASKED, turn(1), result(1, [shown("AAAA")])]
    second = [*first, {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "and this?"}]
    third = [*second, turn(2), result(2, [shown("BBBB")])]
    once, twice, thrice = await sent(*first), await sent(*second), await sent(*third)
    assert twice[: len(once)] == once
    assert thrice[: len(twice)] == twice
    assert thrice[-2:] == [result(2, "[image 2]"), {"role": "user", "content": [text("[image 2]"), shown("BBBB")]}]


@pytest.mark.parametrize(("content", "kept"), [("and?", [text("and?")]), ([shown("BBBB")], [shown("BBBB")]), ("", [])])
async def test_what_the_user_says_right_after_is_in_the_same_message(content, kept):
    """Two messages of the user in a row are refused by some templates."""
    messages = await sent(*ASKED, turn(1), result(1, [shown("AAAA")]), {"role": "user", "content": content})
    assert messages[-2:] == [
        result(1, "[image 1]"),
        {"role": "user", "content": [text("[image 1]"), shown("AAAA"), *kept]},
    ]


async def test_results_without_images_are_sent_as_they_are():
    plain = [*ASKED, turn(1, 2), result(1, "one"), result(2, [text("two")]), {"role": "user", "content": "on"}]
    assert await sent(*plain) == plain


@pytest.mark.parametrize(
    "said",
    [
        "/models/wise is not a multimodal model",
        "At most 0 image(s) may be provided in one prompt.",
        "Invalid content type. image_url is only supported by certain models.",
    ],
)
async def test_a_model_that_sees_nothing_is_the_users_mistake(said):
    with pytest.raises(UserError, match=r"http://there/v1 shows no images to 'wise' .*; name a model that sees"):
        await client(refusal(400, said)).ask(ASKED, (), Sampling(), seed=0)
