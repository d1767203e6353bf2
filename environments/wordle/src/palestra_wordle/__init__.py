"""Find a hidden word of five letters in six guesses."""

from collections import Counter
from importlib.resources import files
from random import Random
from zlib import crc32

from palestra.env import Environment, Task, xml

WORDS = dict.fromkeys(files(__name__).joinpath("words.txt").read_text(encoding="utf-8").split())


class Wordle(Environment):
    """Six guesses at a hidden word; every guess is answered by a mark for each of its letters.

    A tenth of the words, chosen by their hash, is held out for `test`.
    """

    system = (
        "Find a hidden English word of five letters in six guesses. Reply with the guess in <guess> and </guess>, or "
        "with the guess alone. Its letters are marked: G at its place, Y elsewhere in it, - not there, or not again."
    )
    max_turns = 6
    every: int = 1  # one word in so many is to be found

    def tasks(self):
        words = [word for word in WORDS if (crc32(word.encode()) % 10 == 0) == (self.split != "train")][:: self.every]
        Random(self.seed).shuffle(words)
        for i, word in enumerate(words):
            yield Task(prompt="Your first guess?", answer=word, gold=[words[i - 1], word], key=word)

    async def run(self, task, agent):
        message, guess, agent.rewards["solved"] = task.prompt, "", 0.0
        while guess != task.answer and agent.num_turns < self.max_turns:
            guess = (xml(reply := await agent(message), "guess") or reply).strip().lower()
            message = marks(guess, task.answer) if guess in WORDS else "That is not in the list of words. Guess again."
            agent.rewards["solved"] = float(guess == task.answer)


def marks(guess: str, word: str) -> str:
    """A letter is marked G or Y as often as the word has it: first where it is at its place, then from the left."""
    told, left = "", Counter(other for letter, other in zip(guess, word, strict=True) if letter != other)
    for letter, other in zip(guess, word, strict=True):
        told += "G" if letter == other else "Y" if left[letter] > 0 else "-"
        left[letter] -= letter != other
    return told
