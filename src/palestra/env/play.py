"""Play one rollout and score it. What environment code raises becomes the rollout's ending, never a reward."""

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from palestra.core.errors import InfrastructureError, UserError
from palestra.core.records import Ending, PieceCredit, RolloutRecord, Seat, Task
from palestra.env.agent import Agent, Door, Frozen, Table
from palestra.env.endings import AgentError, Limit, Unplayable
from palestra.env.environment import Environment, limits_of, sandboxes, seats, tools_of
from palestra.env.rollout import Rollout
from palestra.env.sandbox import sandboxes_here
from palestra.env.scoring import RAISED, InvalidRollout, describe, earn, number, unless_cancelled
from palestra.env.voice import Script, ScriptVoice, Voice

_encode = msgspec.msgpack.Encoder().encode
_decode_task, _decode_record = msgspec.msgpack.Decoder(Task).decode, msgspec.msgpack.Decoder(RolloutRecord).decode


async def play(
    environment: Environment,
    task: Task,
    make_voice: Callable[[str], Voice],
    *,
    rollout_id: int = 0,
    source: str = "",
    seed: int = 0,
    frozen: Collection[str] = (),
    admit: Callable[[Agent], Door] | None = None,
) -> RolloutRecord:
    """One attempt at `task`. `make_voice` is called with the name of each seat, in the order of `run`'s parameters.

    `admit` lets programs in that speak for an agent. Seats in `frozen`, and those that the environment declares so, are
    no part of the record: what they were given as rewards are metrics. So are those of several seats that train.

    Endings: ok; truncated, if a limit of turns or tokens ended `run`; failed, if it raised AgentError; all three are
    scored. Anything else that is raised, by `run` or by a reward, makes the rollout invalid: no reward, no samples.
    Errors: UserError naming the environment, if the policy cannot be given what it sends; a cancelled rollout is
    cancelled.
    """
    started, given = time.perf_counter(), _as_given(task)
    agents, table = seat_agents(environment, make_voice, seed=seed, frozen=frozen, admit=admit)
    try:
        ending, error = await _run(environment, task, agents, table)
        record = await _scored_sendably(environment, task, agents, ending)
    except Unplayable as unplayable:
        raise UserError(_unplayable(source or type(environment).__name__, unplayable)) from unplayable
    except InvalidRollout as invalid:
        ending, error = Ending.INVALID, str(invalid).encode("utf-8", "backslashreplace").decode()
        record = _invalid(task, agents, given)
    return msgspec.structs.replace(
        record,
        rollout_id=rollout_id,
        environment=source,
        error=error,
        wall_s=time.perf_counter() - started,
        ended_at=time.time(),
    )


def seat_agents(
    environment: Environment,
    make_voice: Callable[[str], Voice],
    *,
    seed: int,
    frozen: Collection[str] = (),
    admit: Callable[[Agent], Door] | None = None,
) -> tuple[list[Agent], Table]:
    table = Table(limits_of(environment), seed=seed, admit=admit)
    system, tools = environment.system, tools_of(environment)
    agents: list[Agent] = []
    for name, kind in seats(type(environment)).items():
        if kind is Frozen:
            agents.append(Frozen(name, make_voice(name), table))
        else:
            made = Frozen if name in frozen else Agent
            agents.append(made(name, make_voice(name), table, system=system, tools=tools))
    return agents, table


async def score(environment: Environment, task: Task, replies: Script | Mapping[str, Script]) -> RolloutRecord:
    """What agents that give these replies, one a turn, would earn; without a model. By seat, or in the order of turns
    whoever has them."""
    by_seat = isinstance(replies, Mapping)
    scripts = {name: ScriptVoice(of_seat) for name, of_seat in replies.items()} if by_seat else {}
    shared = ScriptVoice(() if by_seat else replies)
    return await play(environment, task, lambda seat: scripts.get(seat, shared))


async def _run(environment: Environment, task: Task, agents: list[Agent], table: Table) -> tuple[Ending, str]:
    """How `run` ended, and the limit's or the agent's words. Sandboxes last as long as it. Errors: InvalidRollout,
    Unplayable."""
    raised: BaseException | None = None
    try:
        async with AsyncExitStack() as closing:
            given: dict[str, Any] = {agent.name: agent for agent in agents}
            if names := sandboxes(type(environment)):
                opening = sandboxes_here().opened(task, count=len(names), egress=environment.egress)
                given |= zip(names, await closing.enter_async_context(opening), strict=True)
            await environment.run(task, **given)
    except RAISED as error:
        unless_cancelled(error)
        raised = error
    finally:
        await table.close()
    return _ending(raised, table.stopped)


def _unplayable(environment: str, why: Unplayable) -> str:
    return (
        f"environment {environment!r} cannot be played in tokens: {why}, measure it where images are seen "
        "(palestra eval ... --base-url URL --model NAME), or give the seat that sees them a model of its own (`seats`)"
    )


def _ending(raised: BaseException | None, stopped: BaseException | None) -> tuple[Ending, str]:
    """From what `run` raised, and the first limit or failure of a turn, which `run` may have caught.

    Errors: InvalidRollout, Unplayable.
    """
    if isinstance(stopped, Unplayable):
        raise stopped
    if isinstance(stopped, InfrastructureError):
        raise InvalidRollout(str(stopped))
    if stopped is not None and not isinstance(stopped, Limit | AgentError):
        raise InvalidRollout(describe("a turn", stopped))
    broken = raised if raised is not None and not _is_limit(raised) else stopped
    if isinstance(broken, AgentError):
        return Ending.FAILED, str(broken)
    if raised is not None and not _is_limit(raised):
        raise InvalidRollout(describe("run", raised))
    return (Ending.OK, "") if stopped is None else (Ending.TRUNCATED, str(stopped))


