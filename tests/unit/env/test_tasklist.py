"""Tasks as the wire carries them."""

import itertools

import msgspec
import pytest

from palestra.core.records import Task
from palestra.env import Environment
from palestra.env.tasklist import TaskList, as_sent


class Numbers(Environment):
    size: int = 10
    made: list[int] = []  # how often tasks() was begun, over all instances

    def tasks(self):
        Numbers.made.append(self.seed)
        for i in range(self.size) if self.size else itertools.count():
            yield Task(prompt=f"{self.seed}/{i}", info={"pair": (i, i)})


def listed(size: int = 10) -> TaskList:
    Numbers.made.clear()
    return TaskList(lambda epoch: Numbers(size=size, seed=epoch))


def prompts(taken) -> list[str]:
    return [task.prompt for task in taken[0]]


def test_chunks_follow_each_other_and_say_when_there_are_no_more():
    tasks = listed()
    first, second, third = tasks.take(0, 0, 4), tasks.take(0, 4, 4), tasks.take(0, 8, 4)
    assert prompts(first) + prompts(second) + prompts(third) == [f"0/{i}" for i in range(10)]
    assert [first[1], second[1], third[1]] == [False, False, True]
    assert tasks.take(0, 10, 4) == ([], True)
    assert Numbers.made == [0]  # read once


def test_going_back_or_to_another_epoch_reads_anew_and_skipping_ahead_does_not():
    tasks = listed()
    assert prompts(tasks.take(0, 6, 2)) == ["0/6", "0/7"]
    assert prompts(tasks.take(0, 1, 2)) == ["0/1", "0/2"]
    assert prompts(tasks.take(3, 0, 1)) == ["3/0"]
    assert prompts(tasks.take(4, 0, 1)) == ["4/0"]
    assert tasks.take(0, 50, 2) == ([], True)
    assert Numbers.made == [0, 0, 3, 4, 0]


def test_tasks_that_come_again_do_not_cost_the_place_of_those_that_are_new():
    tasks = listed(size=0)
    for i in range(20):
        assert prompts(tasks.take(0, 1000 + 2 * i, 2)) == [f"0/{1000 + 2 * i}", f"0/{1001 + 2 * i}"]
        assert prompts(tasks.take(0, 30 * i, 1)) == [f"0/{30 * i}"]  # further on each time
    assert Numbers.made == [0, 0]
    assert prompts(tasks.take(0, 5, 1)) == ["0/5"]
    assert prompts(tasks.take(0, 1040, 1)) == ["0/1040"]
    assert Numbers.made == [0, 0, 0]  # the one that is far ahead kept its place


def test_endless_tasks_are_taken_bit_by_bit():
    tasks = listed(size=0)
    assert prompts(tasks.take(0, 1000, 2)) == ["0/1000", "0/1001"]


def test_after_a_task_that_cannot_be_sent_the_others_keep_their_places():
    """The planted fault: a reader that moved and does not say so gives tasks further on."""

    class Holed(Numbers):
        def tasks(self):
            for i, task in enumerate(super().tasks()):
                yield Task(answer=object()) if i == 2 else task

    tasks = TaskList(lambda epoch: Holed(seed=epoch))
    with pytest.raises(TypeError, match="task 2 "):
        tasks.take(0, 0, 4)
    assert prompts(tasks.take(0, 3, 2)) == ["0/3", "0/4"]
    assert prompts(tasks.take(0, 0, 2)) == ["0/0", "0/1"]
    with pytest.raises(TypeError, match="task 2 "):
        tasks.take(0, 2, 1)


def test_tasks_are_what_the_other_side_will_see():
    [task], _ = listed().take(0, 3, 1)
    assert task.info == {"pair": [3, 3]}  # no tuples on the wire
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(task), type=Task) == task


def test_keys_follow_the_content():
    one = as_sent(Task(prompt="p", info={"a": 1, "b": 2}), 0)
    again = as_sent(Task(prompt="p", info={"b": 2, "a": 1}), 9)
    assert one.key == again.key
    assert len(one.key) == 16
    assert one.key != as_sent(Task(prompt="p", info={"a": 1, "b": 3}), 0).key
    assert as_sent(Task(prompt="p", key="mine"), 0).key == "mine"


@pytest.mark.parametrize("task", ["text", Task(answer=object()), Task(info={1: 2}), Task(prompt=3)])  # pyright: ignore[reportArgumentType]
def test_what_cannot_be_sent_is_named(task):
    with pytest.raises(TypeError, match="task 7 "):
        as_sent(task, 7)
