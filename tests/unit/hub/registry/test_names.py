"""Names that cannot be, and names that are taken for another's."""

import pytest

from palestra.hub.registry import names
from palestra.hub.registry.actions import ACTIONS
from palestra.hub.registry.names import BadNameError
from palestra.hub.registry.pages import PAGES


@pytest.mark.parametrize("name", ["alice", "a", "a-b", "team-7", "x" * 39])
def test_an_owner_may_be_called_so(name):
    assert names.owner_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a--b", "A", "a.b", "a/b", "x" * 40, "ä", "a\n", "login", "api", "static"]
)
def test_an_owner_may_not_be_called_so(name):
    with pytest.raises(BadNameError):
        names.owner_name(name)


def test_no_owner_or_environment_can_hide_a_page():
    addresses = [one.path for one in (*PAGES, *ACTIONS)] + ["/static", "/openapi.json", "/login"]
    first = {address.split("/")[1].removesuffix(".json") for address in addresses} - {"{owner}"}
    assert first <= names.RESERVED_OWNERS
    second = {address.split("/")[2] for address in addresses if address.startswith("/{owner}/")} - {"{environment}"}
    assert second | {"legacy"} <= names.RESERVED_ENVIRONMENTS


@pytest.mark.parametrize(
    ("project", "environment"),
    [("palestra-words", "words"), ("Palestra_Words", "words"), ("words", "words"), ("palestra", "palestra")],
)
def test_a_distribution_belongs_to_an_environment(project, environment):
    assert names.environment_of(project) == environment
    assert names.belongs(project, environment)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("wordle", "worlde"),  # two in the wrong order
        ("wordle", "wordl"),  # one is missing
        ("wordle", "wordlee"),
        ("wordle", "wordie"),
        ("wordle", "w0rdle"),  # looks the same
        ("wordle", "word-le"),
        ("kernel", "kemel"),
        ("aime", "a1me"),
    ],
)
def test_near_names(one, other):
    assert names.is_near(one, other)
    assert names.is_near(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("wordle", "wordle"),
        ("wordle", "wordless"),  # two letters more
        ("aime", "game"),  # short names have honest neighbours
        ("arc-1", "arc-2"),  # numbers are meant
        ("gsm8k", "gsm9k"),
        ("logic", "chess"),
    ],
)
def test_names_that_are_not_near(one, other):
    assert not names.is_near(one, other)
    assert not names.is_near(other, one)
