"""Games of TextArena."""

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any, Literal

from palestra.env import Agent, AgentError, Environment, Frozen, Task
from palestra_textarena.chance import ChancePlayer
from palestra_textarena.games import Game, num_players

HELD_OUT = 10  # one seed in so many belongs to `test`
MOST_CHARACTERS = 2000  # of a reply: games look through it by patterns that take long over long ones


class TextArena(Environment):
    """The policy plays one player of a game, drawn by chance; the others move by chance, or are played by a model.

    A seat earns what the game gives its player at the end, mostly -1 to 1; -1 where its reply was cut off before that.
    """

    game: str  # an id of TextArena, such as "TicTacToe-v0"
    options: dict[str, Any] = {}  # of the game
    players: int = 0  # 0: two where the game takes two, else the fewest it takes
    opponent: Literal["random", "model"] = "random"
    system = "You play a game. Make your move in the form that the game asks for."
    max_turns = 100
    checked_with = ({"game": "TicTacToe-v0"}, {"game": "TowerOfHanoi-v0"}, {"game": "LiarsDice-v0", "players": 3})

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.players = num_players(self.game, self.options, self.players)

    def tasks(self) -> Iterator[Task]:
        chance, is_held_out = Random(f"{self.split} {self.seed}"), self.split != "train"
        while True:
            seed = chance.randrange(2**31)
            if (seed % HELD_OUT == 0) == is_held_out:
                yield Task(key=str(seed), info={"seed": seed})

    async def run(self, task, agent, opponent: Frozen):
        opponent.system = self.system
        models = [opponent.fork() for _ in range(1, self.players)] if self.opponent == "model" else []
        await self.play(task, [agent], models)

    async def play(self, task: Task, seats: list[Agent], models: list[Agent] | None = None) -> None:
        """`seats` are players next to each other, the first one by chance; then come `models`, then chance."""
        game = Game(self.game, self.options, self.players, seed=task.info["seed"])
        order = [(task.info["seed"] // HELD_OUT + place) % self.players for place in range(self.players)]
        speakers = dict(zip(order, [*seats, *(models or [])], strict=False))
        others = {player: ChancePlayer(Random(seats[0].random.random())) for player in order if player not in speakers}
        while not game.is_over:
            player, told = game.turn()
            for seat in seats:  # this stands if the reply is cut off
                seat.rewards["outcome"] = -1.0 if seat is speakers.get(player) else 0.0
            if player in others:
                await asyncio.sleep(0)  # a long stretch of chance players leaves others their turn
                reply = others[player].reply(game, told)
            else:
                reply = move_in(await speakers[player](told or "Go on."))
            try:
                game.play(reply)
            except Exception as error:  # some games do, on what they cannot read
                raise AgentError(f"{self.game} raised {type(error).__name__} on a move: {error}") from error
        for player, seat in zip(order, seats, strict=False):
            seat.rewards["outcome"] = game.rewards[player]


def move_in(reply: str) -> str:
    """Of a reply what games read by patterns and tell all players: its end, white space as one blank."""
    return " ".join(reply[-MOST_CHARACTERS:].split())


class SelfPlay(TextArena):
    """A game in which the policy plays two players, each with rewards of its own; any others move by chance."""

    checked_with = ({"game": "TicTacToe-v0"}, {"game": "KuhnPoker-v0"})

    async def run(self, task, first, second):
        await self.play(task, [first, second])
