"""A character that a built model has no token for is an error, never another token."""

from pathlib import Path

import pytest

from palestra.config.schema import Build
from palestra.core.errors import UserError
from palestra.env.chat import load_tokenizer, render_completion


@pytest.fixture
def abc(tmp_path: Path):
    from palestra.model.build import write_tokenizer

    write_tokenizer(Build(architecture="Qwen3ForCausalLM", alphabet="abc"), tmp_path)
    return load_tokenizer(tmp_path)


def test_a_character_outside_the_alphabet_is_named(abc):
    assert abc.decode(abc.encode("cab")) == "cab"
    with pytest.raises(UserError, match=r"'x' in 'abxc' is not in the model's vocabulary"):
        abc.encode("abxc")


def test_so_is_one_in_supervised_text(abc):
    with pytest.raises(UserError, match="'z' in"):
        render_completion(abc, "abc", "cbz")
