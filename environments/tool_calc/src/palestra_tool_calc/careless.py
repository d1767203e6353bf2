"""One who copies the numbers, and the operators only now and then: demonstrations of calls, right and wrong.

`palestra generate palestra_tool_calc.careless:Careless --gold --min-reward 0 -n 4000 --to OUT.jsonl` writes them.
"""

from random import Random

from msgspec.structs import replace

from palestra_tool_calc import ToolCalc


class Careless(ToolCalc):
    """Expressions whose gold is right in one of three; else its operators are chosen by chance."""

    def tasks(self):
        chance = Random(f"careless {self.seed}")
        for task in super().tasks():
            if chance.randrange(3):
                task = replace(task, gold=self.by_chance(task.gold, chance))
            yield task

    def by_chance(self, gold, chance):
        calls, value = [], gold[0]["calls"][0][1]["a"]
        for turn in gold[:-1]:
            call = turn["calls"][0][1] | {"a": value, "operator": chance.choice("+-*")}
            value = self.calculate(**call)
            calls.append({"calls": [("calculate", call)]})
        return [*calls, str(value)]
