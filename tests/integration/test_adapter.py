"""Adapters on the real engine: what it samples is the trainer's, in flight too, and a stale adapter is seen."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from palestra.config.schema import Lora
from palestra.core.errors import PublishError
from palestra.core.ledger import Ledger
from palestra.core.records import Reply, Sampling
from palestra.model.load import load_policy
from palestra.train.publish import Publisher
from palestra.wire.policy import EngineClient, UnpublishedError
from palestra.wire.publish import Kv, PublishReport, publish
from palestra.wire.weights.manifest import Staged, read_manifest, write_manifest
from tests.integration.engines import HEALTHY_S, Engine, engine_of_a_run
from tests.models import save_qwen3
from tests.one_rank import ranks_of_one

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [3 + (5 * position) % 27 for position in range(12)]
EXACT = 1e-4
TRIES = 5
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapted") / "qwen3"
    save_qwen3(directory)
    return directory


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """As a run with `model.lora` starts it."""
    directory = tmp_path_factory.mktemp("engine")
    with engine_of_a_run(model, directory, lora=LORA, env={"mix": [{"id": "reverse-text"}]}) as engine:
        yield engine


class Adapted:
    """The real trainer's policy and publisher; `step` moves the adapter as training would."""

    def __init__(self, model: Path, directory: Path):
        ranks = ranks_of_one()
        self.policy = load_policy(
            str(model),
            dtype=torch.float32,
            experts="grouped_mm",
            head_chunk_tokens=64,
            meshes=ranks.meshes,
            device=ranks.device,
            lora=Lora.model_validate(LORA),
        )
        self._publisher = Publisher(
            self.policy,
            ranks=ranks,
            directory=directory,
            attempt=1,
            dtype=torch.float32,
            probe_tokens=64,
            seed=0,
            base=str(model),
        )
        self.version = -1

    @torch.no_grad()
    def step(self, scale: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(100 + self.version)
        for parameter in self.policy.parameters():
            if parameter.requires_grad:
                local = parameter.to_local()  # type: ignore[attr-defined]
                local.add_(scale * torch.randn(local.shape, generator=generator))

    def stage(self) -> Staged:
        self.version += 1
        return self._publisher.stage(self.version, Ledger("test"))

    def score(self, token_ids: list[int]) -> list[float]:
        return self.policy.score(torch.tensor(token_ids)).tolist()


@pytest.fixture(scope="module")
def trainer(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(model, tmp_path_factory.mktemp("staged"))


@pytest.fixture
async def client(server: Engine, trainer: Adapted) -> AsyncIterator[EngineClient]:
    """A healthy engine that holds the trainer's adapter; the client of the test before is gone."""
    async with EngineClient(server.url) as client:
        await client.wait_healthy(HEALTHY_S)
        await publish_to(client, trainer.stage())
        yield client


async def publish_to(client: EngineClient, staged: Staged, kv: Kv = "keep") -> PublishReport:
    return await publish([client], staged, kv=kv, at_once=1, tolerance=EXACT, deadline_s=60)


def copied(staged: Staged, target: Path) -> Path:
    target.mkdir()
    for path in Path(staged.directory).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


async def test_versions_of_an_adapter_are_sampled_with_the_trainers_probabilities(
    client: EngineClient, trainer: Adapted
) -> None:
    """Version 0 is the base; of two more every token has its version's probability, and only adapters are sent."""
    base = trainer.score(PROMPT)
    assert await client.score(PROMPT) == pytest.approx(base, abs=EXACT)
    for _ in range(2):
        trainer.step()
        staged = trainer.stage()
        report = await publish_to(client, staged)
        assert report.max_gap <= EXACT
        [reply] = await client.generate(PROMPT, Sampling(max_tokens=100), seed=1, deadline_s=60)
        assert [span.version for span in reply.spans] == [staged.version]
        expected = trainer.score([*PROMPT, *reply.token_ids])[len(PROMPT) - 1 :]
        assert reply.logprobs == pytest.approx(expected, abs=EXACT)
        tensors = read_manifest(Path(staged.directory)).tensors
        assert all("lora_" in entry.name for entry in tensors)
    moved = max(abs(a - b) for a, b in zip(trainer.score(PROMPT), base, strict=True))
    assert moved > 100 * EXACT  # the control


async def test_a_request_in_flight_goes_on_with_the_new_adapter(client: EngineClient, trainer: Adapted) -> None:
    """Each stays the one that is used, with nothing else in the batch: after the last publish, whose caches are
    cleared, every token has the last version's probability, and the tokens before it the first's.
    """
    for _ in range(TRIES):
        first = trainer.version
        before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
        reply = await updated_twice_on_the_way(client, trainer)
        if reply is not None:
            break
    assert reply is not None, "it is always through before the engine is paused"
    assert [span.version for span in reply.spans] == [first, first + 1, first + 2]
    last = slice(reply.spans[-1].start, reply.spans[-1].end)
    whole = [*PROMPT, *reply.token_ids]
    after = trainer.score(whole)[len(PROMPT) - 1 :]
    assert reply.logprobs[last] == pytest.approx(after[last], abs=EXACT)
    trainer.policy.load_state_dict(before)
    once = trainer.score(whole)[len(PROMPT) - 1 :]
    early = slice(0, reply.spans[0].end)
    assert reply.logprobs[early] == pytest.approx(once[early], abs=EXACT)
    assert max(abs(a - b) for a, b in zip(reply.logprobs[last], once[last], strict=True)) > 100 * EXACT  # the control


async def updated_twice_on_the_way(client: EngineClient, trainer: Adapted) -> Reply | None:
    """None, if the request was through before an update: this process may stand still meanwhile."""
    sampling = Sampling(max_tokens=400, ignores_stop=True)
    asked = asyncio.create_task(client.generate(PROMPT, sampling, seed=5, deadline_s=120))
    is_on_the_way = await frozen_with_more_tokens(client, asked)
    for more in (True, False):
        if is_on_the_way:
            trainer.step()
            await publish_to(client, trainer.stage(), kv="recompute")
            is_on_the_way = not more or await frozen_with_more_tokens(client, asked)
    await client.resume()
    [reply] = await asked
    return reply if is_on_the_way else None


async def frozen_with_more_tokens(client: EngineClient, asked: asyncio.Task[list[Reply]]) -> bool:
    """Pause it once it has sampled some more. False, if the request is through by then."""
    sampled = (await client.load()).sampled_tokens
    async with asyncio.timeout(60):
        while not asked.done() and (await client.load()).sampled_tokens < sampled + 20:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await client.pause(clear_cache=False)
    return (await client.load()).running == 1


async def test_a_stale_adapter_is_refused_by_the_probe(client: EngineClient, trainer: Adapted, tmp_path: Path) -> None:
    """The label says the new version, the tensors are those of the one before."""
    trainer.step()
    before = trainer.stage()
    await publish_to(client, before)
    trainer.step()
    staged = trainer.stage()
    stale = copied(before, tmp_path / "stale")
    write_manifest(stale, msgspec.structs.replace(read_manifest(stale), version=staged.version))
    with pytest.raises(PublishError, match="the probe shows a mean gap"):
        await publish_to(client, msgspec.structs.replace(staged, directory=str(stale)))
    await publish_to(client, staged)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("corrupted", "arrived corrupted"), ("unused", "no adapted layer for 1"), ("half", "is half there")],
)
async def test_what_is_wrong_with_an_adapter_is_said_and_the_old_one_stays(
    client: EngineClient, trainer: Adapted, tmp_path: Path, fault: str, words: str
) -> None:
    old = await client.score(PROMPT)
    trainer.step()
    staged = trainer.stage()
    broken = copied(staged, tmp_path / fault)
    path = broken / "adapter_model.safetensors"
    tensors = load_file(path)
    manifest = read_manifest(broken)
    entry = manifest.tensors[0]
    if fault == "corrupted":
        tensors[entry.name] += 1
    elif fault == "unused":
        renamed = "base_model.model.lm_head.lora_A.weight"
        tensors[renamed] = tensors.pop(entry.name)
        entry = msgspec.structs.replace(entry, name=renamed)
    save_file(tensors, path)
    rest = manifest.tensors[1:]
    kept = rest if fault == "half" else (entry, *rest)
    write_manifest(broken, msgspec.structs.replace(manifest, tensors=kept))
    with pytest.raises(PublishError, match=words):
        await publish_to(client, msgspec.structs.replace(staged, directory=str(broken)))
    await client.resume()
    assert await client.score(PROMPT) == pytest.approx(old, abs=1e-6)
    await publish_to(client, staged)


async def test_a_new_client_of_an_engine_that_has_the_adapter_takes_it_over(
    server: Engine, client: EngineClient, trainer: Adapted
) -> None:
    """As an orchestrator does that takes the place of a dead one, in the middle of a publish too."""
    trainer.step()
    staged = trainer.stage()
    await client.pause(clear_cache=False)
    await client.start_update()
    async with EngineClient(server.url) as successor:
        await successor.pause(clear_cache=False)
        await successor.abandon_update()
        assert (await publish_to(successor, staged)).max_gap <= EXACT


async def test_an_engine_that_lost_its_adapter_is_not_taken_for_the_policy(client: EngineClient) -> None:
    """It took the place of one that is gone: no request of ours is wrong."""
    client.adapter = "policy-of-another"
    with pytest.raises(UnpublishedError, match="has no adapter policy-of-another"):
        await client.score(PROMPT)


async def test_the_base_stays_what_it_is(client: EngineClient, trainer: Adapted, model: Path) -> None:
    client.adapter = None
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([PROMPT])
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0, :-1].log_softmax(-1)
    expected = own.gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert await client.score(PROMPT) == pytest.approx(expected, abs=EXACT)
