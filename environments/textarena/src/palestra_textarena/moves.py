"""Moves that may be legal, of games that do not show all of theirs. Most are not: they are tried on a copy."""

from collections.abc import Callable, Iterable
from itertools import product
from random import Random
from typing import Any

Moves = Callable[[Any, Random], Iterable[str]]
"""Of a game as it stands."""


def every(pattern: str, *choices: Iterable[Any]) -> Moves:
    """All ways to fill the pattern's places."""
    filled = [pattern.format(*chosen) for chosen in product(*choices)]
    return lambda game, chance: filled


def steps(pattern: str, files: str, ranks: range, reach: int) -> Moves:
    """From each square to those in a straight line, or a knight's move, from it, at most `reach` away."""
    squares = list(product(range(len(files)), ranks))
    filled = [
        pattern.format(f"{files[file]}{rank}", f"{files[to_file]}{to_rank}")
        for (file, rank), (to_file, to_rank) in product(squares, squares)
        if 0 < max(abs(file - to_file), abs(rank - to_rank)) <= reach
        and (file == to_file or rank == to_rank or abs(file - to_file) == abs(rank - to_rank))
    ]
    return lambda game, chance: filled


def _blotto(game: Any, chance: Random) -> Iterable[str]:
    fields, units = game.field_names, game.num_total_units
    cuts = sorted(chance.randint(0, units) for _ in fields[1:])
    parts = [end - start for start, end in zip([0, *cuts], [*cuts, units], strict=True)]
    return [f"[{' '.join(f'{field}{part}' for field, part in zip(fields, parts, strict=True))}]"]


def _clues(game: Any, chance: Random) -> Iterable[str]:
    tables = game.state.game_state["board"].values()
    cells = [f"{row} {column}" for table in tables for row, columns in table.items() for column in columns]
    return [f"[{cell} {mark}]" for cell in cells for mark in "XO"]


def _piles(game: Any, chance: Random) -> Iterable[str]:
    player = game.players[game.state.current_player_id]
    tops = [pile[-1] for pile in (*player["discard"], player["payoff"]) if pile]
    plays = [f"[play {card} {pile}]" for card in (*player["hand"], *tops) for pile in range(4)]
    discards = [f"[discard {card} {pile}]" for card in player["hand"] for pile in range(4)]
    return [*plays, *discards] if player["hand"] else ["[draw]", *plays]


def _letters(game: Any, chance: Random) -> Iterable[str]:
    board = game.state.game_state["board"]
    empty = [f"{row} {column}" for row, cells in enumerate(board) for column, cell in enumerate(cells) if cell == "_"]
    return [f"[{cell} {letter}]" for cell in empty for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]


def _builds(game: Any, chance: Random) -> Iterable[str]:
    """To trade takes a partner, and ends nothing."""
    count = len(game.game_moves)
    return [f"[{number}]" for number in range(1, count + 1) if number != count - 1]


def _marches(game: Any, chance: Random) -> Iterable[str]:
    def named(row: int, column: int) -> str:
        return f"{chr(ord('A') + row)}{column}"

    beside = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    pieces = product(game.player_pieces[game.state.current_player_id], beside)
    return [f"[{named(row, column)} {named(row + down, column + right)}]" for (row, column), (down, right) in pieces]


def _slides(game: Any, chance: Random) -> Iterable[str]:
    return [f"[{car}{way}]" for car in game.state.game_state["vehicles"] for way in "+-"]


def _shown_by(game: Any, chance: Random) -> Iterable[str]:
    return game._get_valid_moves(game.state.current_player_id).split(", ")


_HAND = range(1, 14)
_HANDS = every("[attack {} {}]", range(2), range(2)), every("[split {} {}]", range(9), range(9))
_SWAPS = every("[swap {} {}]", range(1, 4), range(1, 4))
MOVES: dict[str, Moves] = {
    "Alquerque": steps("[{} {}]", "abcde", range(1, 6), 2),
    "Breakthrough": steps("[{}{}]", "abcdefgh", range(1, 9), 1),
    "Briscola": every("[play {}]", _HAND),
    "Chopsticks": lambda game, chance: [move for moves in _HANDS for move in moves(game, chance)],
    "ColonelBlotto": _blotto,
    "Countdown": every("[{} {} {}]", range(6), range(6), "+-*/"),
    "Crosswords": _letters,
    "Cryptarithm": every("[{} {}]", "SENDMORY", range(10)),
    "GermanWhist": every("[play {}]", _HAND),
    "Golf": lambda game, chance: ["[draw]", "[take]", "[discard]", "[knock]", *_SWAPS(game, chance)],
    "IteratedTwoThirdsAverage": every("[{}]", range(101)),
    "LightsOut": every("[{} {}]", range(5), range(5)),
    "LinesOfAction": steps("[{}{}]", "abcdefgh", range(1, 9), 7),
    "LogicPuzzle": _clues,
    "NewRecruit": lambda game, chance: ["[Accept]", f"[Propose] {''.join(chance.choices('ABCDE', k=8))}"],
    "PegJump": every("[{} {}]", range(1, 16), range(1, 16)),
    "QuantumTicTacToe": every("[{},{}]", range(9), range(9)),
    "RushHour": _slides,
    "SantoriniBaseFixedWorker": _shown_by,
    "SettlersOfCatan": _builds,
    "Slitherlink": every("[{} {} {}]", "hv", range(5), range(5)),
    "SpiteAndMalice": _piles,
    "Stratego": _marches,
    "Sudoku": every("[{} {} {}]", range(1, 10), range(1, 10), range(1, 10)),
    "TwoDollar": lambda game, chance: ["[Accept]", f"[Propose] ${chance.randint(0, 200) / 100:.2f}"],
}
"""By the name of the game's class."""