def _is_limit(raised: BaseException) -> bool:
    """Agents that play at the same time may reach their limits together."""
    if isinstance(raised, BaseExceptionGroup):
        return all(_is_limit(inner) for inner in raised.exceptions)
    return isinstance(raised, Limit)


async def _scored_sendably(environment: Environment, task: Task, agents: list[Agent], ending: Ending) -> RolloutRecord:
    """Errors: InvalidRollout, also where `run` put things of its own in the place of what agents are made of."""
    try:
        record = await _scored(environment, task, agents, ending)
        require_sendable(record)
    except (InvalidRollout, UserError):
        raise
    except Exception as error:
        raise InvalidRollout(describe("what run left", error)) from error
    return record


async def _scored(environment: Environment, task: Task, agents: list[Agent], ending: Ending) -> RolloutRecord:
    """Where one seat trains its own rewards are part of the rollout's; several seats keep theirs, and they are metrics.

    Errors: InvalidRollout.
    """
    training = _training(agents)
    own = [_own(agent) for agent in training]
    aside = agents if len(training) > 1 else [agent for agent in agents if isinstance(agent, Frozen)]
    record = _conversation(task, agents, ending)
    rollout = Rollout(
        messages=record.messages,
        num_turns=record.num_turns,
        num_tokens=record.num_tokens,
        ending=ending,
        rewards=own[0] if len(training) == 1 else {},
    )
    earned = await earn(environment, task, rollout)
    seated = [
        Seat(
            name=agent.name,
            samples=agent.samples,
            rewards=rewards,
            credits=_credits(agent),
            piece_credits=_piece_credits(agent),
        )
        for agent, rewards in zip(training, own, strict=True)
    ]
    theirs = {f"{agent.name}.{name}": amount for agent in aside for name, amount in _own(agent).items()}
    return msgspec.structs.replace(
        record,
        reward=earned.total,
        rewards=earned.rewards,
        metrics=_tool_metrics(training) | theirs | earned.metrics,
        seats=tuple(seated),
    )


def _training(agents: list[Agent]) -> list[Agent]:
    return [agent for agent in agents if not isinstance(agent, Frozen)]


def _own(agent: Agent) -> dict[str, float]:
    """What `run` gave it, by turn or not. Errors: InvalidRollout, for what is no number."""
    own = {name: number(f"{agent.name}.rewards[{name!r}]", amount) for name, amount in agent.rewards.items()}
    for of_turn in agent.credits.values():
        for name, amount in of_turn.items():
            own[name] = own.get(name, 0.0) + number(f"a credit of {agent.name} for {name!r}", amount)
    return own


def _credits(agent: Agent) -> dict[int, float]:
    """By turn; they are numbers, as `_own` has seen."""
    return {turn: float(sum(of_turn.values())) for turn, of_turn in agent.credits.items()}


def _piece_credits(agent: Agent) -> tuple[PieceCredit, ...]:
    return tuple(msgspec.structs.replace(piece, amount=float(piece.amount)) for piece in agent.piece_credits)


def _tool_metrics(agents: list[Agent]) -> dict[str, float]:
    boxes = [agent.tool_box for agent in agents if agent.tool_box]
    if not boxes:
        return {}
    calls, errors = sum(box.num_calls for box in boxes), sum(box.num_errors for box in boxes)
    return {"tool_calls": float(calls), "tool_errors": float(errors)}


def _as_given(task: Task) -> bytes:
    """As it is before environment code has it; of one that cannot be sent, its key."""
    try:
        return _encode(task)
    except (TypeError, ValueError, OverflowError):
        return _encode(Task(key=task.key))


def _invalid(task: Task, agents: list[Agent], given: bytes) -> RolloutRecord:
    """With what was said, if that is there and can be sent."""
    try:
        record = _conversation(task, agents, Ending.INVALID)
        require_sendable(record)
    except Exception:  # the rollout has its reason already
        return _conversation(_decode_task(given), [], Ending.INVALID)
    return record


def require_sendable(record: RolloutRecord) -> None:
    """What environment code and the model put into it must survive the wire. Errors: InvalidRollout."""
    seats = tuple(msgspec.structs.replace(seat, samples=()) for seat in record.seats)
    try:
        _decode_record(_encode(msgspec.structs.replace(record, seats=seats)))
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise InvalidRollout(
            f"messages, rewards, metrics or the task hold what cannot be sent: {error}; they are made of strings, "
            "numbers, lists and dicts, and their names are strings"
        ) from error


def _conversation(task: Task, agents: list[Agent], ending: Ending) -> RolloutRecord:
    """What the first seat that trains heard and said, without samples and rewards."""
    training = _training(agents)
    shown = training[0].shown if training else None
    return RolloutRecord(
        rollout_id=0,
        environment="",
        task=task,
        ending=ending,
        messages=shown.last_words[0] if shown else [],
        tools=shown.schemas if shown else [],
        num_turns=shown.last_words[1] if shown else 0,
        num_tokens=sum(agent.num_said for agent in training),
        num_prompt_tokens=sum(agent.num_heard for agent in training),
    )
