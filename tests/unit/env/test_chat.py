"""Token-exact conversations: each family's text, what breaks a conversation, how a reply is taken apart."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palestra.core.errors import UserError
from palestra.core.records import Reply, Span
from palestra.env.chat import (
    AssistantMessage,
    ChatTokenizer,
    Conversation,
    TemplateError,
    ToolCall,
    load_tokenizer,
    render_completion,
    render_sft,
)
from palestra.env.chat.conversation import _first_free
from palestra.env.chat.reply import parse_text, split_tool_calls
from tests.templates.families import FAMILIES, build_characters, build_family

HI = [{"role": "user", "content": "Hi"}]
SO = [{"role": "user", "content": "so"}]
RESULT = [{"role": "tool", "name": "search", "tool_call_id": "call00000", "content": "42"}]
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatTokenizer]:
    loaded: dict[str, ChatTokenizer] = {}

    def get(name: str) -> ChatTokenizer:
        if name not in loaded:
            loaded[name] = load_tokenizer(build_family(tmp_path_factory.mktemp(name), FAMILIES[name]))
        return loaded[name]

    return get


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., ChatTokenizer]:
    """A ChatML tokenizer with a template of the test's own."""

    def make(template: str, **options: object) -> ChatTokenizer:
        family = replace(FAMILIES["smollm2"], stops=("<|im_end|>", "<|endoftext|>"))
        return load_tokenizer(build_family(tmp_path, family, template=template), options=options)

    return make


def reply(tokenizer: ChatTokenizer, text: str, version: int = 0) -> Reply:
    return sampled(tokenizer.encode(text), version)


def sampled(ids: list[int], version: int = 0) -> Reply:
    spans = (Span(version, 0, len(ids)),)
    return Reply(token_ids=ids, logprobs=[-0.5] * len(ids), spans=spans, finish_reason="stop")


def talk(tokenizer: ChatTokenizer, *turns: object, tools: list | None = None) -> Conversation:
    """Play: messages (a list) and replies (a text), in turn."""
    chat = Conversation(tokenizer, now=datetime(2024, 7, 26))
    chat.start(turns[0], tools)  # type: ignore[arg-type]
    for turn in turns[1:]:
        if isinstance(turn, str):
            chat.add_reply(reply(tokenizer, turn))
        else:
            chat.add(turn)  # type: ignore[arg-type]
    return chat


# -- what the engine is sent, family by family -----------------------------------------------------------------------

