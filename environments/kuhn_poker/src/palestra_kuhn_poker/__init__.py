"""Kuhn poker: two players, three cards, one bet."""

from itertools import count
from random import Random

from palestra.env import Environment, Task

OPENING, FACING = ("check", "bet"), ("fold", "call")


class KuhnPoker(Environment):
    """Each player pays one chip, gets one card of three, and may bet one more; the higher card takes the pot.

    A seat earns the share of the two chips that can be won which it won: -1 to 1. What is no legal move costs two.
    """

    system = "You play Kuhn poker with the cards J < Q < K. Answer with one word, the move."
    max_turns = 2

    def tasks(self):
        chance = Random(f"{self.split} {self.seed}")
        for number in count():
            yield Task(key=f"{self.split}-{number}", info={"cards": chance.sample("JQK", 2)})

    async def run(self, task, first, second):
        stakes, said, facing = {first: 1, second: 1}, [], False
        players = dict(zip((first, second), task.info["cards"], strict=True))
        for mover, other in ((first, second), (second, first), (first, second)):
            moves = FACING if facing else OPENING
            self.settle(other, mover, {mover: 2})  # stands if the reply is cut off
            told = f"Your card: {players[mover]}. So far: {', '.join(said) or 'nothing'}. {' or '.join(moves)}?"
            move = (await mover(told)).strip().lower()
            said.append(move)
            if move not in moves:
                stakes[mover] = 2
            if move not in moves or move == "fold":
                return self.settle(other, mover, stakes)
            stakes[mover] += move in ("bet", "call")
            if move == "call" or said == ["check", "check"]:
                break
            facing = move == "bet"
        winner, loser = sorted(players, key=lambda player: "JQK".index(players[player]), reverse=True)
        return self.settle(winner, loser, stakes)

    def settle(self, winner, loser, stakes):
        winner.rewards["won"], loser.rewards["won"] = stakes[loser] / 2, -stakes[loser] / 2
