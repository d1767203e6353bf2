"""A built model is what transformers, tokenizers and the chat code take for a model."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palestra.config.schema import Build, Log, Model, RunConfig
from palestra.core.errors import UserError
from palestra.env.chat.tokenizer import load_tokenizer
from palestra.env.tools import as_tool_call
from palestra.model.build import build_model
from tests.unit.model import tiny


def test_transformers_loads_what_was_built(tmp_path):
    path = tiny.build(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer) == 4 + len(tiny.ALPHABET)
    assert (model.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 0)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab c"}], add_generation_prompt=True)["input_ids"]
    assert ids == [1, 4, 5, 30, 6, 1]
    assert tokenizer.decode(ids) == "<bos>ab c<bos>"


def test_a_later_turn_extends_the_earlier_tokens(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.build(tmp_path))
    turns = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "ba"},
        {"role": "user", "content": "c"},
    ]
    first = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    third = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert third[: len(first)] == first


def test_words_are_tokens_and_calls_are_read_as_they_are_written(tmp_path):
    words = ('<tool_call>{"name": "add", "arguments": {"a": ', ', "b": ', "}}</tool_call>", "add")
    build_model(Build(architecture="Qwen3ForCausalLM", alphabet="0123456789", words=words, config=tiny.QWEN), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    call = as_tool_call(0, "add", {"a": 3, "b": 14})
    turns = [{"role": "user", "content": "5"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    ids = tokenizer.tokenizer.encode(tokenizer.render(turns, tools), add_special_tokens=False).ids
    digit, word = 4, 14  # the first of each
    said = [word, digit + 3, word + 1, digit + 1, digit + 4, word + 2]
    assert ids == [1, word + 3, 1, digit + 5, 1, *said, 2]
    reply = tokenizer.parse_reply([*said, 2], inside_thinking=False, tools=True)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("add", {"a": 3, "b": 14})]


def test_the_seed_decides_the_bits(tmp_path):
    states = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        build = Build(architecture="Qwen3ForCausalLM", alphabet="ab", config=tiny.QWEN, seed=seed)
        build_model(build, tmp_path / name)
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "Qwen33ForCausalLM"}, "Qwen33ForCausalLM.*not a causal language model"),
        ({"architecture": "Qwen3Model"}, "not a causal language model"),
        ({"config": {"hiden_size": 8}}, "hiden_size is not a field of Qwen3Config; it has .*hidden_size"),
        ({"config": {"vocab_size": 8}}, "vocab_size follows from model.build.alphabet"),
        ({"config": {**tiny.QWEN, "num_key_value_heads": 2.5}}, "num_key_value_heads"),
        ({"alphabet": "abca"}, "'a' 2 times"),
        ({"words": ["aa", "b"]}, "'b' 2 times"),
        ({"words": ["<eos>"]}, "'<eos>' 1 times.*none that is empty or special"),
    ],
)
def test_a_wrong_build_names_what_is_wrong(tmp_path, change, said):
    build = Build(**{"architecture": "Qwen3ForCausalLM", "alphabet": "ab", "config": tiny.QWEN, **change})
    with pytest.raises(UserError, match=said):
        build_model(build, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_the_program_builds_once(tmp_path):
    build = Build(architecture="Qwen3ForCausalLM", alphabet="ab", config=tiny.QWEN)
    config = RunConfig(log=Log(name="run", outputs=tmp_path), model=Model(build=build))
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "palestra.model", str(path)]
    subprocess.run(command, check=True, timeout=120)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    subprocess.run(command, check=True, timeout=120)
    assert weights.stat().st_mtime_ns == written
