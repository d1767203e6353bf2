"""Work out an expression in the head."""

import operator
import re
from random import Random
from zlib import crc32

from palestra.env import Environment, Task, reward

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Arithmetic(Environment):
    """An expression like (12 + 34) - 5, worked out from the left; the last number of the reply is the answer."""

    operators: str = "+-"
    operations: int = 1
    largest: int = 99
    max_turns = 1

    def tasks(self):
        chance = Random(f"{self.split} {self.seed}")
        while True:
            text, value = "", chance.randint(0, self.largest)
            for number in range(self.operations):
                name, other = chance.choice(self.operators), chance.randint(0, self.largest)
                text = f"({text}) {name} {other}" if number else f"{value} {name} {other}"
                value = OPERATORS[name](value, other)
            if (crc32(text.encode()) % 10 == 0) == (self.split != "train"):  # a tenth is held out
                yield Task(prompt=f"{text} =", answer=value, gold=str(value))

    @reward
    def right(self, task, rollout):
        return re.findall(r"-?\d+", rollout.reply)[-1:] == [str(task.answer)]
