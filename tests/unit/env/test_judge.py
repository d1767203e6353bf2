"""Judges: the whole question or none, answers of a type, a cache, a budget, failures that are never a grade."""

import asyncio
import json
import re
from collections import defaultdict

import httpx
import msgspec
import pytest

from palestra.core.errors import InfrastructureError
from palestra.core.records import Ending, Task
from palestra.env import Environment, Judge, reward
from palestra.env import judge as judging
from palestra.env.judge import BudgetError, filled
from palestra.env.play import score
from palestra.wire.chat import ChatClient

TEMPLATE = "Question: {question}\nAnswer: {answer}\nIs it right?"


class Verdict(msgspec.Struct):
    right: bool
    why: str = ""


def judge(*answers: str, asked: list[dict] | None = None, **settings) -> Judge:
    """One whose model says these answers, one a question, and then the last one for ever."""
    left = list(answers)

    def say(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if asked is not None:
            asked.append(body)
        content = left.pop(0) if len(left) > 1 else left[0]
        return httpx.Response(200, json={"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})

    made = Judge("http://judge/v1", "wise", **settings)
    made._client = ChatClient("http://judge/v1", "wise", key_env=None, call_s=5, transport=httpx.MockTransport(say))
    return made


async def test_the_whole_question_is_asked_and_the_answer_is_a_value():
    asked: list[dict] = []
    found = await judge('Well: ```json\n{"right": true, "why": "4 = 4"}\n```', asked=asked)(
        TEMPLATE, Verdict, question="2 + 2? {braces} stay", answer="4"
    )
    assert found == Verdict(right=True, why="4 = 4")
    [body] = asked
    [message] = body["messages"]
    assert "Question: 2 + 2? {braces} stay\nAnswer: 4\n" in message["content"]
    assert '"right"' in message["content"]
    assert (body["model"], body["temperature"]) == ("wise", 0.0)


async def _is_never_asked(fields: dict[str, str], words: str) -> None:
    asked: list[dict] = []
    why = ""
    try:
        await judge('{"right": true}', asked=asked)(TEMPLATE, Verdict, **fields)
    except ValueError as error:
        why = str(error)
    assert re.search(words, why)
    assert asked == []


class Graded(Environment):
    @reward
    async def right(self, task, rollout):
        verdict = await judge('{"right": true}')(TEMPLATE, Verdict, question=task.prompt, answer=rollout.reply)
        return verdict.right


async def _an_empty_question_makes_the_rollout_invalid() -> None:
    graded = await score(Graded(), Task(prompt="2 + 2?"), ["4"])
    assert (graded.ending, graded.reward) == (Ending.OK, 1.0)
    empty = await score(Graded(), Task(prompt="2 + 2?"), [""])
    assert (empty.ending, empty.reward, empty.seats) == (Ending.INVALID, 0.0, ())
    assert "an empty answer" in empty.error


@pytest.fixture
def careless(monkeypatch) -> None:
    """The planted fault: what is missing is asked as nothing."""
    monkeypatch.setattr(judging, "filled", lambda template, fields: template.format_map(defaultdict(str, fields)))


NOT_WHOLE = pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"question": "", "answer": "4"}, "an empty question"),
        ({"question": " \n", "answer": "4"}, "an empty question"),
        ({"question": "2 + 2?"}, r"\{answer\}, which it was not given"),
        ({"question": "2 + 2?", "answer": "4", "hint": "even"}, r"no \{hint\}"),
    ],
)


@NOT_WHOLE
async def test_a_question_that_is_not_whole_is_never_asked(fields, words):
    await _is_never_asked(fields, words)


@NOT_WHOLE
async def test_negative_control_a_question_that_is_not_whole_and_asked_is_caught(careless, fields, words):
    with pytest.raises(AssertionError):
        await _is_never_asked(fields, words)


async def test_a_judge_that_was_sent_an_empty_question_makes_the_rollout_invalid():
    await _an_empty_question_makes_the_rollout_invalid()


async def test_negative_control_a_judge_that_grades_an_empty_question_is_caught(careless):
    with pytest.raises(AssertionError):
        await _an_empty_question_makes_the_rollout_invalid()


async def test_an_answer_that_does_not_fit_is_asked_for_again_with_the_reason():
    asked: list[dict] = []
    found = await judge("It is right.", '{"right": "yes"}', '{"right": false}', asked=asked)(
        TEMPLATE, Verdict, question="2 + 2?", answer="5"
    )
    assert found == Verdict(right=False)
    assert [len(body["messages"]) for body in asked] == [1, 3, 5]
    assert "Expected `bool`, got `str`" in asked[2]["messages"][-1]["content"]
    with pytest.raises(InfrastructureError, match="no answer that fits"):
        await judge("no idea")(TEMPLATE, Verdict, question="2 + 2?", answer="5")


async def test_the_same_question_is_asked_once_also_at_the_same_time_and_in_another_process(tmp_path):
    asked: list[dict] = []
    fields = {"question": "2 + 2?", "answer": "4"}
    one = judge('{"right": true}', asked=asked, cache=tmp_path / "judged")
    both = await asyncio.gather(one(TEMPLATE, Verdict, **fields), one(TEMPLATE, Verdict, **fields))
    assert both == [Verdict(right=True)] * 2
    other = judge('{"right": false}', asked=asked, cache=tmp_path / "judged")
    assert await other(TEMPLATE, Verdict, **fields) == Verdict(right=True)
    assert len(asked) == 1
    assert await other(TEMPLATE, Verdict, question="2 + 3?", answer="4") == Verdict(right=False)


async def test_a_verdict_may_be_a_number():
    assert await judge("7")(TEMPLATE, int, question="2 + 2?", answer="4") == 7


async def test_a_question_that_failed_is_asked_again():
    asked: list[dict] = []
    one = judge("no idea", "no idea", "no idea", '{"right": true}', asked=asked)
    with pytest.raises(InfrastructureError):
        await one(TEMPLATE, Verdict, question="2 + 2?", answer="4")
    assert await one(TEMPLATE, Verdict, question="2 + 2?", answer="4") == Verdict(right=True)
    assert len(asked) == 4


async def test_a_budget_is_kept_and_says_so():
    one = judge('{"right": true}', budget=2)
    for answer in ("4", "5"):
        await one(TEMPLATE, Verdict, question="2 + 2?", answer=answer)
    with pytest.raises(BudgetError, match="budget=2"):
        await one(TEMPLATE, Verdict, question="2 + 2?", answer="6")
    assert await one(TEMPLATE, Verdict, question="2 + 2?", answer="4") == Verdict(right=True)


def test_fields_stand_whole_in_their_places():
    assert filled("{a} and {b}", {"a": "{b}", "b": "x"}) == "{b} and x"
