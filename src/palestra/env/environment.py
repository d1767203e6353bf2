"""An environment: tasks, one coroutine that plays a rollout, and rewards."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import Parameter
from typing import Any, ClassVar, Literal, TypeVar, get_origin, get_type_hints, overload

import msgspec

from palestra.core.errors import UserError
from palestra.core.records import Task
from palestra.env.agent import Agent, Frozen, Limits
from palestra.env.tools import Tool, tool
from palestra.sandbox.box import Sandbox

Method = TypeVar("Method", bound=Callable[..., Any])

_MARK = "_palestra_scorer"


@dataclass(frozen=True)
class Scorer:
    """A method marked `@reward` or `@metric`. A metric is recorded and never trained on."""

    name: str
    kind: Literal["reward", "metric"]
    weight: float = 1.0
    group: bool = False


class Environment:
    """Base of every environment. Annotated public attributes are its arguments, set from a recipe's `args`.

    One instance plays many rollouts at once, so the state of a rollout lives in `run`, never on `self`. `__init__` is
    called once per process and epoch; what is slow to load belongs in `tasks`.
    """

    system: str | None = None  # the system message every agent starts with
    max_turns: int | None = None  # per agent; None: until the context is full
    max_tokens: int | None = None  # sampled, per agent; None: until the context is full
    tool_s: float = 60.0  # a call of a tool that takes longer is stopped, and the model told so
    tools: ClassVar[Sequence[Callable[..., Any]]] = ()  # of every agent: functions, or methods of this class
    egress: ClassVar[Sequence[str]] = ()  # hosts that programs in its sandboxes may reach: "pypi.org", "*.python.org"
    checked_with: ClassVar[Sequence[Mapping[str, Any]]] = ({},)  # arguments that `palestra env check` tries
    checked_tasks: ClassVar[int] = 20  # how many tasks it looks at

    def __init__(self, *, split: str = "train", seed: int = 0, **args: Any):
        """Errors: UserError naming the argument, what it got and what there is."""
        self.split, self.seed = split, seed
        known = arguments(type(self))
        for name, value in args.items():
            setattr(self, name, _converted(type(self).__name__, name, value, known))
        missing = [name for name in known if not hasattr(self, name)]
        if missing:
            raise UserError(f"environment {type(self).__name__} needs args.{missing[0]}; set it in the recipe's entry")

    @cached_property
    def _tools(self) -> tuple[Tool, ...]:
        own = {id(method): name for base in type(self).__mro__ for name, method in vars(base).items()}
        return tuple(tool(getattr(self, own[id(one)]) if id(one) in own else one) for one in self.tools)

    def tasks(self) -> Iterable[Task]:
        """The problems, finite or endless; the order depends on `self.split`, `self.seed` and the arguments alone."""
        raise NotImplementedError(f"{type(self).__name__}.tasks is not written; yield Task(prompt=...) from it")

    def mutants(self, task: Task) -> Iterable[Any]:
        """Replies as in `task.gold`, which look right and are wrong: `palestra env check` sees that they earn less."""
        return ()

    async def run(self, task: Task, agent: Agent) -> None:
        """Play one rollout. The default is turns until a reply calls no tool, so one turn where there are no tools.

        Every further parameter of an override is another agent's seat; one annotated `Frozen` never trains, and one
        annotated `Sandbox` is where programs run.
        """
        await agent(task.prompt)


@overload
def reward(method: Method, /) -> Method: ...
@overload
def reward(*, weight: float = 1.0, group: bool = False) -> Callable[[Method], Method]: ...
def reward(method: Any = None, /, *, weight: float = 1.0, group: bool = False) -> Any:
    """Mark a method `(self, task, rollout) -> number`, sync or async, as part of the reward.

    With `group` it is `(self, task, rollouts) -> one number per rollout`, called when all rollouts of a task ended.
    If it raises, the rollout has no reward: it is played again, never scored 0.
    """

    def mark(method: Method) -> Method:
        return _mark(method, Scorer(method.__name__, "reward", weight, group))

    return mark if method is None else mark(method)


def metric(method: Method) -> Method:
    """Mark a method `(self, task, rollout) -> number`, sync or async, that is recorded beside the reward."""
    return _mark(method, Scorer(method.__name__, "metric"))


def _mark(method: Method, scorer: Scorer) -> Method:
    parameters = list(inspect.signature(method).parameters)
    if len(parameters) != 3:
        raise TypeError(
            f"@{scorer.kind} {method.__qualname__} takes ({', '.join(parameters)}); it must take "
            f"(self, task, {'rollouts' if scorer.group else 'rollout'})"
        )
    setattr(method, _MARK, scorer)
    return method


@cache
def scorers(environment: type[Environment]) -> tuple[Scorer, ...]:
    """Marked methods in the order they are written, base classes first; an override must be marked again."""
    names = dict.fromkeys(name for base in reversed(environment.__mro__) for name in vars(base))
    marks = [getattr(getattr(environment, name, None), _MARK, None) for name in names]
    return tuple(mark for mark in marks if mark is not None)


def has_group_rewards(environment: type[Environment]) -> bool:
    return any(scorer.group for scorer in scorers(environment))


def tools_of(environment: Environment) -> tuple[Tool, ...]:
    """What every agent of it may call. Errors: UserError, if one of them cannot be a tool."""
    return environment._tools


def limits_of(environment: Environment) -> Limits:
    return Limits(environment.max_turns, environment.max_tokens, environment.tool_s)


@cache
def parameters(environment: type[Environment]) -> Mapping[str, type]:
    """What `run` asks for beside the task, by name: Agent, Frozen or Sandbox. Errors: UserError for anything else."""
    _, _, *found = inspect.signature(environment.run).parameters.values()
    kinds: dict[Any, type] = {Parameter.empty: Agent}
    kinds |= {name: kind for kind in (Agent, Frozen, Sandbox) for name in (kind, kind.__name__)}
    for parameter in found:
        if parameter.annotation not in kinds:
            raise UserError(
                f"{environment.__name__}.run has the parameter {parameter}, which is not an Agent; leave its "
                "annotation out, or make it Agent, Frozen for a seat that never trains, or Sandbox"
            )
    return {parameter.name: kinds[parameter.annotation] for parameter in found}


def sandboxes(environment: type[Environment]) -> list[str]:
    """Parameters of `run` that are sandboxes."""
    return [name for name, kind in parameters(environment).items() if kind is Sandbox]


@cache
def seats(environment: type[Environment]) -> Mapping[str, type[Agent]]:
    """The agents `run` asks for, by name. Errors: as of `parameters`; UserError, if none can train."""
    found = {name: kind for name, kind in parameters(environment).items() if issubclass(kind, Agent)}
    if Agent not in found.values():
        raise UserError(f"{environment.__name__}.run has no Agent but frozen ones; one of its parameters must train")
    return found


@cache
def arguments(environment: type[Environment]) -> dict[str, Any]:
    """Names and types of what a recipe's `args` may set."""
    return {
        name: hint
        for name, hint in get_type_hints(environment).items()
        if not name.startswith("_") and get_origin(hint) is not ClassVar
    }


def _converted(environment: str, name: str, value: Any, known: dict[str, Any]) -> Any:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(sorted(known))}"
        raise UserError(f"environment {environment} has no argument {name!r} (got {value!r}); {hint}")
    try:
        return msgspec.convert(value, known[name])
    except msgspec.ValidationError as error:
        raise UserError(f"environment {environment}: args.{name}={value!r}: {error}".replace("`", "")) from None
