"""What is seen of a game, as text; the games that gymnasium brings, explained."""

import re
from typing import Any

_COLOURED = re.compile(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m")
_BRACKETS = {"2": "()", "4": "{}", "5": "<>"}  # by the colour's last digit: green, blue, magenta; all others: []

GAMES = {
    "Blackjack": (
        ["stick", "hit"],
        "Blackjack: get nearer to 21 than the dealer, and not beyond. You are told (the sum of your cards, the "
        "dealer's card, whether one of your aces counts 11).",
    ),
    "CliffWalking": (
        ["up", "right", "down", "left"],
        "Walk from your place x to the target T. A step costs 1; one onto the cliff C costs 100 and puts you back.",
    ),
    "FrozenLake": (
        ["left", "down", "right", "up"],
        "Walk over the frozen lake from S to the goal G. F is ice, H a hole: stay out of it. The square you stand on "
        "is in brackets. Where the ice is slippery you may slide to a side.",
    ),
    "Taxi": (
        ["south", "north", "east", "west", "pick up", "drop off"],
        "Drive the taxi to where the passenger waits, pick up, drive to the destination, drop off. In {} is where the "
        "passenger waits, in <> the destination, [] is your taxi, () your taxi with the passenger. | is a wall. A step "
        "costs 1, to pick up or drop off in the wrong place 10.",
    ),
}
"""Names of actions and rules, by the id without its version."""


def shown(game: Any) -> str:
    """How the game draws itself, with brackets in place of colours; "" if it does not."""
    drawing = game.render() if getattr(game, "render_mode", None) == "ansi" else ""
    while (plain := _COLOURED.sub(_bracketed, drawing)) != drawing:  # colours stand inside colours
        drawing = plain
    return drawing.strip("\n")


def _bracketed(coloured: re.Match[str]) -> str:
    colours = [code for code in coloured[1].split(";") if code[0] in "34" and len(code) == 2]
    opening, closing = _BRACKETS.get(colours[0][1], "[]") if colours else ("", "")
    return f"{opening}{coloured[2]}{closing}"


def told(observation: Any) -> str:
    return observation if isinstance(observation, str) else str(_plain(observation))


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as Python has them."""
    if isinstance(value, tuple | list):
        return type(value)(_plain(part) for part in value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
