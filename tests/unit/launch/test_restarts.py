"""When a process is started again, how soon, and what a storm is."""

import pytest

from palestra.launch.restarts import End, Limits, Lives


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def end(
    *, ready: bool = True, lived_s: float = 5.0, killed: bool = False, planned: bool = False, said: str = ""
) -> End:
    return End(
        why="exit code 1",
        ended_at=0.0,
        was_ready=ready,
        lived_s=lived_s,
        was_killed=killed,
        was_planned=planned,
        said=said,
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lives_of(clock: Clock, max_restarts: int = 4, window_s: float = 100) -> Lives:
    return Lives(Limits(max_restarts, window_s), clock)


def ends(lives: Lives, clock: Clock, one: End, *, after_s: float = 1.0) -> str | None:
    clock.now += after_s
    why_not = lives.ended(one)
    lives.begin_next()
    return why_not


def test_a_first_start_that_fails_is_not_tried_again_but_one_that_was_killed_is(clock: Clock):
    assert ends(lives_of(clock), clock, end(ready=False)) == ""
    assert ends(lives_of(clock), clock, end(ready=False, killed=True)) is None
    assert ends(lives_of(clock), clock, end()) is None


def test_two_starts_that_fail_in_a_row_are_a_storm(clock: Clock):
    lives = lives_of(clock)
    assert ends(lives, clock, end()) is None
    assert ends(lives, clock, end(ready=False)) is None
    assert ends(lives, clock, end()) is None, "it was ready in between"
    assert ends(lives, clock, end(ready=False)) is None
    assert ends(lives, clock, end(ready=False)) == "2 starts in a row failed"


def test_more_ends_than_allowed_within_the_window_are_a_storm(clock: Clock):
    lives = lives_of(clock)
    assert [ends(lives, clock, end(), after_s=20) for _ in range(4)] == [None] * 4
    assert ends(lives, clock, end(), after_s=20) == "5 ends within 100 s, launch.max_restarts=4"


def test_ends_that_are_planned_are_no_storm_and_are_allowed_where_no_restart_is(clock: Clock):
    lives = lives_of(clock, max_restarts=1)
    assert [ends(lives, clock, end(killed=True, planned=True)) for _ in range(40)] == [None] * 40
    assert lives.back_off_s == 0.5
    assert ends(lives, clock, end()) is None
    assert ends(lives, clock, end(killed=True, planned=True)) is None
    assert ends(lives, clock, end()) == "2 ends within 100 s, launch.max_restarts=1"
    assert ends(lives_of(clock, max_restarts=0), clock, end(killed=True, planned=True)) is None


def test_the_same_number_of_ends_over_a_longer_time_is_none(clock: Clock):
    lives = lives_of(clock)
    assert [ends(lives, clock, end(), after_s=26) for _ in range(40)] == [None] * 40


def test_the_same_error_four_times_in_a_row_is_a_storm_however_slow(clock: Clock):
    lives = lives_of(clock)
    assert ends(lives, clock, end(said="torn"), after_s=1e4) is None
    assert ends(lives, clock, end(said="full"), after_s=1e4) is None
    assert [ends(lives, clock, end(said="torn"), after_s=1e4) for _ in range(3)] == [None] * 3
    assert ends(lives, clock, end(said="torn"), after_s=1e4) == "the same error 4 times in a row"
    silent = lives_of(clock)
    assert [ends(silent, clock, end(), after_s=1e4) for _ in range(5)] == [None] * 5


def test_with_no_restarts_allowed_the_first_end_ends_the_run(clock: Clock):
    assert ends(lives_of(clock, max_restarts=0), clock, end(killed=True)) == ""


def test_back_off_doubles_to_a_cap_and_starts_again_after_a_long_life(clock: Clock):
    lives = lives_of(clock, max_restarts=100)
    waits = []
    for _ in range(8):
        ends(lives, clock, end())
        waits.append(lives.back_off_s)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    ends(lives, clock, end(lived_s=60))
    assert lives.back_off_s == 0.5
    ends(lives, clock, end(lived_s=59))
    assert lives.back_off_s == 1


def test_back_off_starts_again_after_a_kill_at_work_but_not_in_a_start(clock: Clock):
    lives = lives_of(clock, max_restarts=100)
    for _ in range(3):
        ends(lives, clock, end())
    assert lives.back_off_s == 2
    ends(lives, clock, end(killed=True))
    assert lives.back_off_s == 0.5
    ends(lives, clock, end(ready=False, killed=True))
    assert lives.back_off_s == 1