SPOKEN = {
    "qwen3": (
        "<think>\nhm\n</think>\n\nyes<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nhm\n</think>\n\nyes<|im_end|>"
        "\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "yes<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "yes<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nso<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "glm45": (
        "\n<think>hm</think>\nyes<|user|>",
        "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think>hm</think>\nyes<|user|>\nso<|assistant|>",
    ),
    "gemma": (
        "yes<end_of_turn>",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\nso<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral": (" yes</s>", "<s>[INST] Hi[/INST] yes</s>[INST] so[/INST]"),
    "smollm2": (
        "yes<|im_end|>",
        "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n",
    ),
    "deepseek": (
        "hm</think>yes<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"
        "hm</think>yes<｜end▁of▁sentence｜><｜User｜>so<｜Assistant｜><think>\n",
    ),
}


@pytest.mark.parametrize("name", SPOKEN)
def test_two_turns_of_each_family(family: Callable[[str], ChatTokenizer], name: str) -> None:
    tokenizer, (said, expected) = family(name), SPOKEN[name]
    chat = talk(tokenizer, HI, said, SO)
    assert tokenizer.decode(chat.prompt_ids) == expected
    assert (chat.reply.content, chat.breaks) == ("yes", [])
    (sample,) = chat.samples()
    assert (
        tokenizer.decode([t for t, own in zip(sample.token_ids, sample.sampled, strict=True) if own]).strip()
        == said.strip()
    )


@pytest.mark.parametrize("name", SPOKEN)
def test_a_reply_cut_off_by_a_limit_is_ended_by_the_template(family: Callable[[str], ChatTokenizer], name: str) -> None:
    tokenizer, (said, expected) = family(name), SPOKEN[name]
    whole = reply(tokenizer, said)
    chat = talk(tokenizer, HI)
    chat.add_reply(sampled(whole.token_ids[:-1]))
    chat.add(SO)
    assert tokenizer.decode(chat.prompt_ids) == expected  # the same tokens; the end of the turn is not trained
    assert chat.samples()[0].token_ids[-1] == whole.token_ids[-2]


def test_tool_calls_extend(family: Callable[[str], ChatTokenizer]) -> None:
    calls = {
        "qwen3": '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call><|im_end|>',
        "llama3": '{"name": "search", "parameters": {}}<|eot_id|>',
        "glm45": "\n<think></think>\n<tool_call>search\n</tool_call><|observation|>",
        "mistral": '[TOOL_CALLS] [{"name": "search", "arguments": {}, "id": "call00000"}]</s>',
    }
    for name, call in calls.items():
        chat = talk(family(name), HI, call, RESULT, tools=TOOLS)
        assert chat.breaks == []
        assert chat.reply.tool_calls == (ToolCall("search", {}),)
        assert "42" in family(name).decode(chat.prompt_ids[-40:])


def test_thinking_and_tool_tags_may_be_special_tokens(tmp_path: Path) -> None:
    family = FAMILIES["qwen3"]
    family = replace(family, special=(*family.special, *family.plain), plain=())
    tokenizer = load_tokenizer(build_family(tmp_path, family))
    call = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call><|im_end|>'
    chat = talk(tokenizer, HI, call, RESULT, tools=TOOLS)
    assert chat.reply == AssistantMessage("", "hm", True, (ToolCall("search", {}),))
    assert chat.breaks == []
    assert learnt(tokenizer, chat.messages, tools=TOOLS) == [call]


def test_mistral_keeps_its_tokens_through_a_second_call(family: Callable[[str], ChatTokenizer]) -> None:
    call = '[TOOL_CALLS] [{"name": "search", "arguments": {}, "id": "call00000"}]</s>'
    chat = talk(family("mistral"), HI, call, RESULT, call, RESULT, " done</s>", tools=TOOLS)
    assert chat.breaks == []
    chat.add(SO)  # now the template moves the tools to this message
    assert chat.breaks == ["after turn 3: the template rewrites the text before turn 1 of the sample (next role: user)"]
    assert len(chat.samples()) == 1  # the new one has no reply yet


def test_a_disabled_thought_stays_in_the_history(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_family(tmp_path, FAMILIES["qwen3"]), options={"enable_thinking": False})
    chat = talk(tokenizer, HI, "yes<|im_end|>", SO)
    assert tokenizer.decode(chat.prompt_ids).count("<think>\n\n</think>\n\n") == 2
    assert chat.breaks == []


def test_the_date_does_not_change_within_a_conversation(family: Callable[[str], ChatTokenizer]) -> None:
    chat = talk(family("llama3"), HI, "yes<|eot_id|>", SO)
    assert "26 Jul 2024" in family("llama3").decode(chat.prompt_ids)
    assert chat.breaks == []


# -- breaks ----------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAID = "yes<|im_end|>"


COUNTS = "{{ messages[2].content | length if messages | length > 2 else '' }}"
NOTES = "('Note: ' if m.role == 'assistant' and messages | length > 3 else '') + "
REPEATS = "{{ messages[2].content if messages | length > 3 else '' }}"


@pytest.mark.parametrize(
    ("template", "said", "why"),
    [
        ("{{ 'Long talk. ' if messages | length > 3 else '' }}" + CHATML, SAID, "rewrites the text before turn 1"),
        (CHATML.replace("m.content +", NOTES + "m.content +"), SAID, "rewrites the text before turn 1"),
        ("{{ messages | length }} messages " + CHATML, SAID, "no stable place"),
        (CHATML.replace("m.content +", "m.content + (' now' if loop.last else '') +"), SAID, "no stable place"),
        (CHATML.replace("m.content +", "m.content + m.content +"), SAID, "no stable place"),
        (CHATML + REPEATS, SAID, "each assistant turn exactly once"),
        (CHATML + COUNTS, SAID, "other text after the reply"),
        (CHATML, "yes<|endoftext|>", "stopped on '<|endoftext|>' where the template writes '<|im_end|>'"),
        (CHATML.replace("<|im_end|>", "<|endoftext|>\n<|im_end|>"), SAID, "where the template writes '<|endoftext|>'"),
        (CHATML.replace("m.content", "m.content + ' '").replace("<|im_end|>", "(end)"), SAID, "'no special token'"),
    ],
)
def test_what_cannot_be_proved_starts_a_new_sample(
    model: Callable[..., ChatTokenizer], template: str, said: str, why: str
) -> None:
    tokenizer = model(template)
    chat = talk(tokenizer, [*HI, *SO], said, SO)
    assert len(chat.breaks) == 1
    assert why in chat.breaks[0]
    assert chat.prompt_ids == tokenizer.encode(tokenizer.render(chat.messages, generation=True))
    chat.add_reply(reply(tokenizer, said))
    assert [sum(sample.sampled) for sample in chat.samples()] == [len(tokenizer.encode(said))] * 2


def test_a_cut_inside_text_is_proved_by_encoding_across_it(model: Callable[..., ChatTokenizer]) -> None:
    """Where no special token stands at the cut, only the tokens themselves can show that it is clean."""
    tokenizer = model("{% for m in messages %}{{ m.content + 'he' }}{% endfor %}")
    chat = talk(tokenizer, HI, "!", SO)
    assert (tokenizer.decode(chat.prompt_ids), chat.breaks) == ("Hihe!hesohe", [])
    (broken,) = talk(tokenizer, HI, " t", SO).breaks  # " t" and "he" are one token
    assert "would change the reply's tokens" in broken


def test_a_thought_that_comes_and_goes_with_the_position_of_a_turn_is_no_break(
    model: Callable[..., ChatTokenizer],
) -> None:
    """Newer Qwen templates write an empty thought into the turns after the last question, and take it out later."""
    empty = "('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.index0 > last.user else '') + "
    search = "{% set last = namespace(user=0) %}{% for m in messages if m.role == 'user' %}{% set last.user = "
    template = search + "messages.index(m) %}{% endfor %}" + CHATML.replace("m.content +", empty + "m.content +")
    tokenizer = model(template)
    chat = talk(tokenizer, HI, SAID, RESULT, SAID, SO, SAID, [{"role": "user", "content": "and"}])
    assert chat.breaks == []
    assert "<think>" not in tokenizer.decode(chat.prompt_ids)


def test_text_after_a_stop_token_is_encoded_as_it_stands_there(tmp_path: Path) -> None:
    """SentencePiece marks the start of a text with a space; text after a special token is no start."""
    template = "{% for m in messages %}{{ 'Q:' if m.role == 'user' }}{{ m.content }}{{ eos_token if m.role != 'user' }}"
    family = replace(FAMILIES["vicuna"], metaspace="first")
    tokenizer = load_tokenizer(build_family(tmp_path, family, template=template + "{% endfor %}"))
    chat = talk(tokenizer, HI, "</s>", SO)
    assert chat.prompt_ids == tokenizer.encode("Q:Hi</s>Q:so")
    assert tokenizer.encode("Q:so") != chat.prompt_ids[-len(tokenizer.encode("Q:so")) :]


def test_a_cut_off_reply_is_never_ended_in_the_words_of_a_tool_call(family: Callable[[str], ChatTokenizer]) -> None:
    chat = talk(family("mistral"), HI, " cut", RESULT, " cut")
    assert chat.breaks == []
    with pytest.raises(TemplateError, match="alternate"):  # a call would fit here, but the model made none
        chat.add(RESULT)


def test_a_message_that_the_template_refuses_changes_nothing(family: Callable[[str], ChatTokenizer]) -> None:
    chat = talk(family("gemma"), HI, "yes<end_of_turn>")
    with pytest.raises(TemplateError, match=r"refuses 3 messages \(user, assistant, assistant\).*alternate"):
        chat.add([{"role": "assistant", "content": "no"}])
    assert len(chat.messages) == 2
    chat.add(SO)
    assert chat.breaks == []


def test_a_template_that_leaves_tool_messages_out_is_an_error(family: Callable[[str], ChatTokenizer]) -> None:
    with pytest.raises(TemplateError, match="leaves out messages of role 'tool'"):
        talk(family("deepseek"), HI, "hm</think>yes<｜end▁of▁sentence｜>", RESULT)


# -- a conversation's life -------------------------------------------------------------------------------------------


def test_misuse_says_what_to_call(family: Callable[[str], ChatTokenizer]) -> None:
    chat = Conversation(family("smollm2"))
    for act in (lambda: chat.prompt_ids, lambda: chat.add(HI), lambda: chat.add_reply(sampled([1]))):
        with pytest.raises(ValueError, match=r"start\(messages\) first"):
            act()
    with pytest.raises(ValueError, match="no messages"):
        chat.start([])
    chat.start(HI)
    with pytest.raises(ValueError, match="called twice"):
        chat.start(HI)
    chat.add_reply(sampled([1, 2]))
    with pytest.raises(ValueError, match=r"add\(messages\) first"):
        _ = chat.prompt_ids
    chat.add(SO)
    with pytest.raises(ValueError, match="2 tokens but 1 log-prob"):
        chat.add_reply(Reply(token_ids=[1, 2], logprobs=[0.0], spans=(Span(0, 0, 2),), finish_reason="stop"))
    with pytest.raises(ValueError, match="do not cover"):
        chat.add_reply(Reply(token_ids=[1, 2], logprobs=[0.0, 0.0], spans=(Span(0, 1, 2),), finish_reason="stop"))


def test_messages_added_in_two_calls_are_as_added_in_one(family: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = family("smollm2")
    once = talk(tokenizer, [*HI, *SO], SAID, [*HI, *SO])
    twice = talk(tokenizer, HI, SO, SAID, HI, SO)
    assert once.prompt_ids == twice.prompt_ids
    assert twice.breaks == []


def test_a_fork_goes_its_own_way_and_trains_only_its_own_tokens(family: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = family("smollm2")
    chat = talk(tokenizer, HI, SAID, SO)
    fork = chat.fork()
    assert fork.samples() == ()
    chat.add_reply(reply(tokenizer, "no<|im_end|>"))
    fork.add_reply(reply(tokenizer, SAID))
    fork.add(HI)
    chat.add(SO)
    assert (chat.breaks, fork.breaks, chat.num_turns, fork.num_turns) == ([], [], 2, 2)
    (own,), (branch,) = chat.samples(), fork.samples()
    assert sum(own.sampled) == len(tokenizer.encode("no<|im_end|>" + SAID))
    assert sum(branch.sampled) == len(tokenizer.encode(SAID))
    assert [span.end - span.start for span in branch.spans] == [sum(branch.sampled)]
    assert chat.messages[-2]["content"] == "no"


def test_spans_stand_where_the_tokens_stand(family: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = family("smollm2")
    chat = talk(tokenizer, HI)
    start, ids = chat.num_tokens, tokenizer.encode(SAID)
    spans = (Span(4, 0, 1), Span(5, 1, len(ids)))
    chat.add_reply(Reply(token_ids=ids, logprobs=[-1.0] * len(ids), spans=spans, finish_reason="stop"))
    (sample,) = chat.samples()
    assert sample.spans == (Span(4, start, start + 1), Span(5, start + 1, start + len(ids)))
    assert sample.sampled == [0] * start + [1] * len(ids)


# -- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_without_a_template_is_plain_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_characters(tmp_path))
    chat = talk(tokenizer, [{"role": "user", "content": "abc=>"}], "cba<eos>", [{"role": "user", "content": "?"}], "no")
    assert tokenizer.decode(chat.samples()[0].token_ids) == "abc=>cba<eos>?no"
    assert tokenizer.stop_ids == (tokenizer.eos_id,)
    row = render_completion(tokenizer, "abc=>", "cba")
    assert tokenizer.decode(row.token_ids) == "abc=>cba<eos>"
    assert row.mask == [0] * 5 + [1] * 4


def test_a_plain_model_without_an_end_token_still_converses(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_characters(tmp_path, eos=False))
    chat = talk(tokenizer, [{"role": "user", "content": "abc"}], "cba", [{"role": "user", "content": "?"}])
    assert tokenizer.decode(chat.prompt_ids) == "abccba?"
    assert (chat.breaks, tokenizer.stop_ids) == ([], ())
    assert render_completion(tokenizer, "ab", "c").mask == [0, 0, 1]


def test_plain_text_starts_with_bos_if_the_tokenizer_puts_it_there(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    build_characters(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).render(HI) == "Hi"
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).render(HI) == "<bos>Hi"


def test_text_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    build_characters(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"unk_token": "<pad>"', '"unk_token": "<unk>"'))
    chat = Conversation(load_tokenizer(tmp_path))
    with pytest.raises(TemplateError, match=r"cannot express 'Ünknown'"):
        chat.start([{"role": "user", "content": "Ünknown"}])
    assert chat.messages == []


def test_stop_ids_are_those_of_the_tokenizer_and_of_the_generation_config(
    family: Callable[[str], ChatTokenizer],
) -> None:
    tokenizer = family("glm45")
    assert [tokenizer.decode([stop]) for stop in tokenizer.stop_ids] == ["<|endoftext|>", "<|user|>", "<|observation|>"]


def test_stop_ids_of_an_older_model_are_in_its_config(tmp_path: Path) -> None:
    build_family(tmp_path, FAMILIES["smollm2"])
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (7, tokenizer.eos_id)


def test_templates_by_name_and_legacy_special_tokens(tmp_path: Path) -> None:
    build_family(tmp_path, FAMILIES["smollm2"])
    (tmp_path / "chat_template.jinja").unlink()
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ own_token }} {{ pad_token }}"},
    ]
    config = {"tokenizer_class": "TokenizersBackend", "chat_template": templates, "own_token": "<own>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pad = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad, "eos_token": "<|im_end|>"}))
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for tools in (None, [], TOOLS):
        assert ours.render(HI, tools) == theirs.apply_chat_template(HI, tools=tools, tokenize=False)
    assert ours.encode("a<pad>  <own>b") == theirs("a<pad>  <own>b", add_special_tokens=False)["input_ids"]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file")
    (tmp_path / "chat_template.jinja").write_text("default file")
    assert (load_tokenizer(tmp_path).render(HI), load_tokenizer(tmp_path).render(HI, TOOLS)) == ("default file", "file")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if loop.index > 1 %}\n  {% break %}\n  {% endif %}\n{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}  {{ m.content }}\n{% endgeneration %}{% endfor %}|",
        "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
        "{{ messages[0].missing }}|{{ messages[0].items() | list }}{{ messages[0]['role'] }}{{ messages[0].get('x') }}",
        "{{ messages[0].missing is defined }}{{ documents is none }}{{ tools is none }}{{ strftime_now('%Y') }}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ messages[0].pop is defined }}",
    ],
)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    build_family(tmp_path, FAMILIES["smollm2"], template=template)
    messages = [*HI, {"role": "user", "content": "é <b> '\n "}]
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for tools in (None, TOOLS):
        assert ours.render(messages, tools) == theirs.apply_chat_template(messages, tools=tools, tokenize=False)


