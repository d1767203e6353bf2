"""Play one rollout and score it. What environment code raises becomes the rollout's ending, never a reward."""

import time
from collections.abc import Callable, Iterable

import msgspec

from palestra.core.errors import InfrastructureError
from palestra.core.records import Ending, RolloutRecord, Seat, Task
from palestra.env.agent import Agent, Table
from palestra.env.environment import Environment, seats
from palestra.env.rollout import AgentError, Rollout
from palestra.env.scoring import RAISED, InvalidRollout, describe, earn, number, unless_cancelled
from palestra.env.voice import Limit, ScriptVoice, Voice

_encode = msgspec.msgpack.Encoder().encode
_decode_task, _decode_record = msgspec.msgpack.Decoder(Task).decode, msgspec.msgpack.Decoder(RolloutRecord).decode


async def play(
    environment: Environment,
    task: Task,
    make_voice: Callable[[], Voice],
    *,
    rollout_id: int = 0,
    source: str = "",
    seed: int = 0,
) -> RolloutRecord:
    """One attempt at `task`. `make_voice` is called once per seat, in the order of `run`'s parameters.

    Endings: ok; truncated, if a limit of turns or tokens ended `run`; failed, if it raised AgentError; all three are
    scored. Anything else that is raised, by `run` or by a reward, makes the rollout invalid: no reward, no samples.
    Errors: none, save that a cancelled rollout is cancelled.
    """
    started, given = time.perf_counter(), _as_given(task)
    table = Table(max_turns=environment.max_turns, seed=seed)
    agents = [Agent(name, make_voice(), table, system=environment.system) for name in seats(type(environment))]
    try:
        ending, error = await _run(environment, task, agents, table)
        record = await _scored(environment, task, agents, ending)
        require_sendable(record)
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


async def score(environment: Environment, task: Task, replies: Iterable[str]) -> RolloutRecord:
    """What agents that give these replies, one a turn, would earn; without a model."""
    script = ScriptVoice(replies)
    return await play(environment, task, lambda: script)


async def _run(environment: Environment, task: Task, agents: list[Agent], table: Table) -> tuple[Ending, str]:
    """How `run` ended, and the limit's or the agent's words. Errors: InvalidRollout."""
    raised: BaseException | None = None
    try:
        await environment.run(task, *agents)
    except RAISED as error:
        unless_cancelled(error)
        raised = error
    return _ending(raised, table.stopped)


def _ending(raised: BaseException | None, stopped: BaseException | None) -> tuple[Ending, str]:
    """From what `run` raised, and the first limit or failure of a turn, which `run` may have caught."""
    if isinstance(stopped, InfrastructureError):
        raise InvalidRollout(str(stopped))
    if stopped is not None and not isinstance(stopped, Limit):
        raise InvalidRollout(describe("a turn", stopped))
    if isinstance(raised, AgentError):
        return Ending.FAILED, str(raised)
    if raised is not None and not _is_limit(raised):
        raise InvalidRollout(describe("run", raised))
    return (Ending.OK, "") if stopped is None else (Ending.TRUNCATED, str(stopped))


def _is_limit(raised: BaseException) -> bool:
    """Agents that play at the same time may reach their limits together."""
    if isinstance(raised, BaseExceptionGroup):
        return all(_is_limit(inner) for inner in raised.exceptions)
    return isinstance(raised, Limit)


async def _scored(environment: Environment, task: Task, agents: list[Agent], ending: Ending) -> RolloutRecord:
    """With one seat its own rewards are part of the rollout's; several seats keep theirs. Errors: InvalidRollout."""
    own = [
        {name: number(f"{agent.name}.rewards[{name!r}]", amount) for name, amount in agent.rewards.items()}
        for agent in agents
    ]
    record = _conversation(task, agents, ending)
    rollout = Rollout(
        messages=record.messages,
        num_turns=record.num_turns,
        num_tokens=sum(agent.num_tokens for agent in agents),
        ending=ending,
        rewards=own[0] if len(agents) == 1 else {},
    )
    earned = await earn(environment, task, rollout)
    seated = [
        Seat(name=agent.name, samples=agent.samples, rewards=rewards)
        for agent, rewards in zip(agents, own, strict=True)
    ]
    return msgspec.structs.replace(
        record, reward=earned.total, rewards=earned.rewards, metrics=earned.metrics, seats=tuple(seated)
    )


def _as_given(task: Task) -> bytes:
    """As it is before environment code has it; of one that cannot be sent, its key."""
    try:
        return _encode(task)
    except (TypeError, ValueError, OverflowError):
        return _encode(Task(key=task.key))


def _invalid(task: Task, agents: list[Agent], given: bytes) -> RolloutRecord:
    """With what was said, if that can be sent."""
    record = _conversation(task, agents, Ending.INVALID)
    try:
        require_sendable(record)
    except InvalidRollout:
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
    """What the first seat heard and said, without samples and rewards."""
    return RolloutRecord(
        rollout_id=0,
        environment="",
        task=task,
        ending=ending,
        messages=agents[0].messages if agents else [],
        num_turns=agents[0].num_turns if agents else 0,
    )
