"""What a stranger's evaluation may make others do: read a command, of words that are known."""

import shlex

import pytest
from pydantic import ValidationError

from palestra.hub.evals.told import reproduce, without_secrets
from tests.unit.hub.evals.made import told

HOSTILE = "x'; rm -rf ~ #`$(id)`\n&& y"


def test_whatever_the_settings_are_each_is_one_word():
    said = told(model=HOSTILE, endpoint=HOSTILE, split=HOSTILE, args={HOSTILE: HOSTILE}, environment=HOSTILE)
    *_, line = reproduce(said)
    words = shlex.split(line)
    assert words[:3] == ["palestra", "eval", HOSTILE]
    assert words[words.index("--model") + 1] == HOSTILE
    assert words[words.index("--split") + 1] == HOSTILE
    assert {word for word in words if word.startswith("--")} == {
        *("--base-url", "--model", "--temperature", "--max-tokens", "--split", "--seed", "--args")
    }


@pytest.mark.parametrize(
    "override",
    [
        "engine.args={'trust-remote-code': true}",
        "engine.args.trust_remote_code=true",
        "eval.sets.0.python=/tmp/evil",
        "eval.endpoint.url=http://elsewhere",
        "sandbox.min_isolation=none",
        "env.sandbox=unsafe",
        "log.outputs=/etc",
        "model.path=elsewhere",
        "engine.max_model_len=1; id",
        "engine.max_model_len=1\nid",
        "-x",
    ],
)
def test_what_reaches_beyond_sizes_and_times_is_refused(override: str):
    with pytest.raises(ValidationError):
        told(overrides=[override])


def test_sizes_and_times_are_part_of_the_command():
    said = told(overrides=["engine.max_model_len=8192", "eval.sets.0.top_p=0.9", "sandbox.cpus=0.5"])
    assert reproduce(said)[-1].endswith(" engine.max_model_len=8192 eval.sets.0.top_p=0.9 sandbox.cpus=0.5")


def test_a_weaker_sandbox_is_nobodys_but_his():
    assert "unsafe" not in reproduce(told(sandbox="unsafe"))[-1]


def test_an_environment_is_no_option():
    with pytest.raises(ValidationError):
        told(environment="--push")


def test_what_is_not_known_well_enough_has_no_command():
    assert reproduce(told(imported="verifiers")) == []


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://me:secret@host:80/v1?key=secret#x", "http://host:80/v1"),
        ("https://host/v1", "https://host/v1"),
        ("http://secret@[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_an_address_goes_without_secrets(url: str, kept: str):
    assert without_secrets(url) == kept
