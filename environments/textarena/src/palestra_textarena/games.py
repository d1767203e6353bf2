"""One game of TextArena at a time, with chance of its own: many are played at once in one process."""

import contextlib
import copy
import difflib
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from palestra.core.errors import UserError
from palestra_textarena.moves import MOVES

INSTALL = "pip install --no-deps textarena==0.7.4 nltk==3.10.4; and pip install regex requests rich websockets"
MOST_PLAYERS = 15
LARGE = 2_000  # things in one list or dict of a game: words, not its state
BROKEN = {
    "CharacterConclave": "raises TypeError on the first message",
    "Tak": "raises TypeError when somebody wins",
}
"""By the first part of the id: what can never be played to its end in textarena 0.7.4."""


class Game:
    """A game from its deal to its outcome. `rewards` are by player, as the game gives them at its end."""

    def __init__(self, id: str, options: dict[str, Any], num_players: int, *, seed: int):
        """Errors: whatever a game raises that does not start here, or not with so many players."""
        self.num_players, self.is_over = num_players, False
        self.rewards: dict[int, float] = {}
        self._chance = random.Random(seed).getstate()
        with self._own_chance():
            self._table, self._wrappers = _unwrapped(library().make(id, **options))
            self._table.reset(num_players=num_players, seed=seed)

    def turn(self) -> tuple[int, str]:
        """Whose turn it is, and what that player has not heard yet; without what it said itself."""
        with self._own_chance():
            player, heard = self._table.get_observation()
        return player, "\n".join(self._told(said) for said in heard if said[0] != player)

    def play(self, reply: str) -> None:
        with self._own_chance():
            self.is_over, _ = self._table.step(self._action(reply))
        if self.is_over:
            given = self._table.state.rewards or {}
            self.rewards = {player: float(given.get(player, 0)) for player in range(self.num_players)}

    def moves(self, chance: random.Random) -> list[str]:
        """Some that may be legal, where what the game tells is not enough to make one."""
        made = MOVES.get(type(self._table).__name__.removesuffix("Env"))
        return list(made(self._table, chance)) if made else []

    def allows(self, reply: str) -> bool:
        """Whether it is a legal move, found out on a copy."""
        with self._own_chance(keep=False):
            table = _copied(self._table)
            try:
                table.step(self._action(reply))
            except Exception:  # some games do, on what they cannot read
                return False
        return not table.state.error_count and not _has_lost_by_error(table)

    @property
    def ended_by_error(self) -> bool:
        """Whether somebody made illegal moves until the game put an end to it."""
        return _has_lost_by_error(self._table)

    def _action(self, reply: str) -> str:
        for wrapper in self._wrappers:
            reply = wrapper.action(reply)
        return reply

    def _told(self, said: tuple[Any, ...]) -> str:
        """Who speaks, and the text; a few games give the parts in another order."""
        names, text = self._table.state.role_mapping, next((part for part in said if isinstance(part, str)), "")
        is_player = isinstance(said[0], int) and said[0] >= 0
        return f"[{names.get(said[0], f'Player {said[0]}')}] {text}" if is_player else text

    @contextmanager
    def _own_chance(self, *, keep: bool = True) -> Iterator[None]:
        """Games use the process's chance, and print."""
        outer = random.getstate()
        random.setstate(self._chance)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            if keep:
                self._chance = random.getstate()
            random.setstate(outer)


def num_players(id: str, options: dict[str, Any], wanted: int) -> int:
    """As many as `wanted`; if that is 0, two where the game takes two, else the fewest it takes.

    Errors: UserError, if there is no such game, it does not start here, or not with so many players.
    """
    if id not in (known := library().envs.registration.ENV_REGISTRY):
        close = difflib.get_close_matches(id, known, n=3) or ["TicTacToe-v0"]
        raise UserError(f"args.game={id!r} is no game of TextArena; did you mean {' or '.join(close)}?")
    if reason := BROKEN.get(id.split("-")[0]):
        raise UserError(f"args.game={id!r}: the game {reason} in textarena 0.7.4; take another one")
    error: BaseException | None = None
    for count in [wanted] if wanted else [2, 1, *range(3, MOST_PLAYERS + 1)]:
        try:
            Game(id, options, count, seed=0)
        except Exception as raised:
            error = error or raised
        else:
            return count
    with_players = f" with args.players={wanted}" if wanted else ""
    raise UserError(f"args.game={id!r} does not start here{with_players}: {_first_line(error)}")


@cache
def library() -> Any:
    """textarena. Errors: UserError, if it is missing."""
    try:
        import textarena
    except ImportError as error:
        raise UserError(f"the games of TextArena cannot be imported: {error}; {INSTALL}") from error
    return textarena


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip(" *") for line in str(error).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), '')}"


def _unwrapped(game: Any) -> tuple[Any, list[Any]]:
    """The game itself, and what is done to actions on their way to it. Its other wrappers tell everything again at
    every turn; a conversation remembers."""
    wrappers = []
    while hasattr(game, "env"):
        wrappers += [game] if hasattr(type(game), "action") else []
        game = game.env
    return game, wrappers


def _copied(table: Any) -> Any:
    """Without what was said; long lists of words are shared."""
    state, parts = table.state, [*vars(table).values(), *(table.state.game_state or {}).values()]
    kept = {id(part): part for part in parts if isinstance(part, list | set | dict | frozenset) and len(part) > LARGE}
    unheard = {player: [] for player in state.observations}
    return copy.deepcopy(table, kept | {id(state.logs): [], id(state.observations): unheard})


def _has_lost_by_error(table: Any) -> bool:
    return any(told.get("invalid_move") for told in table.state.game_info.values())
