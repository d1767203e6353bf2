"""bfcl: calls that are right and wrong by hand, in one turn and in many; its data, its splits; what is refused."""

import copy
import json

import palestra_bfcl.data
import pytest
from hypothesis import given, settings
from palestra_bfcl import FunctionCalling, many_messages, place
from palestra_bfcl.answers import fits, gold, is_right
from palestra_bfcl.data import CATEGORIES, called, chosen, folder, rows, told
from palestra_bfcl.world import World, contains, written_call

from palestra.core.errors import UserError
from palestra.core.records import Ending
from palestra.env.check import gold_script
from palestra.env.play import score
from tests.unit.environments.laws import ODD_REPLIES, some_tasks

WEATHER = told(
    {
        "name": "weather.get",
        "description": "Tell the weather.",
        "parameters": {
            "type": "dict",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "limits": {"type": "tuple", "items": {"type": "float"}},
                "place": {"type": "dict", "properties": {"zip": {"type": "any"}}},
            },
            "required": ["city"],
        },
    }
)
ANSWER = [{"weather.get": {"city": ["New York, NY", "NYC"], "days": [3, ""], "limits": ["", [1.5, 2]]}}]


def is_weather(*calls) -> bool:
    return is_right([("weather_get", arguments) for arguments in calls], ANSWER, [WEATHER])


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "NYC"},
        {"city": "new york ny", "days": 3},
        {"city": "NYC", "days": 3, "limits": [1.5, 2.0]},
    ],
)
def test_any_accepted_value_is_right(arguments):
    assert is_weather(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"days": 3},  # without what is required
        {"city": "Boston"},
        {"city": ["NYC"]},
        {"city": None},
        {"city": "NYC", "days": 4},
        {"city": "NYC", "days": "3"},
        {"city": "NYC", "days": 3.0},  # declared as a whole number
        {"city": "NYC", "days": True},
        {"city": "NYC", "limits": [2, 1.5]},
        {"city": "NYC", "limits": [1.5]},
        {"city": "NYC", "place": {"zip": "10001"}},  # declared, and not asked for
        {"city": "NYC", "unit": "C"},
        '{"city": "NYC"}',
        None,
    ],
)
def test_everything_else_is_wrong(arguments):
    assert not is_weather(arguments)


def test_calls_are_counted_and_named():
    right = {"city": "NYC"}
    assert not is_weather()
    assert not is_weather(right, right)
    assert not is_right([("weather", right)], ANSWER, [WEATHER])
    assert not is_right([("weather.get", right)], ANSWER, [WEATHER])  # it was offered as weather_get


def test_parallel_calls_have_no_order_and_each_is_made_once():
    answer = [{"weather.get": {"city": ["A", "B"]}}, {"weather.get": {"city": ["A"]}}]
    a, b, c = [("weather_get", {"city": city}) for city in "ABC"]
    assert is_right([a, b], answer, [WEATHER])
    assert is_right([b, a], answer, [WEATHER])
    assert is_right([a, a], answer, [WEATHER])
    assert not is_right([b, b], answer, [WEATHER])
    assert not is_right([a, c], answer, [WEATHER])
    assert not is_right([a], answer, [WEATHER])


@pytest.mark.parametrize(
    ("value", "accepted", "is_same"),
    [
        ("Apr-1, 2024", "april 1 2024", False),
        ("April 1,2024", "april-1.2024", True),
        ("it's", 'it"s', True),
        (1, True, False),
        (True, 1, False),
        (None, None, True),
        (None, "", False),
        (2.0, 2, True),
        ({"a": 1}, {"a": [1, 2], "b": ["", 3]}, True),
        ({"a": 2, "b": 3}, {"a": [1, 2], "b": ["", 3]}, True),
        ({"b": 3}, {"a": [1, 2], "b": ["", 3]}, False),
        ({"a": 1, "c": 1}, {"a": [1]}, False),
        ([{"a": "X"}], [{"a": ["x"]}], True),
        ([{"a": "X"}, {"a": "X"}], [{"a": ["x"]}], False),
        ({"at": {"x": 1}}, {"at": [{"x": 1}]}, True),
        ("[1]", [1], False),
    ],
)
def test_values_by_hand(value, accepted, is_same):
    assert fits(value, accepted) == is_same


