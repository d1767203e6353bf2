"""Write a word backwards."""

from palestra.env import Environment, Task, metric, ratio, reward
from palestra_reverse_text.words import words


class ReverseText(Environment):
    """The prompt is a word, the answer the same word backwards. A tenth of all words is held out for `test`."""

    alphabet: str = "abcdefghij"
    min_letters: int = 3
    max_letters: int = 6
    max_turns = 1

    def tasks(self):
        chance = {"held_out": self.split != "train", "seed": f"{self.split} {self.seed}"}
        for word in words(self.alphabet, self.min_letters, self.max_letters, **chance):
            yield Task(prompt=word, answer=word[::-1], gold=word[::-1], key=word)

    @reward
    def exact(self, task, rollout):
        return rollout.reply == task.answer

    @metric
    def similarity(self, task, rollout):
        return ratio(rollout.reply, task.answer)
