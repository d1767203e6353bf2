"""Versions that are sent: vLLM's own classes at both ends, queues in the place of NCCL's process group.

No GPU has seen this. What is tested is the contract: who says what to whom, in which order, and that what the engines
load is what the trainer had.
"""

import asyncio
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config.weight_transfer import WeightTransferConfig

from palestra.core.errors import DeadlineError, InfrastructureError, PublishError
from palestra.wire.sending import Sending
from palestra.wire.weights import sender
from palestra.wire.weights.sender import Sender, StuckError
from tests.unit.wire.meeting import CPU, Alone, Meeting, Trainer, stand_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, as vLLM's layers are imported
    from palestra.wire.weights.vllm_sent import SentEngine

LATE_S = 1.0


@pytest.fixture
def meeting(monkeypatch) -> Meeting:
    return stand_in(monkeypatch)


class Toy(nn.Module):
    """Takes whatever it is given, and says so."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, torch.Tensor] = {}

    def load_weights(self, weights) -> set[str]:
        taken = {name: tensor.clone() for name, tensor in weights}
        self.found |= taken
        return set(taken)


class Engine:
    """An engine process as the orchestrator's client sees it; `expects` are the names without which it refuses."""

    def __init__(self, expects: set[str], monkeypatch, *, fails: bool = False):
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.model, self._expects, self._fails = Toy(), expects, fails
        self._engine = SentEngine(WeightTransferConfig(backend="files-or-nccl"), config, CPU, self.model)
        self.calls: list[str] = []

    def _begin(self) -> None:
        def require_complete(names: set[str]) -> None:
            if missing := self._expects - names:
                raise InfrastructureError(f"the publish does not cover the model: {sorted(missing)}")

        self._engine._coverage = SimpleNamespace(require_complete=require_complete, fed_by_others=list)  # type: ignore[assignment]
        self._engine._complete = False

    async def init_transfer(self, info: dict[str, Any], *, deadline_s: float) -> None:
        self.calls.append(f"init at {info['rank_offset']} of {info['world_size']}")
        await asyncio.to_thread(self._engine.init_transfer_engine, self._engine.parse_init_info(info))

    async def update_by_transfer(self, info: dict[str, Any], *, deadline_s: float) -> None:
        self.calls.append("update")
        if self._fails:
            raise InfrastructureError("the engine died")
        self._begin()
        await asyncio.to_thread(self._engine.update_weights, info)
        self._engine.finish_weight_update()


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(7, 4, generator=generator),
        "model.layers.0.proj.weight": torch.randn(4, 6, generator=generator).to(torch.bfloat16),
        "model.layers.1.gate.e_score_correction_bias": torch.randn(5, generator=generator),  # a buffer
        "model.layers.1.slice": torch.arange(12.0).reshape(3, 4).T + seed,
    }


def holds(engine: Engine, tensors: dict[str, torch.Tensor]) -> bool:
    return engine.model.found.keys() == tensors.keys() and all(
        torch.equal(engine.model.found[name], tensor) for name, tensor in tensors.items()
    )


async def test_what_engines_load_is_what_the_trainer_has(meeting, monkeypatch):
    trainer, first, second = Trainer(weights(1)), *(Engine(set(weights(1)), monkeypatch) for _ in range(2))
    offer = trainer.sender.prepare("1")
    assert offer is not None
    assert offer.sent_bytes == offer.full_bytes == sum(tensor.nbytes for tensor in weights(1).values())
    assert await trainer.send_to(first, second) == [None, None]
    assert holds(first, weights(1))
    assert holds(second, weights(1))
    assert (first.calls, second.calls) == (["init at 1 of 3", "update"], ["init at 2 of 3", "update"])
    trainer.tensors = weights(2)
    assert await trainer.send_to(first, second) == [None, None]
    assert holds(second, weights(2))
    assert first.calls[2:] == ["update"], "who has met meets no more"
    assert not holds(first, weights(1)), "control"


async def test_others_than_before_meet_anew(meeting, monkeypatch):
    trainer, first, second = Trainer(weights(1)), *(Engine(set(weights(1)), monkeypatch) for _ in range(2))
    await trainer.send_to(first, second)
    assert await trainer.send_to(second) == [None]
    assert second.calls[2:] == ["init at 1 of 2", "update"]
    assert meeting.worlds == [3, 2]


