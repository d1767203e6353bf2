"""How many of the devices should train, and how many sample."""

from dataclasses import dataclass, replace

from palestra.core.errors import UserError
from palestra.orchestrate.simulate.curves import Curves
from palestra.orchestrate.simulate.loop import simulate
from palestra.orchestrate.simulate.outcome import Outcome
from palestra.orchestrate.simulate.rules import Rules

_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the devices, for the trainer: tried first
_HALVINGS = 3  # rounds that look between the best split and its neighbours


@dataclass(frozen=True)
class Split:
    """`is_shared`: too few devices for both, so that they take turns on the same ones."""

    trainer_gpus: int
    engines: int
    outcome: Outcome
    is_shared: bool = False


def search(
    rules: Rules, curves: Curves, *, gpus: int, seed: int = 0, skip: int = 0, steps: int | None = None
) -> list[Split]:
    """The splits that were simulated, by engines; the best one has the shortest step.

    The step is short in between and long at both ends, so that the best of a few shares is looked around.
    Errors: UserError, if not even one engine fits.
    """
    width, fewest = curves.engine.gpus, curves.trainer.min_gpus
    if gpus < max(width, fewest):
        raise UserError(f"--gpus {gpus}: an engine needs {width} and the trainer {fewest}, on the same ones if need be")
    most = (gpus - fewest) // width
    if not most:
        return [_shared(rules, curves, gpus, seed, skip, steps)]
    known: dict[int, Split] = {}

    def look(engines: int) -> None:
        engines = min(max(engines, 1), most)
        if engines not in known:
            trainer_gpus = gpus - engines * width
            sizes = {"engines": engines, "trainer_gpus": trainer_gpus, "at_once": _at_once(rules, engines)}
            split = replace(rules, **sizes, is_shared=False)
            known[engines] = Split(trainer_gpus, engines, simulate(split, curves, seed=seed, skip=skip, steps=steps))

    for share in _SHARES:
        look(round(gpus * (1 - share) / width))
    for _ in range(_HALVINGS):
        tried = sorted(known)
        place = tried.index(best(list(known.values())).engines)
        for neighbour in (place - 1, place + 1):
            if 0 <= neighbour < len(tried):
                look(round((tried[place] + tried[neighbour]) / 2))
    return [known[engines] for engines in sorted(known)]


def best(splits: list[Split]) -> Split:
    return min(splits, key=lambda split: split.outcome.step_s)


def _at_once(rules: Rules, engines: int) -> int:
    """The same share of the engines at a time as the recipe has."""
    return max(round(rules.at_once / rules.engines * engines), 1)


def _shared(rules: Rules, curves: Curves, gpus: int, seed: int, skip: int, steps: int | None) -> Split:
    engines = gpus // curves.engine.gpus
    split = replace(rules, engines=engines, trainer_gpus=gpus, is_shared=True, at_once=engines)
    return Split(gpus, engines, simulate(split, curves, seed=seed, skip=skip, steps=steps), is_shared=True)
