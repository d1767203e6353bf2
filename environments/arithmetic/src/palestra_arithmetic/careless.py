"""One who reads the numbers, and the operators only now and then: demonstrations of answers, right and wrong.

`palestra generate palestra_arithmetic.careless:Careless --gold --min-reward 0 -n 4000 --to OUT.jsonl` writes them.
"""

import re
from random import Random

from msgspec.structs import replace

from palestra_arithmetic import OPERATORS, Arithmetic


class Careless(Arithmetic):
    """Expressions whose gold is right in one of three; else its operators are chosen by chance."""

    def tasks(self):
        chance = Random(f"careless {self.seed}")
        for task in super().tasks():
            if chance.randrange(3):
                value, *others = map(int, re.findall(r"\d+", task.prompt))
                for other in others:
                    value = OPERATORS[chance.choice(self.operators)](value, other)
                task = replace(task, gold=str(value))
            yield task
