"""Work out an expression with a calculator."""

from random import Random
from typing import Literal
from zlib import crc32

from palestra.env import Environment, Task, reward


class ToolCalc(Environment):
    """An expression like ((3 + 4) * 5), a calculator that does one operation at a time; the last reply is the value."""

    operations: int = 2
    largest: int = 9
    max_turns = 8

    def calculate(self, a: int, operator: Literal["+", "-", "*"], b: int) -> int:
        """One operation on two whole numbers."""
        return {"+": a + b, "-": a - b, "*": a * b}[operator]

    tools = (calculate,)

    def tasks(self):
        chance = Random(f"{self.split} {self.seed}")
        while True:
            text, calls = str(value := chance.randint(0, self.largest)), []
            for _ in range(self.operations):
                operator, number = chance.choice("+-*"), chance.randint(1, self.largest)
                calls.append({"calls": [("calculate", {"a": value, "operator": operator, "b": number})]})
                text, value = f"({text} {operator} {number})", self.calculate(value, operator, number)
            if (crc32(text.encode()) % 10 == 0) == (self.split != "train"):  # a tenth is held out
                yield Task(prompt=text, answer=str(value), gold=[*calls, str(value)])

    @reward
    def right(self, task, rollout):
        return rollout.ending == "ok" and rollout.reply.strip() == task.answer
