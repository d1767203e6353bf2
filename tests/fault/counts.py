"""What a run did with its finished rollouts, counted from its files alone, by other code than the loop's own.

Journal: every event of every attempt, in order. Batches: which rollouts the file of each step holds. Checkpoints: their
manifests. Witness: what processes noted down outside of the run directory.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from palestra.core.records import Ending, RolloutRecord
from palestra.orchestrate.state import (
    BatchShipped,
    Event,
    GroupClosed,
    GroupExpired,
    GroupOpened,
    Published,
    RolloutEnded,
)
from palestra.wire.framelog import read_frames
from palestra.wire.rundir import RunDir, read_manifests
from palestra.wire.runlog import read_metrics, read_restarts
from tests.fault.table import FILE, Table
from tests.fault.witness import Witness


@dataclass(frozen=True, kw_only=True)
class Counts:
    """`lost` and those done twice are rollouts, `went_back` engines whose version did; all are empty in a sound run."""

    finished: int
    trained: int
    lost: list[int]
    ended_twice: list[int]
    trained_twice: list[int]
    went_back: list[str]
    steps: list[int]  # trained, in the lineage of the last version
    final_version: int
    recovery_s: float | None = None


def read_events(run: RunDir) -> list[Event]:
    frames = [frame for path in sorted(run.journal.glob("*.frames")) for frame in read_frames(path)]
    return [msgspec.msgpack.decode(frame, type=Event) for frame in frames]


def lost(events: Iterable[Event], noted: Iterable[int], in_batches: dict[int, set[int]], *, max_age: int) -> list[int]:
    """Rollouts that were finished, by the journal or as `noted` beside it, and of which nothing came for no reason.

    A reason is: trained in the batch that names it, too old for it, invalid, its group dropped, expired or still open.
    """
    ended: dict[int, RolloutRecord] = {}
    groups: dict[int, GroupOpened] = {}
    settled: set[int] = set()  # groups that are dropped or expired
    shipped: dict[int, BatchShipped] = {}  # by group
    for event in events:
        match event:
            case GroupOpened():
                groups[event.group_id] = event
            case RolloutEnded():
                ended[event.record.rollout_id] = event.record
            case GroupClosed():
                ended |= {record.rollout_id: record for record in event.records}
                settled |= set() if event.outcome == "ready" else {event.group_id}
            case GroupExpired():
                settled.add(event.group_id)
            case BatchShipped():
                shipped |= dict.fromkeys(event.group_ids, event)
    group_of = {i: group.group_id for group in groups.values() for i in _members(group)}

    def has_a_fate(rollout_id: int) -> bool:
        if rollout_id not in ended or (group_id := group_of.get(rollout_id)) is None:
            return False
        if group_id not in shipped:
            return True  # dropped, or waiting in the state
        batch, record = shipped[group_id], ended[rollout_id]
        is_wanted = record.ending != Ending.INVALID and batch.step - min(record.versions, default=0) <= max_age
        is_trained = rollout_id in batch.rollout_ids and rollout_id in in_batches.get(batch.step, set())
        return is_trained or not is_wanted

    return sorted(rollout_id for rollout_id in {*ended, *noted} if not has_a_fate(rollout_id))


def _ended(events: Iterable[Event]) -> set[int]:
    """By the journal."""
    records = [event.record for event in events if isinstance(event, RolloutEnded)]
    records += [record for event in events if isinstance(event, GroupClosed) for record in event.records]
    return {record.rollout_id for record in records}


def _members(group: GroupOpened) -> range:
    return range(group.group_id * group.size, (group.group_id + 1) * group.size)


def ended_twice(events: Iterable[Event]) -> list[int]:
    return _repeated(event.record.rollout_id for event in events if isinstance(event, RolloutEnded))


def trained_twice(lineage: dict[int, Iterable[int]]) -> list[int]:
    """Rollouts in more than one step of what led to the last version."""
    return _repeated(rollout for rollouts in lineage.values() for rollout in rollouts)


def _repeated(ids: Iterable[int]) -> list[int]:
    return sorted(rollout_id for rollout_id, times in Counter(ids).items() if times > 1)


def lineage_of(trained: Sequence[tuple[int, Iterable[int]]]) -> dict[int, list[int]]:
    """Step -> rollouts, of all the steps trained in this order: what is trained again after a restart counts last."""
    return {step: list(rollouts) for step, rollouts in trained}


def went_back(served: Sequence[tuple[str, int]]) -> list[str]:
    """Engines that sampled with an older version than before."""
    by_engine: dict[str, list[int]] = {}
    for engine, version in served:
        by_engine.setdefault(engine, []).append(version)
    return [name for name, versions in by_engine.items() if any(one > two for one, two in pairwise(versions))]


def rollouts_in_batches(run: RunDir) -> dict[int, set[int]]:
    return {step: set(run.batches.read(step, attempt=10**9).rollout.tolist()) for step in run.batches.steps()}


def recovery_s(run: RunDir, witness: Witness) -> float | None:
    """From the last fault to the next step that no one had trained before it, and until every process is back.

    None, if there was nothing left to train and nobody to come back.
    """
    if not (fired := witness.read("fired")):
        return None
    trained, at = witness.read("trained"), fired[-1]["time"]
    before = {note["step"] for note in trained if note["time"] <= at}
    later = [note["time"] - at for note in trained if note["time"] > at and note["step"] not in before]
    gone = [restarted.gone_s for restarted in read_restarts(run) if restarted.gone_s is not None]
    return max([*later[:1], *gone], default=None)


def replayed(run: RunDir, model: Path, lr: float) -> Table:
    """The table after every batch of the run, each once, in order."""
    table = Table.load(model / FILE)
    for step in run.batches.steps():
        table = table.trained(run.batches.read(step, attempt=10**9), lr)
    return table


def count(run: RunDir, witness: Witness, *, max_age: int) -> Counts:
    events, batches = read_events(run), rollouts_in_batches(run)
    lineage = lineage_of([(note["step"], note["rollouts"]) for note in witness.read("trained")]) or {
        row["step"]: sorted(batches[row["step"]]) for row in read_metrics(run) if "phase" not in row
    }
    noted = [note["rollout"] for note in witness.read("ended")]
    in_training = {step: batches.get(step, set()) & set(rollouts) for step, rollouts in lineage.items()}
    served = [(note["engine"], int(note["version"])) for note in witness.read("served") if note["version"].isdigit()]
    served += [("the fleet", event.version) for event in events if isinstance(event, Published)]
    return Counts(
        finished=len({*noted, *_ended(events)}),  # a process may die between its journal and its note
        trained=sum(map(len, lineage.values())),
        lost=lost(events, noted, in_training, max_age=max_age),
        ended_twice=sorted({*ended_twice(events), *_repeated(noted)}),
        trained_twice=trained_twice(lineage),
        went_back=went_back(served),
        steps=sorted(lineage),
        final_version=max((manifest.version for manifest in read_manifests(run)), default=0),
        recovery_s=recovery_s(run, witness),
    )
