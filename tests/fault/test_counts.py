"""The counting itself: what is sound counts nothing, and every planted fault is found."""

import pytest

from palestra.core.records import Ending, Task
from palestra.orchestrate.state import BatchShipped, Event, GroupClosed, GroupExpired, GroupOpened, RolloutEnded
from tests.fault.counts import ended_twice, lineage_of, lost, trained_twice, went_back
from tests.unit.orchestrate.test_parts import record

MAX_AGE = 2


def opened(group_id: int) -> GroupOpened:
    return GroupOpened(group_id=group_id, source="e", task=Task(), size=2, cursor_epoch=0, cursor_taken=group_id + 1)


def ended(rollout_id: int, **more) -> RolloutEnded:
    return RolloutEnded(record=record(rollout_id, 1.0, **more))


def story() -> list[Event]:
    """Group 0 trains at step 3 but for a member that is too old, 1 is dropped, 2 expires, 3 is half done."""
    return [
        *map(opened, range(4)),
        ended(0, version=3),
        ended(1, version=0),
        GroupClosed(group_id=0, outcome="ready"),
        ended(2),
        ended(3, ending=Ending.INVALID),
        GroupClosed(group_id=1, outcome="zero_signal"),
        ended(4),
        ended(5),
        GroupClosed(group_id=2, outcome="ready"),
        GroupExpired(group_id=2),
        BatchShipped(step=3, group_ids=[0], rollout_ids=[0]),
        ended(6),
    ]


def test_in_a_sound_story_nothing_is_lost():
    assert lost(story(), range(7), {3: {0}}, max_age=MAX_AGE) == []
    assert ended_twice(story()) == []


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda events: events[:-1], [6]),  # noted as finished, and the journal knows nothing of it
        (lambda events: [opened(0), *events[2:]], [2, 3]),  # of a group that the journal does not know
        (lambda events: [event for event in events if not _ended(event, 0)], [0]),
        (lambda events: [_without(event) for event in events], [0]),  # left out of its batch for no reason
    ],
)
def test_a_planted_loss_is_found(plant, expected):
    assert lost(plant(story()), range(7), {3: {0}}, max_age=MAX_AGE) == expected


def _ended(event: Event, rollout_id: int) -> bool:
    return isinstance(event, RolloutEnded) and event.record.rollout_id == rollout_id


def _without(event: Event) -> Event:
    return BatchShipped(step=3, group_ids=[0], rollout_ids=[]) if isinstance(event, BatchShipped) else event


def test_a_rollout_that_its_batch_file_does_not_hold_is_lost():
    assert lost(story(), range(7), {3: set()}, max_age=MAX_AGE) == [0]
    assert lost(story(), range(7), {}, max_age=MAX_AGE) == [0]  # the step was never trained


def test_an_age_that_excuses_nothing():
    assert lost(story(), range(7), {3: {0}}, max_age=3) == [1]


def test_a_planted_second_ending_is_found():
    assert ended_twice([*story(), ended(4)]) == [4]


def test_what_is_trained_again_after_a_restart_counts_once_and_a_double_training_is_found():
    assert trained_twice(lineage_of([(0, [1, 2]), (1, [3]), (0, [1, 2]), (1, [3])])) == []
    assert trained_twice(lineage_of([(0, [1, 2]), (1, [3]), (1, [2, 3])])) == [2]


def test_a_version_that_goes_back_is_found():
    assert went_back([("engine-0", 0), ("engine-1", 0), ("engine-0", 1), ("engine-1", 0), ("engine-0", 1)]) == []
    assert went_back([("engine-0", 0), ("engine-1", 2), ("engine-0", 1), ("engine-1", 1)]) == ["engine-1"]
