"""Games played by players that move by chance: `python -m palestra_textarena.sweep [GAME...]`, without a name all."""

import sys
import time
from collections.abc import Iterator
from random import Random

from palestra.core.errors import UserError
from palestra_textarena.chance import ChancePlayer
from palestra_textarena.games import Game, library, num_players

MOST_TURNS, MOST_S = 10_000, 60.0
SEEDS = {"SpiteAndMalice-v0": 5, "Stratego-v0": 3}
"""Not 1, where chance may come to a position without a legal move, which these two games do not end."""


def games() -> list[str]:
    """One id of each kind of game, whether it starts here or not."""
    of_kind: dict[str, list[str]] = {}
    for id, told in library().envs.registration.ENV_REGISTRY.items():
        if not id.endswith(("-train", "-raw")):
            of_kind.setdefault(told.entry_point, []).append(id)
    return [next((id for id in ids if id.endswith("-v0")), ids[0]) for ids in of_kind.values()]


def played(id: str) -> str:
    """How it went: "" if every player moved legally until the game ended, else what went wrong."""
    seed, started = SEEDS.get(id, 1), time.monotonic()
    game = Game(id, {}, num_players(id, {}, 0), seed=seed)
    players = [ChancePlayer(Random(f"{seed} {player}")) for player in range(game.num_players)]
    for _ in range(MOST_TURNS):
        player, told = game.turn()
        game.play(players[player].reply(game, told))
        if game.is_over:
            return "ended by illegal moves" if game.ended_by_error else ""
        if time.monotonic() - started > MOST_S:
            break
    return "did not end"


def sweep(ids: list[str]) -> Iterator[tuple[str, str]]:
    for id in ids:
        try:
            yield id, played(id)
        except UserError as error:
            yield id, str(error)


if __name__ == "__main__":
    outcomes = []
    for id, wrong in sweep(sys.argv[1:] or games()):
        outcomes.append(wrong)
        print(f"{id:30} {wrong or 'played to the end'}", flush=True)
    print(f"{outcomes.count('')} of {len(outcomes)} played to the end")
