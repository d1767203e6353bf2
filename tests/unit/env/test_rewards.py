"""Readers of replies: known answers, and no reply makes them raise."""

import gc
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palestra.env import boxed, json_reply, ratio, xml

PIECES = [
    "a",
    "b",
    "[",
    "]",
    '"',
    ":",
    "```json\n",
    "<",
    ">",
    "/",
    "{",
    "}",
    "\\",
    " ",
    "\n",
    "<a>",
    "</a>",
    "\\boxed{",
    "\\{",
    "\\}",
]
ODD_TEXT = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<a>x</a>", "x"),
        ("<a> x\ny </a> bye", "x\ny"),
        ("<a>first</a> no: <a>last</a>", "last"),
        ("<a>done</a> <a>unfinished", "done"),
        ("<a><a>inner</a>", "inner"),
        ("<a>unfinished", ""),
        ("</a><a>", ""),
        ("nothing", ""),
        ("", ""),
    ],
)
def test_xml_is_the_last_complete_tag(text, content):
    assert xml(text, "a") == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"so \boxed {x} and then \boxed{\frac{1}{2}} .", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{done} \boxed{unfinished", "done"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxed{unfinished", ""),
        (r"} { \boxed{x} }", "x"),
        ("nothing", ""),
    ],
)
def test_boxed_is_the_last_balanced_one(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": [1, {"b": 2}]}', {"a": [1, {"b": 2}]}),
        ("Here it is: [1, 2] and no more", [1, 2]),
        ('first {"a": 1}, no: {"a": 2}', {"a": 2}),
        ('```json\n{"a": 1}\n```\nnot {"a": 2}', {"a": 1}),
        ('```\nhm\n```\n{"a": 2}', {"a": 2}),
        ('{"a": {"b": 1', None),
        ('\\frac{1}{2} is {"a": 1} and {}', {}),
        ("7", None),
        (f"[{'9' * 5000}] is too long for a number", None),
        ("", None),
    ],
)
def test_json_reply_is_the_last_whole_value(text, found):
    assert json_reply(text) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["[" * 200_000, "{" * 200_000, "[1," * 70_000, '{"a":' * 40_000, "[" * 900 + "1," * 95_000]
)
def test_half_a_json_is_read_in_vain_for_a_second_at_most(text):
    gc.collect()
    gc.disable()  # what other tests left is not looked through meanwhile
    try:
        began = time.thread_time()
        assert json_reply(text) is None
        assert time.thread_time() - began < 1
    finally:
        gc.enable()


def test_ratio_by_hand():
    assert ratio("abcd", "abcd") == 1.0
    assert ratio("abcd", "bcda") == 0.75  # bcd: 2 * 3 / 8
    assert ratio("", "abcd") == 0.0
    assert ratio("", "") == 1.0


@given(ODD_TEXT | st.text(), ODD_TEXT)
def test_no_reply_makes_them_raise(text, other):
    assert isinstance(xml(text, "a"), str)
    assert isinstance(boxed(text), str)
    json_reply(text)
    assert 0 <= ratio(text, other) <= 1


def test_a_hostile_reply_takes_no_longer_than_its_length_asks():
    started = time.thread_time()
    assert boxed(r"\boxed{" * 50_000) == ""
    assert xml("<a>" * 50_000 + "</a>", "a") == ""
    assert time.thread_time() - started < 2
