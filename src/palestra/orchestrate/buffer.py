"""The group buffer: which groups are ready, and which of them a batch takes. Pure functions of the state."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from palestra.algo.filters import is_zero_signal
from palestra.algo.shaping import LengthShaping
from palestra.core.records import RolloutRecord, Seat
from palestra.orchestrate.state import CUT, Group, GroupStatus, LoopState


def seat_reward(record: RolloutRecord, seat: Seat) -> float:
    """What this seat's advantage is computed from: the rollout's reward and, with several seats, the seat's own."""
    return record.reward + (sum(seat.rewards.values()) if len(record.seats) > 1 else 0.0)


def seat_rewards(record: RolloutRecord) -> dict[str, float]:
    """By seat, where several train: in self-play they differ, and the rollout's own reward says nothing."""
    return {seat.name: seat_reward(record, seat) for seat in record.seats} if len(record.seats) > 1 else {}


def outcome(group: Group, *, drop_zero_signal: bool) -> str:
    """`ready`, or why a group whose members all ended never trains: `too_old`, `all_invalid`, `zero_signal`.

    Whether there is signal is judged by the rewards alone, so that length never trains where the task does not.
    """
    if not group.valid:
        return "too_old" if any(record.error == CUT for record in group.records.values()) else "all_invalid"
    if drop_zero_signal and all(is_zero_signal(list(of.values())) for of in returns(group.valid).values()):
        return "zero_signal"
    return "ready"


class Part(NamedTuple):
    """What has an advantage of its own: a seat; one turn of a seat that was given credit by turn; or what is left of
    the turn behind its first `cuts` pieces that were given credit."""

    seat: str
    turn: int | None = None
    cuts: int = 0

    @property
    def key(self) -> str:
        if self.turn is None:
            return self.seat
        return f"{self.seat}@{self.turn}.{self.cuts}" if self.cuts else f"{self.seat}@{self.turn}"


def credited(records: Iterable[RolloutRecord]) -> set[str]:
    """Seats that were given credit by turn in any of them."""
    return {seat.name for record in records for seat in record.seats if seat.credits}


def returns(
    records: list[RolloutRecord], length: LengthShaping | None = None, *, by_turn: Collection[str] | None = None
) -> dict[Part, dict[int, float]]:
    """Part -> rollout -> what its advantage is computed from: the seat's reward and what its length takes off it.

    Of seats in `by_turn` (by default, those that any of the records credits by turn) each turn is a part too. Its
    return is without what earlier turns earned, which it did not bring about; it is compared with that of the same turn
    in the others. So are parts of a turn: behind as many pieces with credit in the others, or all that these have.
    """
    by_turn = credited(records) if by_turn is None else by_turn
    most_cuts = _most_cuts(records)
    found: dict[Part, dict[int, float]] = {}
    for record in records:
        for seat in record.seats:
            total = seat_reward(record, seat) + (length_added(seat, length) if length is not None else 0.0)
            found.setdefault(Part(seat.name), {})[record.rollout_id] = total
            turns = {span.turn for sample in seat.samples for span in sample.turns} if seat.name in by_turn else set()
            for turn in turns:
                before = sum(amount for earned, amount in seat.credits.items() if earned < turn)
                of_cuts = list(seat.cuts(turn).values())
                for cuts in range(most_cuts.get((seat.name, turn), 0) + 1):
                    left = total - before - sum(of_cuts[:cuts])
                    found.setdefault(Part(seat.name, turn, cuts), {})[record.rollout_id] = left
    return found


def _most_cuts(records: Iterable[RolloutRecord]) -> dict[tuple[str, int], int]:
    """By seat and turn, over the records."""
    found: dict[tuple[str, int], int] = {}
    for seat in (seat for record in records for seat in record.seats):
        for turn in {piece.turn for piece in seat.piece_credits}:
            found[seat.name, turn] = max(found.get((seat.name, turn), 0), len(seat.cuts(turn)))
    return found


def length_added(seat: Seat, length: LengthShaping) -> float:
    return length.added_to_reward(sum(sum(sample.sampled) for sample in seat.samples))


def is_fresh(record: RolloutRecord, *, step: int, max_age: int) -> bool:
    """Whether a rollout may train at `step`: age = trainer version - its oldest version."""
    return bool(record.versions) and step - record.versions[0] <= max_age


def expired(state: LoopState, *, max_age: int) -> list[int]:
    """Groups whose members have all ended and of which nothing that is left may train at the next step."""
    return [
        group.group_id
        for group in state.groups.values()
        if group.status in (GroupStatus.READY, GroupStatus.LATE)
        and group.all_ended
        and not _has_fresh(group, state.next_step, max_age)
    ]


def take(state: LoopState, *, groups_per_step: int, window: int, max_age: int) -> list[Group] | None:
    """The next batch: groups of which all that ended may train, in dispatch order, at most `window` past the oldest
    open one; None if too few. Behind them come groups that trained before, with members that ended since.

    The window keeps quick groups from overtaking slow ones for ever, which would select short rollouts.
    """
    oldest_open = min((g.group_id for g in _of(state, GroupStatus.OPEN)), default=None)
    allowed = [
        group
        for group in _of(state, GroupStatus.READY, GroupStatus.PARTED)
        if oldest_open is None or group.group_id < oldest_open + max(window, 0)
    ]
    fresh = [group for group in allowed if _has_fresh(group, state.next_step, max_age)]
    if len(fresh) < groups_per_step:
        return None
    late = [group for group in _of(state, GroupStatus.LATE) if _has_fresh(group, state.next_step, max_age)]
    return fresh[:groups_per_step] + late


def num_nearly_ready(state: LoopState) -> int:
    """Groups at least half of whose members have ended, and that no batch has taken yet."""
    return sum(
        group.status is not GroupStatus.LATE and 2 * len(group.records) >= group.size for group in state.groups.values()
    )


def may_part(group: Group, *, drop_zero_signal: bool) -> bool:
    """Whether the members of an open group that ended may train without the others: at least half of it, with signal.

    Group rewards need the whole group.
    """
    is_half = 2 * len(group.valid) >= group.size
    is_open = group.status is GroupStatus.OPEN and not group.has_group_rewards
    return is_open and is_half and outcome(group, drop_zero_signal=drop_zero_signal) == "ready"


def last_chances(state: LoopState, *, before: int, max_age: int) -> list[Group]:
    """Open groups older than group `before` with members that can train at the next step and never after it."""
    last = max_age - 1
    return [
        group
        for group in _of(state, GroupStatus.OPEN)
        if group.group_id < before
        and any(
            is_fresh(record, step=state.next_step, max_age=max_age)
            and not is_fresh(record, step=state.next_step, max_age=last)
            for record in group.valid
        )
    ]


def too_old_in_flight(state: LoopState, rollout_ids: Iterable[int], *, max_age: int) -> list[int]:
    """Those of `rollout_ids`, all in flight, whose first tokens are past the age bound: they can never train."""
    oldest = {rollout_id: state.oldest_version(rollout_id) for rollout_id in rollout_ids}
    return [i for i, version in oldest.items() if version is not None and state.next_step - version > max_age]


def _has_fresh(group: Group, step: int, max_age: int) -> bool:
    return any(is_fresh(record, step=step, max_age=max_age) for record in group.unsettled)


def _of(state: LoopState, *statuses: GroupStatus) -> list[Group]:
    return sorted((g for g in state.groups.values() if g.status in statuses), key=lambda group: group.group_id)
