"""Images in messages: exact on every way to a model that sees, refused on every way to one that is given tokens."""

import base64
import json
import struct
import zlib
from typing import Any

import httpx
import openai
import pytest

from palestra.core.content import as_content, described, num_image_bytes
from palestra.core.errors import UserError
from palestra.core.records import ChatReply, Ending, Sampling, Task
from palestra.env import Agent, Environment, Frozen, image, images, reward
from palestra.env.chat import ChatTokenizer, Conversation, ImageError, load_tokenizer, render_sft
from palestra.env.dialects import BY_PATH
from palestra.env.images import chat_messages
from palestra.env.play import play, score
from palestra.env.tasklist import as_sent
from palestra.env.tools import ToolBox, as_tool_call
from palestra.env.voice import ChatVoice, PolicyVoice
from tests.templates.families import FAMILIES, build_family
from tests.unit.env.programs import Engine, require_exact
from tests.unit.env.programs import played as program_played


def png(*rows: bytes) -> bytes:
    """A grey picture, whole and valid."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bytes_of(part: dict[str, Any]) -> bytes:
    return base64.b64decode(part["image_url"]["url"].split("base64,", 1)[1], validate=True)


PNG, OTHER = png(b"\x00\x80", b"\xff\x10"), png(b"\x01\x02\x03")
JPEG, GIF, WEBP = b"\xff\xd8\xff\xe0" + b"j" * 9, b"GIF89a" + b"g" * 5, b"RIFF\x04\0\0\0WEBPVP8 "
HEAD = "data:image/png;base64,"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> ChatTokenizer:
    return load_tokenizer(build_family(tmp_path_factory.mktemp("qwen3"), FAMILIES["qwen3"]))


# --- what an author makes


@pytest.mark.parametrize(("content", "kind"), [(PNG, "png"), (JPEG, "jpeg"), (GIF, "gif"), (WEBP, "webp")])
def test_the_bytes_are_kept_and_the_kind_is_theirs_and_not_the_name_s(content, kind, tmp_path):
    file = tmp_path / "picture.bmp"
    file.write_bytes(content)
    parts = [image(content), image(file), image(str(file))]
    assert parts[0] == parts[1] == parts[2]
    assert bytes_of(parts[0]) == content
    assert num_image_bytes(parts[0]) == len(content)
    assert described(parts[0]) == f"image/{kind} of {len(content):,} bytes"


@pytest.mark.parametrize("url", ["https://there/cat.png", "http://there/cat", HEAD + "AA=="])
def test_an_address_is_passed_on(url):
    assert image(url) == {"type": "image_url", "image_url": {"url": url}}


def test_what_no_model_sees_is_refused_in_words(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.png'\) cannot be read: No such file.*give a file, bytes, or a URL"):
        image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"\(10 bytes, which begin with b'BM"):
        image(b"BM01234567")


def test_one_that_is_too_large_is_refused_and_one_that_just_fits_is_not(monkeypatch):
    monkeypatch.setattr(images, "MOST_BYTES", len(PNG))
    assert bytes_of(image(PNG)) == PNG
    with pytest.raises(
        UserError, match=rf"image\(...\) holds .* image/png of {len(PNG) + 1} bytes, more than {len(PNG)}; scale"
    ):
        image(PNG + b"\0")


def test_messages_are_made_of_texts_and_images():
    part = image(PNG)
    text = {"type": "text", "text": "What is it?"}
    assert chat_messages(["What is it?", part]) == [{"role": "user", "content": [text, part]}]
    assert chat_messages(part) == [{"role": "user", "content": [part]}]
    assert chat_messages({"role": "user", "content": [part, "What is it?"]}) == [
        {"role": "user", "content": [part, text]}
    ]
    whole = [{"role": "system", "content": "Look."}, {"role": "user", "content": [part]}]
    assert chat_messages(whole) == whole


def test_texts_alone_are_one_text_which_every_template_shows():
    assert chat_messages(["a", {"type": "text", "text": "b"}]) == [{"role": "user", "content": "a\nb"}]
    assert as_content([]) == ""


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (["a", 1], r"a user's message: part 1 is 1; parts are texts, image\(...\)"),
        ([{"type": "image_url", "image_url": "https://there"}], "part 0 is {'type': 'image_url'"),
        ([{"role": "user", "content": "a"}, "b"], r"messages\[1\] is 'b' beside chat messages; give it a role"),
        ({"content": "a"}, "part 0 is {'content': 'a'}"),
    ],
)
def test_what_is_no_message_is_refused_in_words(message, words):
    with pytest.raises(UserError, match=words):
        chat_messages(message)


# --- tools


async def result_of(function) -> Any:
    [message] = await ToolBox([function]).answer([as_tool_call(0, function.__name__, {})], timeout_s=20)
    return message["content"]


async def test_a_tool_gives_an_image_alone_or_among_texts():
    def alone() -> dict:
        return image(PNG)

    def among() -> tuple:
        return "before", image(PNG), "after", image(OTHER)

    [part] = await result_of(alone)
    assert bytes_of(part) == PNG
    before, one, after, other = await result_of(among)
    assert (before["text"], after["text"]) == ("before", "after")
    assert (bytes_of(one), bytes_of(other)) == (PNG, OTHER)


async def test_texts_and_objects_that_are_no_image_stay_json():
    def texts() -> list[str]:
        return ["a", "b"]

    def row() -> dict:
        return {"type": "image_url", "size": 3}

    def about_images() -> list[str]:
        return [json.dumps(image(PNG))]

    assert await result_of(texts) == '["a","b"]'
    assert await result_of(row) == '{"type":"image_url","size":3}'
    assert json.loads(await result_of(about_images)) == [json.dumps(image(PNG))]


async def test_an_image_where_it_would_be_read_as_text_is_the_author_s_error_and_not_the_model_s(monkeypatch):
    def chart() -> dict:
        return {"title": "growth", "chart": image(PNG)}

    with pytest.raises(UserError, match=r"tool chart gave an image inside of a dict.*return the image itself"):
        await result_of(chart)

    def large() -> list:
        return ["so large", {"type": "image_url", "image_url": {"url": HEAD + "AAAA" * 50}}]

    monkeypatch.setattr(images, "MOST_BYTES", 149)
    with pytest.raises(UserError, match=r"the result of tool large holds .* image/png of 150 bytes, more than 149"):
        await result_of(large)


# --- to a model that sees


class Gallery(Environment):
    """A picture in the prompt, and another one by a tool."""

    def look(self) -> dict:
        """Look closer."""
        return image(OTHER)

    tools = (look,)
    max_turns = 4

    @reward
    def right(self, task: Task, rollout) -> bool:
        return rollout.reply == "seen"


TASK = Task(prompt=["What is this?", image(PNG)], key="k")
CALLS = {"role": "assistant", "content": "", "tool_calls": [as_tool_call(0, "look", {})]}


async def test_whoever_takes_messages_gets_the_bytes_of_the_prompt_s_and_the_tool_s_images():
    heard: list[list[dict[str, Any]]] = []

    async def ask(messages, tools, sampling) -> ChatReply:
        heard.append(messages)
        said = CALLS if len(heard) == 1 else {"role": "assistant", "content": "seen"}
        return ChatReply(message=said, finish_reason="stop", num_tokens=1)

    record = await play(Gallery(), as_sent(TASK, 0), lambda seat: ChatVoice(ask, Sampling()))
    assert (record.ending, record.reward) == (Ending.OK, 1.0)
    assert record.messages[:3] == heard[1]
    text, shown = heard[0][0]["content"]
    assert (text["text"], bytes_of(shown)) == ("What is this?", PNG)
    [looked] = heard[1][2]["content"]
    assert (heard[1][2]["role"], bytes_of(looked)) == ("tool", OTHER)
    assert record.metrics == {"tool_calls": 1.0, "tool_errors": 0.0}


async def test_a_conversation_that_grows_too_large_is_invalid_with_the_reason(monkeypatch):
    monkeypatch.setattr(images, "MOST_TOGETHER", len(PNG) + len(OTHER) - 1)
    script = [{"calls": [("look", {})]}, "seen"]
    record = await score(Gallery(), TASK, script)
    assert record.ending == Ending.INVALID
    assert f"agent holds images of {len(PNG) + len(OTHER)} bytes together, more than" in record.error
    assert "agent.compact(...)" in record.error
    monkeypatch.setattr(images, "MOST_TOGETHER", len(PNG) + len(OTHER))
    assert (await score(Gallery(), TASK, script)).reward == 1.0


def test_a_task_with_too_large_an_image_is_known_when_tasks_are_listed(monkeypatch):
    whole = Task(prompt=[{"role": "user", "content": [image(PNG)]}])
    assert as_sent(TASK, 3) == TASK
    assert as_sent(whole, 3).prompt == whole.prompt
    monkeypatch.setattr(images, "MOST_BYTES", len(PNG) - 1)
    for task in (TASK, whole):
        with pytest.raises(UserError, match="the prompt of task 3 holds an image that is too large"):
            as_sent(task, 3)


# --- to a model that is given tokens


class Asked(Environment):
    """One turn with whatever the task holds; whatever is raised is caught, as careless authors do."""

    async def run(self, task, agent):
        try:
            await agent(task.prompt)
        except Exception:
            await agent("never mind")


class Watched(Environment):
    """A seat that never trains looks at the picture and tells the agent."""

    async def run(self, task, agent, eye: Frozen):
        agent.rewards["told"] = float(await agent(await eye(task.prompt)) == "seen")


class Shown(Gallery):
    """The prompt is text; the tool's result is none."""

    async def run(self, task, agent):
        await agent("Look.")


CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


def voices(engine: Engine):
    sampling = Sampling(max_tokens=200, stop_token_ids=engine.tokenizer.stop_ids)
    return lambda seat: PolicyVoice(Conversation(engine.tokenizer), engine, sampling, max_model_len=4000)


@pytest.mark.parametrize(
    ("environment", "says", "got", "num_asked"),
    [
        (Asked, [], f"messages[0] (user) holds an image (image/png of {len(PNG)} bytes)", 0),
        (Watched, [], f"messages[0] (user) holds an image (image/png of {len(PNG)} bytes)", 0),
        (Shown, [CALL], f"messages[2] (tool look) holds an image (image/png of {len(OTHER)} bytes)", 1),
    ],
)
async def test_a_policy_of_tokens_is_asked_nothing_with_an_image_and_nothing_is_scored(
    qwen, environment, says, got, num_asked
):
    engine = Engine(qwen, says)
    with pytest.raises(UserError) as refused:
        await play(environment(), TASK, voices(engine), source="charts")
    words = str(refused.value)
    assert "environment 'charts' cannot be played in tokens" in words
    assert got in words
    assert "palestra eval ... --base-url URL --model NAME" in words
    assert len(engine.asked) == num_asked


@pytest.mark.parametrize("prompt", ["What is this?", ["What", "is this?"]])
async def test_the_same_environments_play_where_no_image_is_sent(qwen, prompt):
    record = await play(Asked(), Task(prompt=prompt), voices(engine := Engine(qwen, ["a cat"])))
    assert (record.ending, record.messages[-1]["content"]) == (Ending.OK, "a cat")
    [asked] = engine.prompts
    assert ("What is this?" if isinstance(prompt, str) else "What\nis this?") in asked


