"""Runs as files, for tests: rollouts of all kinds, and what a reader of their lines would find."""

import random
from dataclasses import dataclass
from pathlib import Path

import msgspec

from palestra.core.records import Ending, RolloutRecord, Sample, Seat, Span, Task, TurnSpan
from palestra.hub.queries import Where
from palestra.wire.rundir import RunDir

GROUP_SIZE = 4


def record(rollout_id: int, chance: random.Random, *, version: int = 0, **changes) -> RolloutRecord:
    ending = chance.choice(list(Ending))
    num_said = chance.randrange(0, 5)
    sample = Sample(
        token_ids=[1, 2, *range(3, 3 + num_said)],
        logprobs=[0.0, 0.0, *(-0.5 for _ in range(num_said))],
        sampled=[0, 0, *(1 for _ in range(num_said))],
        spans=(Span(version, 2, 2 + num_said),) if num_said else (),
        turns=(TurnSpan(0, 2, 2 + num_said),) if num_said else (),
    )
    made = RolloutRecord(
        rollout_id=rollout_id,
        environment=chance.choice(["calc", "words"]),
        task=Task(prompt="p", key=f"task {rollout_id // GROUP_SIZE % 3}"),
        ending=ending,
        reward=chance.choice([0.0, 0.1, 0.25, 0.5, 1.0]),
        seats=(Seat(samples=(sample,)),),
        messages=[{"role": "user", "content": "p"}, {"role": "assistant", "content": f"said by {rollout_id}"}],
        num_turns=chance.randrange(1, 4),
        num_tokens=num_said,
        error=chance.choice(["", "", "it broke\nat line 3", "it was late"]),
        wall_s=round(chance.random(), 2),
    )
    return msgspec.structs.replace(made, **changes)


def lines_of(records: list[RolloutRecord]) -> bytes:
    return b"".join(msgspec.json.encode(one) + b"\n" for one in records)


def write(run: RunDir, name: str, records: list[RolloutRecord]) -> Path:
    run.rollouts.mkdir(parents=True, exist_ok=True)
    path = run.rollouts / f"{name}.jsonl"
    path.write_bytes(lines_of(records))
    return path


def write_some(run: RunDir, *, seed: int = 0, steps: int = 4, rollouts: int = 16) -> None:
    """Steps and two evaluations. The last member of every other group trains a step later."""
    chance = random.Random(seed)
    late: list[RolloutRecord] = []
    for step in range(steps):
        ids = range(step * rollouts, (step + 1) * rollouts)
        made = [record(i, chance, version=max(step - chance.randrange(3), 0)) for i in ids]
        held = [one for one in made if one.rollout_id % (2 * GROUP_SIZE) == GROUP_SIZE - 1]
        write(run, f"step-{step:06d}", [one for one in made if one not in held] + late)
        late = held
    for version in (0, steps):
        write(run, f"eval-greedy-v{version:06d}", [record(i, chance, version=version) for i in range(6)])


@dataclass(frozen=True)
class Line:
    """A rollout as somebody finds it who reads every file from its first line to its last."""

    file: str
    line: int
    record: RolloutRecord

    @property
    def step(self) -> int:
        return int(self.file.rpartition("-")[2].removeprefix("v"))

    @property
    def is_training(self) -> bool:
        return self.file.startswith("step-")

    @property
    def age(self) -> int:
        return self.step - min(self.record.versions) if self.record.versions else -1

    @property
    def place(self) -> tuple:
        return (self.step, self.is_training, self.file)


def scan(run: RunDir) -> list[Line]:
    found = []
    for path in run.rollouts.glob("*.jsonl"):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
            found.append(Line(path.stem, number, msgspec.json.decode(line, type=RolloutRecord)))
    return found


def is_wanted(line: Line, where: Where) -> bool:
    """What the filter means, in other words than the index's."""
    of = line.record
    kind = "training" if line.is_training else "evaluation"
    error = (of.error.splitlines() or [""])[0]
    wanted = [
        where.kind in ("", kind),
        where.environment in ("", of.environment),
        where.ending in ("", of.ending.value),
        {"": True, "any": bool(error), "none": not error}.get(where.error, error == where.error),
        where.task in ("", of.task.key),
        where.group is None or (line.is_training and of.rollout_id // GROUP_SIZE == where.group),
    ]
    for value, name in ((of.reward, "reward"), (of.num_tokens, "tokens"), (line.step, "step"), (line.age, "age")):
        low, high = getattr(where, f"min_{name}"), getattr(where, f"max_{name}")
        wanted.append((low is None or value >= low) and (high is None or value <= high))
    return all(wanted)
