"""A player that makes legal moves by chance, in any game: it varies the moves that it is shown, and tries them."""

import re
from collections.abc import Iterator
from itertools import islice
from random import Random

from palestra_textarena.games import Game

TRIES = 600  # of one turn
TALK = "I see. Let us go on."  # where everything is allowed, and where nothing else was
_SHOWN = re.compile(r"\[[^\[\]\n]{1,80}\]")
_OFFERS = re.compile(r"(?im)^.*\b(?:moves|actions|options|targets|hand|cards|cups)\b.*\[.*$")
_PART = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])|\d+")
_WORD = re.compile(r"[A-Za-z]{2,12}")
_GIVES_UP = re.compile(r"(?i)resign|forfeit|quit|fold")
_SPANS = (3, 5, 8, 10, 25)


class ChancePlayer:
    """One player of one game. `chance` is its own."""

    def __init__(self, chance: Random):
        self._chance, self._heard = chance, ""

    def reply(self, game: Game, told: str) -> str:
        """The first of many that is legal, and does not give up."""
        self._heard += f"\n{told}"
        known = game.moves(self._chance)
        moves = self._chance.sample(known, len(known)) if known else islice(self._moves(told), TRIES)
        return next((move for move in moves if not _GIVES_UP.search(move) and game.allows(move)), TALK)

    def _moves(self, told: str) -> Iterator[str]:
        """Those offered now, then those that were ever shown, then variations of them."""
        offered = [move for line in _OFFERS.findall(told) for move in _SHOWN.findall(line)]
        shown = [move for move in _SHOWN.findall(self._heard) if len(move) > 2][-40:]
        words = sorted(set(_WORD.findall(told))) or ["pass"]
        yield from self._chance.sample(offered, len(offered))
        yield from self._chance.sample(shown, len(shown))
        while True:
            if shown and self._chance.random() < 0.95:
                yield self._varied(self._chance.choice(shown))
            else:
                yield self._chance.choice([TALK, f"[{self._chance.choice(words)}]"])

    def _varied(self, move: str) -> str:
        """Other numbers in place of its numbers, other letters in place of its single letters."""
        span = self._chance.choice(_SPANS)

        def other(part: re.Match[str]) -> str:
            number = self._chance.randrange(span)
            return str(number) if part[0].isdigit() else chr(ord("a" if part[0].islower() else "A") + number)

        return _PART.sub(other, move)
