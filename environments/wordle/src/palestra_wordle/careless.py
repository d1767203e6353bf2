"""One who heeds the marks only now and then: demonstrations of whole games, good and bad.

`palestra generate palestra_wordle.careless:Careless --gold -n 4000 --to OUT.jsonl` writes those that find the word.
"""

from random import Random

from msgspec.structs import replace

from palestra_wordle import Wordle, marks


class Careless(Wordle):
    """Words whose gold guesses, in every second game, only at what all marks allow; else at other words by chance."""

    def tasks(self):
        chance, tasks = Random(f"careless {self.seed}"), list(super().tasks())
        words = [task.answer for task in tasks]
        for number, task in enumerate(tasks):
            find = self.heeding if (number + self.seed) % 2 else self.by_chance
            yield replace(task, gold=find(task.answer, words, chance))

    def heeding(self, word, words, chance):
        guesses = []
        while not guesses or guesses[-1] != word:
            guess = chance.choice(words)
            guesses.append(guess)
            words = [other for other in words if marks(guess, other) == marks(guess, word)]
        return guesses

    def by_chance(self, word, words, chance):
        others = [other for other in words if other != word]
        return [*chance.sample(others, min(chance.randrange(self.max_turns), len(others))), word]