async def test_a_seat_with_a_model_of_its_own_sees_and_the_policy_trains_on_what_it_tells(qwen):
    seen: list[bytes] = []

    async def ask(messages, tools, sampling) -> ChatReply:
        seen.append(bytes_of(messages[0]["content"][1]))
        return ChatReply(message={"role": "assistant", "content": "a cat"}, finish_reason="stop", num_tokens=2)

    policy = voices(engine := Engine(qwen, ["seen"]))
    record = await play(Watched(), TASK, lambda s: ChatVoice(ask, Sampling()) if s == "eye" else policy(s))
    assert (record.ending, record.reward, seen) == (Ending.OK, 1.0, [PNG])
    assert "a cat" in engine.prompts[0]
    require_exact(record, engine)


@pytest.mark.parametrize(
    ("part", "got"),
    [
        (image(PNG), f"image/png of {len(PNG)} bytes"),
        ({"type": "input_image", "image_url": "https://there/cat.png"}, "at 'https://there/cat.png'"),
        ({"type": "image"}, "of type 'image'"),
    ],
)
def test_no_template_is_asked_to_show_an_image(qwen, part, got):
    told = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert render_sft(qwen, told).mask.count(1) > 0
    with pytest.raises(ImageError, match=rf"messages\[0\] \(user\) holds an image \({got}\)"):
        render_sft(qwen, [{"role": "user", "content": [part]}, told[1]])