def test_gold_leaves_out_what_may_be():
    assert gold(ANSWER, [WEATHER]) == [("weather_get", {"city": "New York, NY"})]


def test_declarations_become_json_schemas():
    assert WEATHER["name"] == "weather_get"
    assert WEATHER["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "limits": {"type": "array", "items": {"type": "number"}},
            "place": {"type": "object", "properties": {"zip": {"type": "string"}}},
        },
        "required": ["city"],
    }
    assert called("a.b c" + "d" * 80) == "a_b_c" + "d" * 59


# --- with the data


async def test_the_first_question_by_hand():
    environment = FunctionCalling(split="test", categories="simple")
    [task] = [task for task in environment.tasks() if task.key == "simple_python_0"]
    assert task.prompt == [
        {"role": "user", "content": "Find the area of a triangle with a base of 10 units and height of 5 units."}
    ]
    right = {"base": 10, "height": 5}
    for arguments, earned in [(right, 1), (right | {"unit": "Units"}, 1), ({"base": 5, "height": 10}, 0), ({}, 0)]:
        record = await score(environment, task, [{"calls": [("calculate_triangle_area", arguments)]}])
        assert (record.ending, record.rewards) == (Ending.OK, {"correct": earned}), arguments
    assert (await score(environment, task, ["The area is 25."])).reward == 0
    assert (await score(environment, task, [])).rewards == {"correct": 0}
    tool = record.tools[0]["function"]
    assert (tool["name"], tool["parameters"]["type"]) == ("calculate_triangle_area", "object")


COUNTS = {"simple_python": 400, "parallel_multiple": 200, "live_multiple": 1053, "live_irrelevance": 884}


def test_all_rows_are_there():
    assert {category: len(rows(category)) for category in COUNTS} == COUNTS
    assert sum(len(rows(category)) for category in CATEGORIES) == 4441


@pytest.mark.parametrize("category", [category for category in CATEGORIES if category != "live_relevance"])
async def test_gold_earns_one_and_no_call_nothing(category):
    environment = FunctionCalling(split="test", categories=category)
    num_tasks = 8 if category.startswith("multi_turn") else 40
    is_declining = "irrelevance" in category
    for task in some_tasks(FunctionCalling, num_tasks, split="test", categories=category):
        if task.gold is not None:
            record = await score(environment, task, gold_script(environment, task))
            assert (record.ending, record.reward) == (Ending.OK, 1.0), (task.key, record.error)
        record = await score(environment, task, ["I can not."] * 20)
        assert (record.ending, record.reward) == (Ending.OK, float(is_declining)), (task.key, record.error)


@pytest.mark.slow
async def test_all_gold_earns_one():
    """What has none is as the README says."""
    without = set()
    for category in CATEGORIES:
        environment = FunctionCalling(split="test", categories=category)
        for task in environment.tasks():
            if task.gold is None:
                without.add(task.key)
            else:
                record = await score(environment, task, gold_script(environment, task))
                assert record.reward == 1, (task.key, record.error)
    assert {key for key in without if not key.startswith("live_relevance")} == {
        "live_simple_106-63-0",
        "live_simple_112-68-0",
        "live_multiple_862-181-3",
        "live_multiple_964-207-0",
        "multi_turn_miss_func_49",
    }


async def test_relevance_takes_any_call_of_a_function_that_is_there():
    environment = FunctionCalling(split="test", categories="live_relevance")
    [task] = some_tasks(FunctionCalling, 1, split="test", categories="live_relevance")
    name = task.info["functions"][0]["name"]
    for call, earned in [((name, {}), 1), (("no_such", {}), 0), ((name, "{"), 0)]:
        assert (await score(environment, task, [{"calls": [call]}])).reward == earned


