"""A player that moves by chance: somebody to measure against, and demonstrations of the rules.

`python -m palestra_kuhn_poker.chance OUT.jsonl` writes conversations of both seats, for a supervised warm-up.
"""

import asyncio
import json
import sys
from itertools import islice
from pathlib import Path
from random import Random

from palestra_kuhn_poker import FACING, OPENING, KuhnPoker

NUM_GAMES = 2_000


class Chance:
    """A seat whose legal moves are equally likely."""

    def __init__(self, random):
        self.random, self.rewards, self.messages = random, {}, []

    async def __call__(self, told):
        move = self.random.choice(FACING if told.endswith("fold or call?") else OPENING)
        self.messages += [{"role": "user", "content": told}, {"role": "assistant", "content": move}]
        return move


class AgainstChance(KuhnPoker):
    """Kuhn poker against a player that moves by chance and sits first in half of the games."""

    async def run(self, task, agent):
        players = [agent, Chance(agent.random)]
        agent.random.shuffle(players)
        await super().run(task, *players)


async def demonstrations(num_games=NUM_GAMES, seed=0):
    """Rows of `messages`, one for each seat that moved."""
    game, rows = KuhnPoker(seed=seed), []
    for number, task in enumerate(islice(game.tasks(), num_games)):
        seats = Chance(Random(f"{seed} {number} first")), Chance(Random(f"{seed} {number} second"))
        await game.run(task, *seats)
        rows += [[{"role": "system", "content": game.system}, *seat.messages] for seat in seats if seat.messages]
    return [{"messages": row} for row in rows]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m palestra_kuhn_poker.chance OUT.jsonl")
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    found = asyncio.run(demonstrations())
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
