"""The group buffer: which groups are ready, and which of them a batch takes. Pure functions of the state."""

from palestra.algo.filters import is_zero_signal
from palestra.algo.shaping import LengthShaping
from palestra.core.records import RolloutRecord, Seat
from palestra.orchestrate.state import Group, GroupStatus, LoopState


def seat_reward(record: RolloutRecord, seat: Seat) -> float:
    """What this seat's advantage is computed from: the rollout's reward and, with several seats, the seat's own."""
    return record.reward + (sum(seat.rewards.values()) if len(record.seats) > 1 else 0.0)


def outcome(group: Group, *, drop_zero_signal: bool) -> str:
    """`ready`, or why a group whose members all ended never trains: `all_invalid`, `zero_signal`."""
    if not group.valid:
        return "all_invalid"
    if drop_zero_signal and all(is_zero_signal(rewards) for rewards in rewards_by_seat(group.valid).values()):
        return "zero_signal"
    return "ready"


def rewards_by_seat(records: list[RolloutRecord]) -> dict[str, list[float]]:
    """Rewards of each seat's rollouts, in the records' order."""
    rewards: dict[str, list[float]] = {}
    for record in records:
        for seat in record.seats:
            rewards.setdefault(seat.name, []).append(seat_reward(record, seat))
    return rewards


def shaped_by_seat(records: list[RolloutRecord], length: LengthShaping) -> dict[str, list[float]]:
    """Rewards of each seat's rollouts and what the seat's length takes off them: what advantages are computed from.

    Whether a group has signal is judged by the rewards alone, so that length never trains where the task does not.
    """
    rewards: dict[str, list[float]] = {}
    for record in records:
        for seat in record.seats:
            rewards.setdefault(seat.name, []).append(seat_reward(record, seat) + length_added(seat, length))
    return rewards


def length_added(seat: Seat, length: LengthShaping) -> float:
    return length.added_to_reward(sum(sum(sample.sampled) for sample in seat.samples))


def is_fresh(record: RolloutRecord, *, step: int, max_age: int) -> bool:
    """Whether a rollout may train at `step`: age = trainer version - its oldest version."""
    return bool(record.versions) and step - record.versions[0] <= max_age


def expired(state: LoopState, *, max_age: int) -> list[int]:
    """Ready groups no member of which may train at the next step."""
    return [
        group.group_id
        for group in _ready(state)
        if not any(is_fresh(record, step=state.next_step, max_age=max_age) for record in group.valid)
    ]


def take(state: LoopState, *, groups_per_step: int, window: int) -> list[Group] | None:
    """The next batch: ready groups in dispatch order, at most `window` past the oldest unfinished one; None if too few.

    The window keeps quick groups from overtaking slow ones for ever, which would select short rollouts.
    """
    oldest_open = min((g.group_id for g in state.groups.values() if g.status == GroupStatus.OPEN), default=None)
    allowed = [g for g in _ready(state) if oldest_open is None or g.group_id < oldest_open + max(window, 0)]
    return allowed[:groups_per_step] if len(allowed) >= groups_per_step else None


def _ready(state: LoopState) -> list[Group]:
    ready = [group for group in state.groups.values() if group.status == GroupStatus.READY]
    return sorted(ready, key=lambda group: group.group_id)