def test_bad_models_name_the_file_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer.json; save the model's tokenizer"):
        load_tokenizer(tmp_path)
    build_family(tmp_path, FAMILIES["smollm2"], template="{% for %}")
    with pytest.raises(TemplateError, match=r"line 1.*fix the template"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_template_cannot_reach_out_of_the_sandbox(model: Callable[..., ChatTokenizer]) -> None:
    for template in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ messages[0].__class__.__base__.x.y }}"):
        with pytest.raises(TemplateError, match="refuses"):
            model(template).render(HI)


def test_no_torch_and_no_transformers(tmp_path: Path) -> None:
    build_family(tmp_path, FAMILIES["qwen3"])
    script = f"""
import sys
from palestra.env.chat import Conversation, load_tokenizer
chat = Conversation(load_tokenizer({str(tmp_path)!r}))
chat.start([{{"role": "user", "content": "Hi"}}])
assert chat.prompt_ids
assert not {{"torch", "transformers", "renderers", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env={"PYTHONPATH": "src", "PATH": ""})


# -- replies ---------------------------------------------------------------------------------------------------------

THINK = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("yes", False, AssistantMessage("yes")),
        ("  yes \n", False, AssistantMessage("  yes \n")),
        ("<think>hm</think>yes", False, AssistantMessage("yes", "hm")),
        ("\n<think></think>\nyes", False, AssistantMessage("yes")),
        ("<think>hm", False, AssistantMessage("", "hm", False)),
        ("hm", True, AssistantMessage("", "hm", False)),
        ("hm</think>\n\nyes", True, AssistantMessage("yes", "hm")),
        ("hm</think>yes", False, AssistantMessage("yes", "hm")),
        ("<think>a</think>yes<think>b", False, AssistantMessage("", "a\nb", False)),
        ("<think>a</think>x<think>b</think>y", False, AssistantMessage("xy", "a\nb")),
        ("", True, AssistantMessage("", "", False)),
    ],
)
def test_reasoning_is_not_the_answer(text: str, inside: bool, expected: AssistantMessage) -> None:
    assert parse_text(text, inside_thinking=inside, tags=THINK, tools=True) == expected


@pytest.mark.parametrize(
    ("text", "content", "call"),
    [
        ('ok\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "ok", ToolCall("f", {"a": 1})),
        ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "", ToolCall("f", {"a": 1})),
        ("<tool_call>f\n<arg_key>a</arg_key><arg_value>x y</arg_value></tool_call>", "", ToolCall("f", {"a": "x y"})),
        ("<tool_call><function=f><parameter=a>\nx\n</parameter></function></tool_call>", "", ToolCall("f", {"a": "x"})),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', "", ToolCall("f", {"a": 1})),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', "", ToolCall("f", {"a": 1})),
        ('{"name": "f", "parameters": {"a": 1}}', "", ToolCall("f", {"a": 1})),
        ('<|python_tag|>{"name": "f", "parameters": {}}', "", ToolCall("f", {})),
    ],
)
def test_tool_calls_of_each_shape(text: str, content: str, call: ToolCall) -> None:
    assert split_tool_calls(text) == (content, (call,))


@pytest.mark.parametrize(
    "again",
    [
        *("<tool_call>", "<tool_call>f<arg_key>", "<arg_key>a</arg_key>", "<arg_key>a</arg_key><arg_value>"),
        *("<function=", "<function=f>", "<function=f><parameter=a>", "[TOOL_CALLS]", "[TOOL_CALLS]a "),
        *(" ", "{", "</tool_call>"),
    ],
)
@pytest.mark.parametrize("around", ["{}", "<tool_call>{}</tool_call>", "</tool_call></function>{}", "[TOOL_CALLS]a{}"])
def test_a_model_that_says_one_thing_over_and_over_holds_nobody_up(again: str, around: str) -> None:
    """As many times as a long reply has tokens. Quadratic, it would take minutes."""
    text = around.replace("{}", again * 30_000)
    began = time.process_time()
    split_tool_calls(text)
    assert time.process_time() - began < 2


def test_calls_are_found_where_a_plain_search_finds_them() -> None:
    """What is cut off to be quick holds none: against the pattern on the whole text, over words drawn at random."""
    words = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "{", "\n"]
    draw, num_calls = random.Random(0), 0
    plain = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
    for _ in range(3000):
        text = "".join(draw.choices(words, k=9))
        found = [body.strip() for body in plain.findall(text) if body.strip() == words[2]]
        calls = split_tool_calls(text)[1]
        num_calls += len(calls)
        if not text.startswith("{"):
            assert len(calls) == len(found), text
    assert num_calls > 50


def test_arguments_between_other_words_are_read_in_their_order() -> None:
    body = "f<arg_key>a</arg_key> \n<arg_value>1</arg_value> and <arg_key>lost</arg_key>, "
    body += "<arg_key>b</arg_key><arg_value><arg_key>x</arg_value><arg_key>open"
    assert split_tool_calls(f"<tool_call>{body}</tool_call>") == ("", (ToolCall("f", {"a": 1, "b": "<arg_key>x"}),))


def test_a_name_that_no_message_can_hold_is_no_call() -> None:
    text = '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'
    assert split_tool_calls(text) == (text, ())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], 0), (["call00001", "call00003"], 4), (["other", "another", "call00000"], 3), (["call"], 1)],
)
def test_the_next_call_has_a_number_of_its_own(ids: list[str], expected: int) -> None:
    """Also where a program left out earlier ones."""
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"id": id} for id in ids]}]
    assert _first_free(messages) == expected


def test_what_is_no_tool_call_stays_text() -> None:
    for text in (
        '{"name": 1}',
        "<tool_call>{",
        "<tool_call>{]</tool_call>",
        "{" * 5000,
        "<tool_call></tool_call>",
        "yes",
    ):
        assert split_tool_calls(text) == (text, ())


def test_json_is_an_answer_where_there_are_no_tools(family: Callable[[str], ChatTokenizer]) -> None:
    said = '{"name": "f", "parameters": {}}'
    assert talk(family("llama3"), HI, said).reply == AssistantMessage(said)
    assert talk(family("llama3"), HI, said, tools=TOOLS).reply == AssistantMessage(tool_calls=(ToolCall("f", {}),))


def test_special_tokens_are_dropped_and_a_prompt_that_opens_a_thought_counts(
    family: Callable[[str], ChatTokenizer],
) -> None:
    assert family("smollm2").parse_reply(family("smollm2").encode("<|im_start|>yes<|im_end|>")).content == "yes"
    deepseek = family("deepseek")
    assert deepseek.opens_thinking
    assert deepseek.parse_reply(deepseek.encode("yes")) == AssistantMessage("", "yes", False)
    assert talk(deepseek, HI, "yes").reply.content == ""
    assert deepseek.parse_reply(deepseek.encode("yes"), inside_thinking=False) == AssistantMessage("yes")


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(-5, 700) | st.sampled_from([2**31, 2**40]), max_size=30), tools=st.booleans())
def test_parsing_never_raises(family: Callable[[str], ChatTokenizer], name: str, ids: list[int], tools: bool) -> None:
    message = family(name).parse_reply(ids, tools=tools)
    assert message.finished_thinking or message.content == ""


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [*THINK, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "f", "arguments": {}}', "a", "\n"]
        )
    )
)
def test_parsing_any_mixture_of_markers(pieces: list[str]) -> None:
    message = parse_text("".join(pieces), inside_thinking=False, tags=THINK, tools=True)
    assert THINK[0] not in message.content
    assert message.finished_thinking or (message.content, message.tool_calls) == ("", ())


# -- supervised rows -------------------------------------------------------------------------------------------------


def learnt(tokenizer: ChatTokenizer, messages: list[dict], **options: object) -> list[str]:
    """The text of each run of tokens to learn."""
    ids, mask = render_sft(tokenizer, messages, **options)  # type: ignore[arg-type]
    runs: list[list[int]] = []
    for position, (token, own) in enumerate(zip(ids, mask, strict=True)):
        if own:
            runs += [[]] if position == 0 or not mask[position - 1] else []
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_what_each_family_learns_to_write(family: Callable[[str], ChatTokenizer]) -> None:
    yes = [{"role": "assistant", "content": "yes"}]
    no = [{"role": "assistant", "content": "no", "reasoning_content": "hm"}]
    expected = {
        "qwen3": ["yes<|im_end|>", "<think>\nhm\n</think>\n\nno<|im_end|>"],
        "llama3": ["yes<|eot_id|>", "no<|eot_id|>"],
        "glm45": ["\n<think></think>\nyes<|user|>", "\n<think>hm</think>\nno<|user|>"],
        "gemma": ["yes<end_of_turn>", "no<end_of_turn>"],
        "mistral": ["yes</s>", "no</s>"],
        "smollm2": ["yes<|im_end|>", "no<|im_end|>"],
        "deepseek": ["yes<｜end▁of▁sentence｜>", "no<｜end▁of▁sentence｜>"],
    }
    for name, runs in expected.items():
        assert learnt(family(name), [*HI, *yes, *SO, *no]) == runs, name
        assert learnt(family(name), [*HI, *yes, *SO, *no], first=2) == runs[1:], name
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00000", "function": {"name": "f", "arguments": {}}}],
    }
    tools = {
        "qwen3": [
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nyes<|im_end|>",
        ],
        "llama3": ['{"name": "f", "parameters": {}}<|eot_id|>', "yes<|eot_id|>"],
        "glm45": ["\n<think></think>\n<tool_call>f\n</tool_call><|observation|>", "\n<think></think>\nyes<|user|>"],
        "mistral": ['[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "call00000"}]</s>', "yes</s>"],
    }
    for name, runs in tools.items():
        assert learnt(family(name), [*HI, call, *RESULT, *yes], tools=TOOLS) == runs, name


def test_a_row_that_ends_with_a_call_ends_with_the_token_that_asks_for_its_result(
    family: Callable[[str], ChatTokenizer],
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert learnt(family("glm45"), [*HI, call])[-1].endswith("</tool_call><|observation|>")


def test_a_turn_without_a_place_of_its_own_is_named(model: Callable[..., ChatTokenizer]) -> None:
    dropped = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match=r"messages\[1\] \(assistant\) has no tokens of its own"):
        render_sft(model(dropped), [*HI, {"role": "assistant", "content": "yes"}])
    yes = {"role": "assistant", "content": "yes"}
    count = "{{ messages[3].content | length if messages | length > 3 }}"
    for template in (CHATML + count, count + CHATML):
        with pytest.raises(TemplateError, match=r"messages\[3\].*depends on the message"):
            render_sft(model(template), [*HI, yes, *SO, yes], first=2)


def test_a_token_that_is_partly_the_surroundings_is_not_learnt(model: Callable[..., ChatTokenizer]) -> None:
    tokenizer = model("{% for m in messages %}{{ m.content + 'he' }}{% endfor %}")
    assert learnt(tokenizer, [*HI, {"role": "assistant", "content": "! t"}]) == ["!", "<|im_end|>"]


# -- which tokens say a piece of a reply -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_tokens_up_to_a_piece_are_the_fewest_that_say_it(family: Callable[[str], ChatTokenizer], name: str):
    tokenizer = family(name)
    text = "so, é = 42 — then 🦀 is 42; a naïve end"
    ids = [*tokenizer.encode(text), tokenizer.stop_ids[0]]
    for start in range(0, len(text), 2):
        for length in (1, 2, 7):
            piece = text[start : start + length]
            head = text[: text.rfind(piece) + len(piece)]
            count = tokenizer.tokens_up_to(ids, piece)
            assert count is not None
            assert tokenizer.decode(ids[:count]).startswith(head)
            assert not tokenizer.decode(ids[: count - 1]).startswith(head)
    assert tokenizer.tokens_up_to(ids, "43") is None
    assert tokenizer.tokens_up_to(ids, "") is None


def test_special_tokens_inside_a_piece_are_not_part_of_its_text(family: Callable[[str], ChatTokenizer]):
    tokenizer = family("smollm2")
    one, other, end = tokenizer.encode("so"), tokenizer.encode(" is"), tokenizer.stop_ids[0]
    assert tokenizer.tokens_up_to([end, *one, end, *other, end], "so is") == 2 + len(one) + len(other)
