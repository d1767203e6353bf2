"""Environments that break one law each, for the checks to see; and one that breaks none."""

import os
import subprocess
import time

import msgspec

from palestra.env import Environment, Sandbox, Task, reward


class Sound(Environment):
    """Say the number."""

    max_turns = 1

    def numbers(self):
        return range(1, 40, 2) if self.split == "train" else range(0, 40, 2)

    def tasks(self):
        for number in self.numbers():
            yield Task(prompt=f"say {number}", answer=str(number), gold=str(number))

    @reward
    def said(self, task, rollout):
        return rollout.reply == task.answer


class Programs(Environment):
    """Write a line for the shell that prints the number. Sound, where it has a sandbox."""

    max_turns = 1

    def tasks(self):
        for number in range(1, 40, 2) if self.split == "train" else range(0, 40, 2):
            yield Task(prompt=f"print {number}", answer=f"{number}\n", gold=f"echo {number}")

    async def run(self, task, agent, box: Sandbox):
        ended = await box.exec(await agent(task.prompt), timeout_s=10)
        agent.rewards["right"] = float(ended.stdout == task.answer)


class Mutated(Sound):
    """Say the number. Sound; replies that are wrong in a clever way earn less."""

    checked_tasks = 7

    def mutants(self, task):
        return [f"-{task.answer}", [f"{task.answer}0"]]


class Fooled(Mutated):
    """Takes one of them for right."""

    @reward
    def said(self, task, rollout):
        return rollout.reply.rstrip("0") == task.answer


class Servant(Sound):
    """Say the number. Sound; a program that it needs stays behind, and holds what it was given."""

    def tasks(self):
        subprocess.Popen(["sleep", "30"])
        yield from super().tasks()


class Undescribed(Sound):
    pass


class OneKey(Sound):
    """All tasks have one key."""

    def tasks(self):
        for number in self.numbers():
            yield Task(prompt=f"say {number}", answer=str(number), gold=str(number), key="task")


class AnyOrder(Sound):
    """Its order is that of a set of strings."""

    def tasks(self):
        for number in {str(number) for number in self.numbers()}:
            yield Task(prompt=f"say {number}", answer=number, gold=number)


class Leaks(Sound):
    """What is tested is trained."""

    def numbers(self):
        return range(20)


class WrongGold(Sound):
    """Its own answer is not accepted."""

    @reward
    def said(self, task, rollout):
        return 0.5 * (rollout.reply == task.answer)


class Generous(Sound):
    """Whoever says nothing is right."""

    @reward
    def said(self, task, rollout):
        return rollout.reply in ("", task.answer)


class Lenient(Sound):
    """Any reply with a brace in it is right."""

    @reward
    def said(self, task, rollout):
        return "{" in rollout.reply or rollout.reply == task.answer


class Crashes(Sound):
    """Reads the reply as a number, and trusts that it is one."""

    @reward
    def said(self, task, rollout):
        return int(rollout.reply or 0) == int(task.answer)


class Hangs(Sound):
    """Never ends where the reply is long."""

    @reward
    def said(self, task, rollout):
        if len(rollout.reply) > 10_000:
            time.sleep(3600)
        return rollout.reply == task.answer


class Dies(Sound):
    """Takes its process with it."""

    @reward
    def said(self, task, rollout):
        if len(rollout.reply) > 10_000:
            os._exit(7)
        return rollout.reply == task.answer


class Empty(Sound):
    """Has no tasks."""

    def tasks(self):
        return []


class Unlistable(Sound):
    """Fails while it lists its tasks."""

    def tasks(self):
        yield next(super().tasks())
        raise ValueError("the second task is missing")


class NoGold(Sound):
    """Knows no answer to play."""

    def tasks(self):
        yield from (msgspec.structs.replace(task, gold=None) for task in super().tasks())