@settings(max_examples=30, deadline=None)
@given(ODD_REPLIES)
async def test_every_reply_is_scored(text):
    for categories in ("multiple", "multi_turn_base"):
        environment = FunctionCalling(split="test", categories=categories)
        [task] = some_tasks(FunctionCalling, 1, split="test", categories=categories)
        name = task.info["functions"][0]["name"]
        for reply in (text, {"calls": [(name, text)]}, {"calls": [(name, {text: text})]}, {"calls": [(text, {})]}):
            record = await score(environment, task, [reply, text])
            assert record.ending != Ending.INVALID, record.error
            assert record.reward == 0


# --- many messages

FILES = {
    "GorillaFileSystem": {
        "root": {"home": {"type": "directory", "contents": {"a.txt": {"type": "file", "content": "x"}}}}
    }
}


def scenario(**changes):
    row = {
        "id": "multi_turn_base_1",
        "category": "multi_turn_base",
        "question": [[{"role": "user", "content": "Make b."}], [{"role": "user", "content": "What is in a.txt?"}]],
        "initial_config": FILES,
        "involved_classes": ["GorillaFileSystem"],
        "answer": [["mkdir('b')"], ["cat(file_name='a.txt')"]],
    }
    return many_messages(row | changes)


MAKE, LOOK, LIST = ("mkdir", {"dir_name": "b"}), ("cat", {"file_name": "a.txt"}), ("ls", {})


@pytest.mark.parametrize(
    ("script", "earned"),
    [
        ([{"calls": [MAKE]}, "Made.", {"calls": [LOOK]}, "x"], 1),
        ([{"calls": [LIST]}, {"calls": [MAKE]}, "", {"calls": [LIST, LOOK]}, ""], 1),  # looking about is no mistake
        ([{"calls": [MAKE, LOOK]}, "", {"calls": [LIST]}, ""], 1),  # the result of `cat` was there before
        ([{"calls": [MAKE, LOOK]}, "", "It is x."], 0),  # but a message without any call is not done
        (["Made.", {"calls": [MAKE, LOOK]}, "x"], 0),
        ([{"calls": [("mkdir", {"dir_name": "c"})]}, "", {"calls": [LOOK]}, "x"], 0),  # another state
        ([{"calls": [MAKE]}, "", {"calls": [("rm", {"file_name": "a.txt"})]}, ""], 0),
        ([{"calls": [MAKE]}, "", {"calls": [("cat", {"file_name": "b.txt"})]}, ""], 0),  # another result
        ([{"calls": [MAKE]}, *[{"calls": [LIST]}] * 20, "", {"calls": [LOOK]}, ""], 0),  # too many replies with calls
        ([{"calls": [MAKE]}, *[{"calls": [LIST]}] * 19, "", {"calls": [LOOK]}, ""], 1),
    ],
)
async def test_messages_by_hand(script, earned):
    record = await score(FunctionCalling(categories="multi_turn"), scenario(), script)
    assert (record.ending, record.rewards) == (Ending.OK, {"correct": earned}), record.error


async def test_the_first_message_that_is_not_done_ends_the_rollout():
    record = await score(FunctionCalling(), scenario(), ["No.", "never said"])
    assert (record.reward, record.num_turns) == (0, 1)


async def test_missing_functions_come_with_a_message():
    task = scenario(
        category="multi_turn_miss_func",
        question=[[{"role": "user", "content": "Make b."}], [], [{"role": "user", "content": "What is in a.txt?"}]],
        answer=[[], ["mkdir('b')"], ["cat('a.txt')"]],
        missed_function={"1": ["mkdir"]},
    )
    names = {function["name"] for function in task.info["functions"]}
    assert {"cat", "ls"} <= names
    assert "mkdir" not in names
    [announced] = task.info["messages"][1]
    assert json.loads(announced["content"].splitlines()[1])["name"] == "mkdir"
    early = [{"calls": [MAKE]}, "I have no such function."]  # refused, and so nothing is done
    record = await score(FunctionCalling(), task, [*early, {"calls": [MAKE]}, "", {"calls": [LOOK]}, ""])
    assert (record.reward, record.metrics) == (1, {"tool_calls": 3.0, "tool_errors": 1.0})
    assert (await score(FunctionCalling(), task, task.gold)).reward == 1


