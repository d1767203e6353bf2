"""Where the time of a run went: seconds by process and cause, and the bottleneck in words."""

from collections.abc import Iterable, Sequence
from typing import Any

from palestra.core.ledger import LedgerEntry, total

_OUTSIDE_THE_LOOP = frozenset({"start", "load", "warmup", "export", "wait_for_weights", "restart"})
_WAIT = "wait_for_batch"
_NOTABLE = 0.05


def account(entries: Iterable[LedgerEntry]) -> list[LedgerEntry]:
    """One entry per process, in order of their names; parts from the largest to the smallest."""
    of_process: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        of_process.setdefault(entry.process, []).append(entry)
    return [total(of_process[name]) for name in sorted(of_process)]


def as_dict(process: LedgerEntry) -> dict[str, Any]:
    return {
        "process": process.process,
        "wall_s": process.wall_s,
        "parts_s": dict(by_size(process)),
        "shares": {cause: share_of(seconds, process.wall_s) for cause, seconds in by_size(process)},
        "closure": process.closure,
    }


def bottleneck(entries: Iterable[LedgerEntry], *, is_rl: bool) -> str:
    """What held the run up, and what to change. Entries with a start, warm-up, export or restart do not count."""
    loop = [entry for entry in entries if not _OUTSIDE_THE_LOOP & entry.parts_s.keys()]
    trainer = [entry for entry in loop if entry.process.startswith("trainer")]
    if not trainer:
        return "no step has been accounted for yet"
    waited = _part(trainer, _WAIT)
    if not is_rl:
        return _supervised_bottleneck(trainer)
    engines = [entry for entry in loop if entry.process.startswith("engine")]
    return f"{_loop_bottleneck(waited, _part(engines, 'idle'))}{_publish_note(engines)}"


def _loop_bottleneck(waited: float, idle: float) -> str:
    if max(waited, idle) < _NOTABLE:
        return f"no bottleneck: the trainer waited {waited:.0%} for batches and the engines idled {idle:.0%}"
    if waited < idle:
        return (
            f"the engines idled {idle:.0%} and the trainer waited {waited:.0%} for batches: training is the bottleneck;"
            " add trainer ranks (train.replicate, train.shard) or threads (train.threads), or take fewer engines"
        )
    if idle >= _NOTABLE:
        return (
            f"the trainer waited {waited:.0%} for batches while the engines idled {idle:.0%}: rollouts are held up "
            "outside the engines; raise algo.pace_age or engine.max_in_flight, add env.workers, or find slow rewards"
        )
    return (
        f"the trainer waited {waited:.0%} for batches: generation is the bottleneck; add engines (engine.replicas) or "
        "engine threads (engine.threads), or lower sampling.max_tokens"
    )


def _supervised_bottleneck(trainer: Sequence[LedgerEntry]) -> str:
    read = _part(trainer, "read_batch")
    if read >= _NOTABLE:
        return (
            f"the trainer spent {read:.0%} on reading data: that is the bottleneck; give files that are faster to read"
        )
    cause = max({cause for entry in trainer for cause in entry.parts_s}, key=lambda cause: _part(trainer, cause))
    share = _part(trainer, cause)
    return f"no bottleneck outside the trainer: {read:.0%} went into reading data, {share:.0%} into {cause}"


def _publish_note(engines: Sequence[LedgerEntry]) -> str:
    share = _part(engines, "publish")
    return f". Publishing stopped the engines {share:.0%} of the time; raise sync.every" if share >= _NOTABLE else ""


def _part(entries: Sequence[LedgerEntry], cause: str) -> float:
    """Share of `cause` in the wall of all entries."""
    wall_s = sum(entry.wall_s for entry in entries)
    return share_of(sum(entry.parts_s.get(cause, 0.0) for entry in entries), wall_s)


def by_size(process: LedgerEntry) -> list[tuple[str, float]]:
    return sorted(process.parts_s.items(), key=lambda part: -part[1])


def share_of(seconds: float, of_s: float) -> float:
    return seconds / of_s if of_s else 0.0
