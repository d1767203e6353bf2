"""Tasks of reasoning-gym's generators, scored by their own verifiers."""

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import msgspec
from reasoning_gym.factory import DATASETS, create_dataset

from palestra.core.errors import UserError
from palestra.env import Environment, Rollout, Task, TooSlowError, aside, metric, reward, xml
from palestra_reasoning_gym.harmless import is_harmless
from palestra_reasoning_gym.strict import may_be_right

IN_TAGS = "Answer the question. Write the final answer, and only that, inside <answer> and </answer>."
PLAIN = "Answer the question with the final answer, and nothing else."
NO_ANSWER = "keeps no answer of its own"
UNUSABLE = {
    "boxnet": NO_ANSWER,
    "graph_color": NO_ANSWER,
    "propositional_logic": NO_ANSWER,
    "rubiks_cube": NO_ANSWER,
    "rush_hour": NO_ANSWER,
    "composite": "mixes generators itself; name several generators instead",
}

LONGEST = 20_000  # characters of an answer; golds are far shorter
LOOK_AT_MOST = 20  # entries for one task: a fifth of them is held out


class ReasoningGym(Environment):
    """`generators` take turns; each gives `size` tasks an epoch. A fifth of all questions is held out for `test`.

    With `tags` the answer stands inside <answer> tags; otherwise it is the whole reply, for models too small for tags.
    """

    generators: str | list[str]
    size: int = 1000
    config: dict[str, Any] = {}
    tags: bool = True
    max_turns = 1
    checked_with = ({"generators": ["leg_counting", "chain_sum"]}, {"generators": "spell_backward", "tags": False})

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.system = self.system or (IN_TAGS if self.tags else PLAIN)
        self._names = usable(self.generators)

    def tasks(self) -> Iterator[Task]:
        streams = [self._tasks_of(name) for name in self._names]
        for together in zip_longest(*streams):
            yield from (task for task in together if task is not None)

    def _tasks_of(self, name: str) -> Iterator[Task]:
        """Fewer than `size`, if too few of the generator's questions belong to the split."""
        config = msgspec.json.encode(self.config, order="sorted").decode()
        num_entries = LOOK_AT_MOST * self.size
        found = 0
        for index in range(num_entries):
            entry = make_entry(name, config, self.seed, num_entries, index)
            if not is_harmless(name, entry["answer"]):
                continue  # an integral that the generator could not solve
            if is_held_out(entry["question"]) == (self.split != "train"):
                place = {"generator": name, "config": config, "seed": self.seed, "size": num_entries, "index": index}
                gold = f"<answer>{entry['answer']}</answer>" if self.tags else entry["answer"]
                yield Task(prompt=entry["question"], gold=gold, info=place)
                found += 1
            if found == self.size:
                return

    @reward
    async def correct(self, task: Task, rollout: Rollout) -> float:
        *origin, index = (task.info[part] for part in ("generator", "config", "seed", "size", "index"))
        answer, entry = self.answer(rollout), make_entry(*origin, index)
        if entry["question"] != task.prompt:
            raise ValueError(f"{origin[0]} makes another entry {index} in this process; it cannot be scored")
        if len(answer) > LONGEST or not is_harmless(origin[0], answer) or not may_be_right(origin[0], entry, answer):
            return 0.0
        try:
            return await aside(scored, *origin, entry, answer)
        except TooSlowError:
            return 0.0

    @metric
    def answered(self, task: Task, rollout: Rollout) -> bool:
        return bool(self.answer(rollout))

    def answer(self, rollout: Rollout) -> str:
        return xml(rollout.reply, "answer") if self.tags else rollout.reply.strip()


def scored(name: str, config: str, seed: int, size: int, entry: dict[str, Any], answer: str) -> float:
    """What the verifier gives for an answer to this entry; 0, if it cannot read it. In a process aside: verifiers may
    take long, and write into what they are given. Of some generators another process makes another entry."""
    dataset = make_dataset(name, config, seed, size)
    try:
        return float(dataset.score_answer(answer=answer, entry=entry))
    except Exception:  # verifiers raise on what they cannot read
        dataset.score_answer(answer=entry["answer"], entry=entry)  # a broken one raises here too: no reward then
        return 0.0


def usable(generators: str | list[str]) -> list[str]:
    """Errors: UserError naming a generator that does not exist or cannot be used, and why."""
    names = [generators] if isinstance(generators, str) else list(dict.fromkeys(generators))
    for name in names:
        if name not in DATASETS:
            raise UserError(f"reasoning-gym has no generator {name!r}; it has: {', '.join(sorted(DATASETS))}")
        if name in UNUSABLE:
            raise UserError(f"reasoning-gym's generator {name!r} {UNUSABLE[name]}; take another one")
    if not names:
        raise UserError("generators is empty; name at least one, such as leg_counting")
    return names


@lru_cache(maxsize=64)
def make_dataset(name: str, config: str, seed: int, size: int) -> Any:
    return create_dataset(name, seed=seed, size=size, **msgspec.json.decode(config))


@lru_cache(maxsize=8192)
def make_entry(name: str, config: str, seed: int, size: int, index: int) -> dict[str, Any]:
    """The same for the same arguments: a task names its entry by them, since not every entry can be sent as it is."""
    dataset, kept = make_dataset(name, config, seed, size), random.getstate()
    random.seed(f"{name} {config} {seed} {index}")  # some generators draw from the process's chance
    try:
        return dataset[index]
    finally:
        random.setstate(kept)


def is_held_out(question: str) -> bool:
    return hashlib.blake2b(question.encode(), digest_size=1).digest()[0] % 5 == 0
