"""Gymnasium environments, played in words."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

from palestra.core.errors import UserError
from palestra.env import Environment, Rollout, Task, metric, xml
from palestra_gymnasium.words import GAMES, shown, told

HELD_OUT = 10  # one seed in so many belongs to `test`
NO_ACTION = "That is no action."


class GymnasiumText(Environment):
    """Observations are told as text and replies are actions; what a step earns is credited to the turn that took it."""

    make: str  # "module:factory", or the id of a registered environment
    options: dict[str, Any] = {}  # of the factory
    actions: list[str] = []  # names of discrete actions, in the order of their numbers
    rules: str = ""  # stand before the first observation
    system = "Answer with one action, and nothing else; if you think aloud first, put it inside <action> and </action>."
    max_turns = 100
    checked_with = (
        {"make": "FrozenLake-v1", "options": {"is_slippery": False}},
        {"make": "Taxi-v4", "max_turns": 10},
        {"make": "Blackjack-v1"},
        {"make": "palestra_gymnasium.guess:Guess"},
    )

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._make = factory(self.make)

    def tasks(self) -> Iterator[Task]:
        chance, is_held_out = Random(f"{self.split} {self.seed}"), self.split != "train"
        while True:
            seed = chance.randrange(2**31)
            if (seed % HELD_OUT == 0) == is_held_out:
                yield Task(key=str(seed), info={"seed": seed})

    async def run(self, task, agent):
        game, is_over = self._make(**self.options), False
        try:
            actions = self._actions(game)
            observation, _ = game.reset(seed=task.info["seed"])
            message = "\n\n".join(part for part in (self._rules(actions), shown(game) or told(observation)) if part)
            while not is_over:
                action = read(await agent(message), actions)
                if action is None:
                    message = f"{NO_ACTION} The actions are: {', '.join(actions)}."
                    continue
                observation, earned, is_terminated, is_truncated, _ = game.step(action)
                agent.credit("earned", float(earned))
                message, is_over = shown(game) or told(observation), is_terminated or is_truncated
        finally:
            getattr(game, "close", bool)()

    @metric
    def no_actions(self, task: Task, rollout: Rollout) -> int:
        """Replies that were none."""
        told = [str(message["content"]) for message in rollout.messages if message["role"] == "user"]
        return sum(text.startswith(NO_ACTION) for text in told)

    def _actions(self, game: Any) -> dict[str, int]:
        """By name; none, where an action is any text. Errors: UserError, if they are neither numbers nor text."""
        space = getattr(game, "action_space", None)
        if space is None or type(space).__name__ == "Text":
            return {}
        if type(space).__name__ != "Discrete":
            raise UserError(f"args.make={self.make!r} takes actions from {space}; wrap it to take numbers or text")
        numbers = range(int(space.start), int(space.start + space.n))
        names = self.actions or self._known[0] or list(map(str, numbers))
        if len(names) != len(numbers):
            raise UserError(f"args.actions has {len(names)} names, and {self.make} {len(numbers)} actions; name each")
        return dict(zip(names, numbers, strict=True))

    def _rules(self, actions: dict[str, int]) -> str:
        told = f"Actions: {', '.join(actions)}." if actions else ""
        return f"{self.rules or self._known[1]} {told}".strip()

    @property
    def _known(self) -> tuple[list[str], str]:
        return GAMES.get(self.make.rpartition("-")[0], ([], ""))


def read(reply: str, actions: dict[str, int]) -> int | str | None:
    """The action that a reply is: its last <action>, else all of it. None, if there is no such action."""
    text = (xml(reply, "action") or reply).strip()
    return {name.casefold(): number for name, number in actions.items()}.get(text.casefold()) if actions else text


def factory(make: str) -> Callable[..., Any]:
    """Errors: UserError, if there is nothing of this name."""
    module, separator, name = make.partition(":")
    try:
        return getattr(importlib.import_module(module), name) if separator else _registered(make)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"args.make={make!r} cannot be found: {error}; give module:factory, or an id of gymnasium"
        ) from error


def _registered(id: str) -> Callable[..., Any]:
    """One that draws itself as text, if it can."""
    import gymnasium

    try:
        entry = gymnasium.spec(id).entry_point
    except gymnasium.error.Error as error:
        raise UserError(f"args.make={id!r}: {error}") from error
    creator = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    can_write = "ansi" in getattr(creator, "metadata", {}).get("render_modes", ())
    drawing = {"render_mode": "ansi"} if can_write else {}
    return partial(gymnasium.make, id, disable_env_checker=True, **drawing)
