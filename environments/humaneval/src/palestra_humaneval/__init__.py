"""The problems of HumanEval: write a function; its tests decide."""

import json
import re
import secrets
from collections.abc import Iterator
from importlib.resources import files

from palestra.core.errors import InfrastructureError
from palestra.env import Environment, Rollout, Task, metric, reward, run_code
from palestra_humaneval.exam import UNFIT
from palestra_humaneval.problems import mutants, problems

_EXAM = (files(__name__) / "exam.py").read_text(encoding="utf-8")
_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)


class HumanEval(Environment):
    """Complete a Python function, inside a ```python block; all tests of the problem must pass, in a sandbox.

    There is nothing to train on: the 164 problems are the split `test`.
    """

    system = "Complete the Python function. Answer with the whole function, inside one ```python block."
    timeout_s: float = 10.0  # all tests of a problem together
    max_turns = 1
    checked_tasks = 164

    def tasks(self) -> Iterator[Task]:
        """In their own order, whatever the seed."""
        for problem in problems() if self.split == "test" else ():
            yield Task(
                prompt=fenced(problem.prompt),
                gold=fenced(problem.solution),
                key=problem.task_id,
                info={"preamble": problem.preamble, "entry_point": problem.entry_point, "test": problem.test},
            )

    def mutants(self, task: Task) -> Iterator[str]:
        [problem] = [problem for problem in problems() if problem.task_id == task.key]
        return map(fenced, mutants(problem))

    @reward
    async def passes(self, task: Task, rollout: Rollout) -> bool:
        code = block(rollout.reply)
        return bool(code) and await passes(task, code, timeout_s=self.timeout_s)

    @metric
    def answered(self, task: Task, rollout: Rollout) -> bool:
        return bool(block(rollout.reply))


def fenced(program: str) -> str:
    return f"```python\n{program.rstrip()}\n```"


def block(reply: str) -> str:
    """The last whole block of code; "" if there is none."""
    return next(reversed(_BLOCK.findall(reply)), "").strip()


async def passes(task: Task, code: str, *, timeout_s: float) -> bool:
    """Whether all tests pass. Errors: SandboxError; InfrastructureError, if the exam cannot begin in that sandbox."""
    password = secrets.token_hex(16)
    ended = await run_code(_EXAM, stdin=given(task, code, password), timeout_s=timeout_s)
    if ended.exit_code == UNFIT:
        raise InfrastructureError(f"this sandbox cannot keep a solution apart from its tests: {ended.stderr[-400:]}")
    return ended.exit_code == 0 and ended.stdout.split()[-1:] == [password]


def given(task: Task, code: str, password: str) -> str:
    """What the exam reads."""
    return json.dumps({**task.info, "code": task.info["preamble"] + code, "password": password})
