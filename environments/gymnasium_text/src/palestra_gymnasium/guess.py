"""A game as small as an environment can be: what `make = "palestra_gymnasium.guess:Guess"` names."""

from random import Random
from typing import Any


class Guess:
    """A number is to be guessed; each answer says whether it is more or less. The right guess earns 1, no other."""

    def __init__(self, largest: int = 100, steps: int = 10):
        self.largest, self.steps = largest, steps

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self.number, self.left = Random(seed).randint(1, self.largest), self.steps
        return f"Guess a number from 1 to {self.largest}, in {self.steps} guesses.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        guess = int(action) if action.isdecimal() and len(action) < 10 else None
        if guess is None:
            observation = "That is no number."
        else:
            observation = "more" if guess < self.number else "less" if guess > self.number else "right"
        return observation, float(guess == self.number), guess == self.number, self.left == 0, {}
