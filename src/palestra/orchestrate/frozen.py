"""Frozen models: engines whose weights never change say how likely they find what the policy sampled.

Consumes: finished rollouts. Produces: the log-probability of every sampled token under each frozen model.
Waits for: those engines, `engine.call_s` for an answer and `engine.healthy_s` for one that is started again; for all
that is asked before, `train.batch_deadline_s`.
Woken by: groups that are ready to train (so it runs beside generation), and the shipper, who needs the answers.
Ends when: cancelled. Nothing of it is in the journal: tokens and weights give the same numbers again, so the ready
groups are asked about once more after a restart; a batch that was shipped has them in its file.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palestra.config.schema import Frozen, RunConfig
from palestra.core.deadline import within
from palestra.core.errors import DeadlineError, InfrastructureError, UserError
from palestra.core.ledger import Ledger, LedgerEntry
from palestra.core.metrics import Mean, Metrics
from palestra.core.records import RolloutRecord, Sample
from palestra.wire.policy import EngineClient, EngineError, UnreachableError
from palestra.wire.rundir import Attempt

Logprobs = dict[str, dict[int, list[NDArray[np.float32]]]]
"""By frozen model and rollout, an array for each of its samples, seat after seat: [T], NaN where there is no answer."""

Spawn = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]

_TRIES = 4  # of one sample, each after the engine said that it is healthy


def require_same_tokens(policy: str, frozen: Mapping[str, Frozen]) -> None:
    """Compares tokenizers where both are on this machine.

    Errors: UserError naming the model whose token ids mean something else.
    """
    own = _vocabulary(policy)
    for name, model in frozen.items():
        if own is not None and (theirs := _vocabulary(model.path)) is not None and theirs != own:
            raise UserError(
                f"algo.{name}.path={model.path} has other tokens than the policy ({policy}): it would judge other "
                "texts; give a model with the same tokenizer.json"
            )


def _vocabulary(path: str) -> Any:
    file = Path(path).expanduser() / "tokenizer.json"
    if not file.exists():
        return None
    tokenizer = json.loads(file.read_bytes())
    added = [(token["id"], token["content"]) for token in tokenizer.get("added_tokens", [])]
    return tokenizer["model"].get("vocab"), added


class FrozenEngine:
    """One engine. Its ledger books what the engine process does."""

    def __init__(
        self,
        name: str,
        client: EngineClient,
        ledger: Ledger,
        *,
        max_in_flight: int,
        max_model_len: int,
        call_s: float,
        healthy_s: float,
        turn_s: float,
    ):
        """`turn_s`: how long a sample may wait until those before it are answered."""
        self.name, self.client, self.ledger = name, client, ledger
        self._slots, self._num_asked = asyncio.Semaphore(max_in_flight), 0
        self._room = max_model_len - 1  # the engine wants to sample a token behind what it is asked about
        self._call_s, self._healthy_s, self._turn_s = call_s, healthy_s, turn_s

    async def start(self) -> None:
        """Errors: DeadlineError, if it does not become healthy."""
        await self.client.wait_healthy(self._healthy_s)
        self.ledger.switch("idle")

    async def logprobs(self, sample: Sample) -> NDArray[np.float32]:
        """[T] at temperature 1. NaN for the first token, which follows nothing, and for the last one of a sample that
        fills the whole context. Errors: InfrastructureError, if the engine gave no answer in several tries."""
        await within(self._turn_s, self._slots.acquire(), waiting_for=f"a turn at {self.name}")
        self._book(1)
        try:
            answer = await self._ask(sample.token_ids[: self._room])
        finally:
            self._book(-1)
            self._slots.release()
        padded = np.full(len(sample.token_ids), np.nan, np.float32)
        padded[1 : 1 + len(answer)] = answer
        return padded

    async def _ask(self, token_ids: Sequence[int]) -> list[float]:
        error: Exception | None = None
        for _ in range(_TRIES):
            if error is not None:
                await self.client.wait_healthy(self._healthy_s)
            try:
                return await self.client.score(token_ids, deadline_s=self._call_s)
            except (UnreachableError, DeadlineError, EngineError) as failure:
                error = failure
        raise InfrastructureError(
            f"{self.name} could not say how likely {len(token_ids)} tokens are, in {_TRIES} tries: {error}; "
            f"see logs/{self.name}.log"
        )

    def _book(self, change: int) -> None:
        self._num_asked += change
        cause = "score" if self._num_asked else "idle"
        if self.ledger.cause != cause:
            self.ledger.switch(cause)


def make_frozen(
    config: RunConfig, attempt: Attempt, make_client: Callable[[str], EngineClient], ledger: Callable[[str], Ledger]
) -> dict[str, FrozenEngine]:
    """The engines behind those of the policy, in the order of `algo.frozen`."""
    urls = attempt.engines[len(attempt.engines) - len(config.algo.frozen) :]
    return {
        name: FrozenEngine(
            f"{name}-0",
            make_client(url),
            ledger(f"{name}-0"),
            max_in_flight=model.max_in_flight,
            max_model_len=config.engine.max_model_len,
            call_s=config.engine.call_s,
            healthy_s=config.engine.healthy_s,
            turn_s=config.train.batch_deadline_s,
        )
        for url, (name, model) in zip(urls, config.algo.frozen.items(), strict=True)
    }


class FrozenModels:
    """All frozen models of a run; there may be none. `spawn` starts a task whose error ends the loop."""

    def __init__(self, engines: dict[str, FrozenEngine], spawn: Spawn, *, deadline_s: float):
        """`deadline_s`: how long the answers about one rollout may take, with all that is asked before."""
        self._engines, self._spawn, self._deadline_s = engines, spawn, deadline_s
        self._asked: dict[int, asyncio.Task[dict[str, list[NDArray[np.float32]]]]] = {}  # by rollout

    async def start(self) -> None:
        async with asyncio.TaskGroup() as starting:
            for engine in self._engines.values():
                starting.create_task(engine.start())

    def begin(self, records: Iterable[RolloutRecord]) -> None:
        """Ask about rollouts that will train soon; at most once about each."""
        for record in records if self._engines else ():
            if record.rollout_id not in self._asked:
                self._asked[record.rollout_id] = self._spawn(self._ask(record))

    def has_answers(self, records: Iterable[RolloutRecord]) -> bool:
        """Whether everything is known about these rollouts."""
        asked = [self._asked.get(record.rollout_id) for record in records] if self._engines else []
        return all(task is not None and task.done() for task in asked)

    async def wait(self, records: Sequence[RolloutRecord]) -> None:
        """Until it is, or until they were forgotten."""
        self.begin(records)
        asked = [self._asked[record.rollout_id] for record in records]
        waiting_for = f"the answers of {' and '.join(self._engines)} about {len(asked)} rollouts"
        await within(self._deadline_s, asyncio.wait(asked), waiting_for=waiting_for)

    def take(self, records: Iterable[RolloutRecord]) -> Logprobs:
        """The answers about rollouts that it has answers about; they are handed out once."""
        found: Logprobs = {name: {} for name in self._engines}
        for record in records if self._engines else ():
            for name, answers in self._asked.pop(record.rollout_id).result().items():
                found[name][record.rollout_id] = answers
        return found

    def forget(self, rollout_ids: Iterable[int]) -> None:
        """They will never train."""
        for rollout_id in rollout_ids:
            if (asked := self._asked.pop(rollout_id, None)) is not None:
                asked.cancel()

    def cancel(self) -> None:
        self.forget(list(self._asked))

    def close_ledgers(self) -> list[LedgerEntry]:
        return [engine.ledger.close() for engine in self._engines.values()]

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.client.close()

    async def _ask(self, record: RolloutRecord) -> dict[str, list[NDArray[np.float32]]]:
        samples = [sample for seat in record.seats for sample in seat.samples]
        pairs = [(name, sample) for name in self._engines for sample in samples]
        asking = asyncio.gather(*(self._engines[name].logprobs(sample) for name, sample in pairs))
        waiting_for = f"the answers of {' and '.join(self._engines)} about rollout {record.rollout_id}"
        answers = await within(self._deadline_s, asking, waiting_for=waiting_for)
        found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self._engines}
        for (name, _), answer in zip(pairs, answers, strict=True):
            found[name].append(answer)
        return found


def frozen_metrics(records: Sequence[RolloutRecord], logprobs: Logprobs) -> Metrics:
    """`frozen/NAME/kl`: mean of engine - frozen logprob over the sampled tokens: an estimate of KL(policy, frozen)."""
    metrics: Metrics = {}
    for name, of_rollout in logprobs.items():
        total, count = 0.0, 0
        for record in records:
            samples = [sample for seat in record.seats for sample in seat.samples]
            for sample, answer in zip(samples, of_rollout.get(record.rollout_id, []), strict=False):
                known = (np.asarray(sample.sampled) != 0) & ~np.isnan(answer)
                total += float((np.asarray(sample.logprobs) - answer)[known].sum())
                count += int(known.sum())
        metrics[f"frozen/{name}/kl"] = Mean(total, count)
    return metrics