async def test_what_apis_do_to_arguments_stays_with_them():
    """Posts keep the list they are given, and `mention` adds to it."""
    [row] = [row for row in rows("multi_turn_base") if row["id"] == "multi_turn_base_90"]
    task = many_messages(row)
    answer = copy.deepcopy(task.answer)
    for _ in range(2):
        record = await score(FunctionCalling(), task, task.gold)
        assert record.reward == 1
    assert task.answer == answer


async def test_a_world_has_its_own_state():
    one, other = (World(["GorillaFileSystem", "MathAPI"], FILES, is_long=False) for _ in range(2))
    assert one.state() == other.state()
    assert await one.call("mkdir", {"dir_name": "b"}) == "None"
    assert one.state() != other.state()
    assert await one.call("add", {"a": 1, "b": 2}) == '{"result": 3}'
    assert (await one.call("_load_scenario", {})).startswith("Error during execution: name '_load_scenario'")
    assert (await one.call("add", {"a": 1})).startswith("Error during execution: ")
    assert len(one.results) == 4


@pytest.mark.slow
async def test_arithmetic_that_would_take_for_ever_does_not():
    world = World(["MathAPI"], {}, is_long=False)
    assert "used more than 2 s of CPU" in await world.call("power", {"base": 3, "exponent": 10**9})


def test_results_are_contained_as_often_as_wanted():
    assert contains(["a", "b", "a"], ["a", "a"])
    assert not contains(["a", "b"], ["a", "a"])
    assert contains([], [])


def test_calls_of_the_benchmark_are_read():
    functions = [{"name": "sort", "parameters": {"properties": {"file_name": {}, "order": {}}}}]
    assert written_call("sort('a', order=-1)", functions) == ("sort", {"file_name": "a", "order": -1})


# --- splits, arguments


def test_the_benchmark_is_for_testing_unless_asked_otherwise():
    assert not some_tasks(FunctionCalling)
    split = {
        name: {task.key for task in FunctionCalling(split=name, train_share=0.3, categories="multi_turn").tasks()}
        for name in ("train", "test")
    }
    assert not split["train"] & split["test"]
    assert len(split["train"] | split["test"]) == 800
    assert 150 < len(split["train"]) < 330
    scenarios = {name: {key.rsplit("_", 1)[1] for key in keys} for name, keys in split.items()}
    assert not scenarios["train"] & scenarios["test"]


def test_tasks_are_shuffled_by_seed():
    one, again, other = (
        [task.key for task in some_tasks(FunctionCalling, 50, split="test", seed=seed)] for seed in (1, 1, 2)
    )
    assert one == again != other
    assert 0 <= place("simple_python_0") < 1
    assert place("multi_turn_base_7") == place("multi_turn_miss_func_7") != place("multi_turn_base_8")


def test_groups_are_written_out():
    assert chosen("simple") == ["simple_python"]
    assert chosen(["multi_turn", "multi_turn_base"]) == [name for name in CATEGORIES if name.startswith("multi_turn")]
    assert set(chosen(["live", "non_live", "multi_turn"])) == set(CATEGORIES)


@pytest.mark.parametrize(
    ("categories", "words"),
    [("memory", "names 'memory'; there are simple_python, .* and the groups simple"), ([], "is empty; name at least")],
)
def test_categories_that_there_are_not_are_refused(categories, words):
    with pytest.raises(UserError, match=words):
        FunctionCalling(categories=categories)


def test_without_the_data_the_way_to_it_is_told(monkeypatch):
    folder.cache_clear()
    monkeypatch.setattr(palestra_bfcl.data.importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(UserError, match="pip install --no-deps bfcl-eval=="):
            folder()
    finally:
        folder.cache_clear()