async def test_a_program_hears_that_the_policy_sees_nothing_and_goes_on_in_words(qwen):
    words: list[str] = []

    async def program(agent: Agent) -> None:
        async with openai.AsyncOpenAI(base_url=f"{agent.url}/v1", api_key=agent.key) as client:
            messages: Any = [{"role": "user", "content": [{"type": "text", "text": "See?"}, image(PNG)]}]
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="policy", messages=messages)
            words.append(str(refused.value))
            messages = [{"role": "user", "content": "A grey square."}]
            await client.chat.completions.create(model="policy", messages=messages)

    engine = Engine(qwen, ["seen"])
    record = await program_played(program, engine)
    assert "the model is given tokens of text alone" in words[0]
    assert (record.ending, len(engine.asked)) == (Ending.OK, 1)
    require_exact(record, engine)


async def test_a_program_s_image_arrives_as_it_was_sent_where_messages_are_asked():
    heard: list[Any] = []
    url = HEAD + base64.b64encode(PNG).decode()
    asks = {
        "chat/completions": {"messages": [{"role": "user", "content": [image(PNG)]}]},
        "responses": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
        "messages": {
            "max_tokens": 9,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image",
                            "source": {"type": "base64", "media_type": "image/png", "data": url.removeprefix(HEAD)},
                        }
                    ],
                }
            ],
        },
    }

    async def ask(messages, tools, sampling) -> ChatReply:
        heard.append(messages)
        return ChatReply(message={"role": "assistant", "content": "seen"}, finish_reason="stop", num_tokens=1)

    class Program(Environment):
        async def run(self, task, agent):
            async with httpx.AsyncClient(headers={"authorization": f"Bearer {agent.key}"}) as client:
                for path, body in asks.items():
                    answer = await client.post(f"{agent.url}/v1/{path}", json={"model": "policy", **body})
                    assert answer.status_code == 200, answer.text

    record = await play(Program(), Task(prompt="?"), lambda seat: ChatVoice(ask, Sampling()))
    assert record.ending == Ending.OK, record.error
    assert [bytes_of(messages[0]["content"][0]) for messages in heard] == [PNG] * 3


def test_how_closely_a_program_wants_an_image_looked_at_is_passed_on():
    place = {"url": "https://there/cat.png", "detail": "low"}
    chat = BY_PATH["chat/completions"].read(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": place}]}]}
    )
    flat = {"type": "input_image", "image_url": place["url"], "detail": "low"}
    responses = BY_PATH["responses"].read({"input": [{"role": "user", "content": [flat]}]})
    for asked in (chat, responses):
        assert asked.messages[0]["content"] == [{"type": "image_url", "image_url": place}]
