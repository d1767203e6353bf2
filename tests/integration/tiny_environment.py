"""An environment whose reward has signal from the first step of an untrained character model."""

from palestra.env import Environment, Task, metric, reward


class EarlyLetters(Environment):
    """Write letters of the first half of the alphabet."""

    def tasks(self):
        for number in range(64):
            yield Task(prompt="abcdefgh"[number % 8] * (1 + number // 8))

    @reward
    def early(self, task, rollout):
        return sum(letter < "n" for letter in rollout.reply) / 12

    @metric
    def letters(self, task, rollout):
        return len(rollout.reply)


class LateLetters(EarlyLetters):
    @reward
    def early(self, task, rollout):
        return sum(letter >= "n" for letter in rollout.reply) / 12


class RaisesInTasks(EarlyLetters):
    def tasks(self):
        raise FileNotFoundError("words.txt")
