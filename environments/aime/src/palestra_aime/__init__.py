"""Competition mathematics, for evaluation alone."""

from collections.abc import Iterator
from typing import Literal

from palestra.env import Environment, Rollout, Task, boxed, math_equal, metric, reward
from palestra_aime.problems import read_aime25, read_fetched

Contest = Literal["aime24", "aime25", "hmmt"]


class Aime(Environment):
    r"""Problems of AIME 2024 and 2025 and HMMT 2024 and 2025; the answer stands inside \boxed{}.

    There is nothing to train on. The problems of aime24 and hmmt must be fetched: `python -m palestra_aime.fetch`.
    """

    system = "Solve the problem. Put the final answer, and only that, inside \\boxed{}."
    contests: list[Contest] = ["aime25"]
    max_turns = 1

    def tasks(self) -> Iterator[Task]:
        """In the contests' own order, whatever the seed."""
        contests = dict.fromkeys(self.contests) if self.split == "test" else ()
        for contest in contests:
            for problem in read_aime25() if contest == "aime25" else read_fetched(contest):
                gold = f"\\boxed{{{problem.answer}}}"
                info = {"contest": contest}
                yield Task(prompt=problem.question, answer=problem.answer, gold=gold, key=problem.key, info=info)

    @reward
    async def correct(self, task: Task, rollout: Rollout) -> bool:
        return await math_equal(boxed(rollout.reply), task.answer)

    @metric
    def answered(self, task: Task, rollout: Rollout) -> bool:
        return bool(boxed(rollout.reply))