async def test_an_engine_that_fails_before_the_trainer_begins_is_left_out(meeting, monkeypatch):
    trainer, engine = Trainer(weights(1)), Engine(set(weights(1)), monkeypatch)
    dead: Any = object()
    trainer.sending = Sending([dead, engine], trainer.begin, width=1)  # type: ignore[list-item]
    receiving = asyncio.create_task(trainer.sending.into(engine, deadline_s=20))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    assert not engine.calls, "it waits for the other"
    await trainer.sending.leave(dead)
    async with asyncio.timeout(60):
        await receiving
    assert holds(engine, weights(1))


async def test_an_engine_that_dies_while_it_receives_ends_the_send_by_its_deadline(meeting, monkeypatch):
    """The others hear why; the next send, to whoever is there, meets anew."""
    trainer = Trainer(weights(1), deadline_s=LATE_S)
    dead, other = Engine(set(), monkeypatch, fails=True), Engine(set(weights(1)), monkeypatch)
    first, second = await trainer.send_to(dead, other)
    assert isinstance(first, InfrastructureError)
    assert isinstance(second, PublishError)
    assert f"waited {LATE_S:.0f} s for engines to receive a version (sync.deadline_s)" in str(second)
    trainer.error, trainer.met, trainer.deadline_s = "", [], 20
    again = Engine(set(weights(1)), monkeypatch)
    assert await trainer.send_to(again) == [None]
    assert holds(again, weights(1))


async def test_a_version_that_lacks_something_is_refused_by_the_engine(meeting, monkeypatch):
    trainer, engine = Trainer(weights(1)), Engine({*weights(1), "lm_head.weight"}, monkeypatch)
    [failure] = await trainer.send_to(engine)
    assert isinstance(failure, InfrastructureError)
    assert "does not cover the model: ['lm_head.weight']" in str(failure)


async def test_a_trainer_that_dies_keeps_nobody_waiting(meeting, monkeypatch):
    trainer, engine = Trainer(weights(1)), Engine(set(), monkeypatch)

    async def begin(engines) -> bool:
        return True

    sending = Sending([engine], begin, width=1)  # type: ignore[list-item]
    receiving = asyncio.create_task(sending.into(engine, deadline_s=20))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    sending.sent(error="it has died")
    with pytest.raises(PublishError, match="could not send the version: it has died"):
        await receiving
    assert trainer.error == ""


def test_a_send_that_nothing_can_break_off_ends_the_trainer(monkeypatch):
    """One that is stuck before it met anybody is left alone: it will transfer nothing."""
    let_go, transferred = threading.Event(), []
    monkeypatch.setattr(sender, "_ABORTED_S", 0.1)

    class Stuck(Sender):
        waits_in = "_transfer"

        def _meet(self, client, num_workers) -> Any:
            if self.waits_in == "_meet":
                let_go.wait(20)
            return SimpleNamespace(client=client, shutdown=lambda: None)

        def _transfer(self, engine) -> None:
            self._told.put(("failed", DeadlineError("engines", 20)))
            let_go.wait(20)
            transferred.append(self.waits_in)

    def send(sends: Sender, *, deadline_s: float) -> None:
        sends.send(lambda *_: None, num_workers=1, is_new_group=True, deadline_s=deadline_s)

    with pytest.raises(StuckError, match="a send is stuck"):
        send(Stuck(dict[str, torch.Tensor]().items, ranks=Alone(), host=""), deadline_s=20)
    meets = Stuck(dict[str, torch.Tensor]().items, ranks=Alone(), host="")
    meets.waits_in = "_meet"
    with pytest.raises(InfrastructureError, match=r"waited 0\.1 s for engines to receive a version"):
        send(meets, deadline_s=0.1)
    stuck = [thread for thread in threading.enumerate() if thread.name.endswith("(_work)")]
    let_go.set()
    for thread in stuck:
        thread.join(20)
    assert (len(stuck), transferred) == (2, ["_transfer"])
