"""Our client and publish against the real vLLM: its numbers are those of transformers, and no fault goes unseen."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from palestra.core.errors import DeadlineError, PublishError
from palestra.core.records import Reply, Sampling
from palestra.infer import engine_argv, engine_environment
from palestra.wire.draft import Draft
from palestra.wire.policy import EngineClient, EngineError, EngineLoad, RefusedError
from palestra.wire.publish import Kv, PublishReport, publish
from palestra.wire.weights.manifest import Staged, read_manifest, write_manifest
from tests.integration.engines import (
    HEALTHY_S,
    Engine,
    TinyTrainer,
    entry_point_path,
    free_port,
    replaced,
    running,
)
from tests.models import save_glm4_moe, save_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [3 + (5 * position) % 27 for position in range(12)]
EXACT = 1e-4
TRIES = 5  # to do something while a request is on its way: this process may stand still until it is through


async def publish_to(client: EngineClient, staged: Staged, kv: Kv = "keep") -> PublishReport:
    return await publish([client], staged, kv=kv, at_once=1, tolerance=EXACT, deadline_s=60)


def gap(reply: Reply, trainer: TinyTrainer, temperature: float = 1.0) -> float:
    expected = trainer.score([*PROMPT, *reply.token_ids], temperature=temperature)[len(PROMPT) - 1 :]
    return max(abs(a - b) for a, b in zip(reply.logprobs, expected, strict=True))


async def until(client: EngineClient, reached: Callable[[EngineLoad], bool]) -> None:
    """Another process has no event to wait for."""
    async with asyncio.timeout(60):
        while not reached(await client.load()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture
async def client(engine_server: Engine, trainer: TinyTrainer) -> AsyncIterator[EngineClient]:
    """A healthy engine that holds the trainer's weights, whatever the test before did to it."""
    async with EngineClient(engine_server.url) as client:
        await client.wait_healthy(HEALTHY_S)
        await publish_to(client, trainer.stage())
        yield client


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_transformers(
    client: EngineClient, trainer: TinyTrainer, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, max_tokens=100)
    [reply] = await client.generate(PROMPT, sampling, seed=1, deadline_s=60)
    assert len(reply.token_ids) == 100
    assert gap(reply, trainer, temperature) <= EXACT
    assert gap(reply, trainer, temperature + 0.3) > 100 * EXACT  # the wrong temperature is seen


async def test_the_engine_reports_what_it_sampled_from(client: EngineClient) -> None:
    await client.require_processed_logprobs(PROMPT)


async def test_a_joined_request_equals_single_ones(client: EngineClient) -> None:
    sampling = Sampling(max_tokens=40)
    joined = await client.generate(PROMPT, sampling, seed=500, num_replies=4, deadline_s=60)
    singles = [client.generate(PROMPT, sampling, seed=500 + index, deadline_s=60) for index in range(4)]
    alone = [reply for [reply] in await asyncio.gather(*singles)]
    assert [reply.token_ids for reply in joined] == [reply.token_ids for reply in alone]
    assert len({tuple(reply.token_ids) for reply in joined}) == 4


async def test_a_streamed_reply_is_the_reply_in_chunks_of_as_many_tokens_as_asked_for(client: EngineClient) -> None:
    sampling = Sampling(max_tokens=100)
    arrived: list[int] = []
    draft = Draft(lambda: client.serving, lambda: arrived.append(len(draft.token_ids)))
    streamed = await client.stream(PROMPT, sampling, seed=11, silence_s=60, draft=draft, stream_tokens=16)
    [whole] = await client.generate(PROMPT, sampling, seed=11, deadline_s=60)
    assert streamed.token_ids == whole.token_ids
    assert streamed.spans == whole.spans == draft.partial.spans
    assert max(abs(a - b) for a, b in zip(streamed.logprobs, whole.logprobs, strict=True)) <= EXACT
    assert all((count - 1) % 16 == 0 for count in arrived[:-1])  # a server that falls behind sends some as one
    assert arrived[-1] == 100


async def test_the_tokens_of_a_reply_are_known_on_the_way(client: EngineClient) -> None:
    for _ in range(TRIES):
        known = asyncio.Event()
        draft = Draft(lambda: client.serving, known.set)
        asked = client.stream(PROMPT, Sampling(max_tokens=400), seed=11, silence_s=60, draft=draft)
        streaming = asyncio.create_task(asked)
        async with asyncio.timeout(60):
            await known.wait()
        await client.pause(clear_cache=False)
        is_on_the_way, num_known = not streaming.done(), len(draft.token_ids)
        await client.resume()
        assert (await streaming).token_ids == draft.token_ids
        assert len(draft.token_ids) == 400
        if is_on_the_way:
            break
    assert is_on_the_way, "the engine is never paused before it is through"
    assert 0 < num_known < 400


async def test_a_reply_gone_on_with_from_its_tokens_is_sampled_from_the_policy(
    client: EngineClient, trainer: TinyTrainer
) -> None:
    """Broken off after 40 tokens, gone on with under the next version: every token has its version's probability."""
    sampling = Sampling(max_tokens=100)
    draft = Draft(lambda: client.serving)
    [first] = await client.generate(PROMPT, Sampling(max_tokens=40), seed=11, deadline_s=60)
    before = trainer.score([*PROMPT, *first.token_ids])[len(PROMPT) - 1 :]
    trainer.step()
    await publish_to(client, trainer.stage())
    rest = await client.stream(
        [*PROMPT, *first.token_ids],
        msgspec.structs.replace(sampling, max_tokens=60),
        seed=12,
        silence_s=60,
        draft=draft,
    )
    whole = first.then(rest)
    assert [span.end for span in whole.spans] == [40, 100]
    assert whole.spans[1].version == whole.spans[0].version + 1
    after = trainer.score([*PROMPT, *whole.token_ids])[len(PROMPT) - 1 + 40 :]
    assert max(abs(a - b) for a, b in zip(whole.logprobs, [*before, *after], strict=True)) <= EXACT


async def test_more_prompts_at_once_than_a_step_takes(client: EngineClient) -> None:
    """Each whole in one step: a prompt prefilled in parts ends a CPU engine whose requests have seeds."""
    prompts = [[3 + (seed * position) % 27 for position in range(60)] for seed in range(1, 121)]
    sampling = Sampling(max_tokens=2)
    asked = (client.generate(prompt, sampling, seed=seed, deadline_s=60) for seed, prompt in enumerate(prompts))
    replies = await asyncio.gather(*asked)
    assert all(len(reply.token_ids) == 2 for [reply] in replies)


async def test_stop_tokens_end_a_reply_and_belong_to_it(client: EngineClient) -> None:
    sampling = Sampling(max_tokens=200, stop_token_ids=(3, 4, 5, 6, 7, 8, 9, 10))
    [reply] = await client.generate(PROMPT, sampling, seed=3, deadline_s=60)
    assert reply.finish_reason == "stop"
    assert reply.token_ids[-1] in sampling.stop_token_ids
    assert not set(reply.token_ids[:-1]) & set(sampling.stop_token_ids)


async def test_a_publish_arrives(client: EngineClient, trainer: TinyTrainer) -> None:
    trainer.step()
    report = await publish_to(client, trainer.stage())
    [engine] = report.engines
    assert engine.gap is not None
    assert report.max_gap <= EXACT
    assert engine.gap.from_previous is not None
    assert engine.gap.from_previous > 100 * EXACT
    [reply] = await client.generate(PROMPT, Sampling(max_tokens=20), seed=1, deadline_s=60)
    assert {span.version for span in reply.spans} == {trainer.version}
    assert gap(reply, trainer) <= EXACT


@pytest.mark.parametrize("kv", ["keep", "recompute"])
async def test_an_update_in_flight(client: EngineClient, trainer: TinyTrainer, kv: Kv) -> None:
    """Running requests go on, every token has its version; the cache is what `kv` says."""
    before = copy.deepcopy(trainer)
    requests = await frozen_on_the_way(client, 4)
    trainer.step()
    report = await publish_to(client, trainer.stage(), kv)
    for [reply] in await asyncio.gather(*requests):
        old, new = reply.spans
        assert (old.version, new.version) == (before.version, trainer.version)
        assert (old.start, old.end, new.end) == (0, new.start, 400)
        assert gap_within(reply, before, 0, old.end) <= EXACT
        later = gap_within(reply, trainer, new.start, new.end)
        assert later <= EXACT if kv == "recompute" else later > 10 * EXACT
    assert report.max_gap <= EXACT


async def frozen_on_the_way(client: EngineClient, number: int) -> list[asyncio.Task[list[Reply]]]:
    """Requests of 400 tokens, some of which are sampled, and an engine that is paused. Where one was through before
    the pause, others are asked."""
    for _ in range(TRIES):
        sampled = (await client.load()).sampled_tokens
        asked = [
            client.generate(PROMPT, Sampling(max_tokens=400), seed=seed, deadline_s=120, cache_salt=client.cache_salt)
            for seed in range(number)
        ]
        requests = [asyncio.create_task(request) for request in asked]
        await until(client, lambda load, sampled=sampled: load.sampled_tokens >= sampled + 100)
        await client.pause(clear_cache=False)
        if (await client.load()).running == number:
            return requests
        await client.resume()
        await asyncio.gather(*requests)
    raise AssertionError(f"of {number} requests one is always through before the engine is paused")


def gap_within(reply: Reply, trainer: TinyTrainer, start: int, end: int) -> float:
    expected = trainer.score([*PROMPT, *reply.token_ids])[len(PROMPT) - 1 :]
    return max(abs(a - b) for a, b in zip(reply.logprobs[start:end], expected[start:end], strict=True))


async def test_a_prefix_of_an_older_version_is_not_reused(client: EngineClient, trainer: TinyTrainer) -> None:
    """`kv=keep` leaves old prefixes in the cache; the client's salt keeps them out of new replies."""
    prompt = PROMPT * 12
    sampling = Sampling(max_tokens=1)

    async def first_logprob(salt: str) -> float:
        [reply] = await client.generate(prompt, sampling, seed=1, cache_salt=salt, deadline_s=60)
        expected = trainer.score([*prompt, *reply.token_ids])[-1]
        return abs(reply.logprobs[0] - expected)

    old_salt = client.cache_salt
    assert await first_logprob(old_salt) <= EXACT
    trainer.step()
    await publish_to(client, trainer.stage(), "keep")
    assert await first_logprob(client.cache_salt) <= EXACT
    assert await first_logprob(old_salt) > 10 * EXACT


async def test_differences_arrive_though_the_engine_missed_some(
    client: EngineClient, trainer: TinyTrainer, tmp_path: Path
) -> None:
    """It holds the whole version and never saw the first difference; the second, by copies of its own, is exact."""
    versions = [trainer.stage()]
    for _ in range(3):
        trainer.nudge()
        versions.append(trainer.stage(previous=versions[-1]))
    assert all(read_manifest(Path(staged.directory)).previous for staged in versions[1:])
    await publish_to(client, versions[0])
    report = await publish_to(client, versions[2])
    assert report.max_gap <= EXACT
    far = msgspec.structs.replace(versions[3], local=str(tmp_path))
    report = await publish_to(client, far)
    assert report.max_gap <= EXACT
    assert report.engines[0].gap is not None
    assert (report.engines[0].gap.between or 0.0) > 100 * EXACT, "the versions differ by far more than the tolerance"
    assert {path.name for path in tmp_path.glob("*/v*")} == {Path(staged.directory).name for staged in versions}


async def test_a_difference_applied_to_the_wrong_version(client: EngineClient, trainer: TinyTrainer) -> None:
    versions = [trainer.stage()]
    for _ in range(2):
        trainer.nudge()
        versions.append(trainer.stage(previous=versions[-1]))
    path = Path(versions[-1].directory)
    wrong = msgspec.structs.replace(read_manifest(path), previous=Path(versions[0].directory).name)
    write_manifest(path, wrong)
    with pytest.raises(PublishError, match=r"tensor model\.[a-z0-9_.]+ in \S+ arrived corrupted"):
        await publish_to(client, versions[-1])


async def test_a_tensor_left_out(client: EngineClient, trainer: TinyTrainer) -> None:
    trainer.step()
    tensors = trainer.tensors()
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(PublishError, match=r"module model\.layers\.1\.self_attn\.qkv_proj got \d+ of \d+ elements"):
        await publish_to(client, trainer.stage(tensors))
    with pytest.raises(DeadlineError):  # it stays paused
        await client.generate(PROMPT, Sampling(max_tokens=1), seed=1, deadline_s=0.5)


async def test_a_module_left_out(client: EngineClient, trainer: TinyTrainer) -> None:
    tensors = trainer.tensors()
    del tensors["model.norm.weight"]
    with pytest.raises(PublishError, match=r"parameter model\.norm\.weight got nothing"):
        await publish_to(client, trainer.stage(tensors))


async def test_a_corrupted_byte(client: EngineClient, trainer: TinyTrainer) -> None:
    staged = trainer.stage()
    entry = read_manifest(Path(staged.directory)).tensors[-1]
    shard = Path(staged.directory) / entry.file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PublishError, match=r"tensor model\.[a-z0-9_.]+ in \S+ arrived corrupted"):
        await publish_to(client, staged)


async def test_a_tensor_of_another_shape(client: EngineClient, trainer: TinyTrainer) -> None:
    tensors = trainer.tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    with pytest.raises(PublishError, match=r"could not load tensor model\.norm\.weight"):
        await publish_to(client, trainer.stage(tensors))


async def test_weights_of_another_version_than_announced(client: EngineClient, trainer: TinyTrainer) -> None:
    older, newer = trainer.stage(), trainer.stage()
    wrong = Staged(version=newer.version, directory=older.directory, probe=newer.probe)
    with pytest.raises(PublishError, match=f"version {newer.version} was announced, but its manifest says"):
        await publish_to(client, wrong)


async def test_weights_that_stayed_the_same(client: EngineClient, trainer: TinyTrainer) -> None:
    """Whole, hashed, loaded, and old: only the probe can tell."""
    old = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    trainer.step()
    with pytest.raises(PublishError, match="the probe shows a mean gap"):
        await publish_to(client, trainer.stage(old))


async def test_a_stale_label(client: EngineClient, trainer: TinyTrainer) -> None:
    class Forgetful(EngineClient):
        async def finish(self, version: int, *, deadline_s: float | None = None) -> None:
            await super().finish(version - 1, deadline_s=deadline_s)

    async with Forgetful(client.url) as forgetful:
        with pytest.raises(PublishError, match="labels its tokens with version"):
            await publish_to(forgetful, trainer.stage())


async def test_a_deadline_frees_the_engine(client: EngineClient) -> None:
    with pytest.raises(DeadlineError):
        await client.generate(PROMPT, Sampling(max_tokens=480), seed=1, deadline_s=0.2)
    await until(client, lambda load: load.running == 0)


async def test_a_prompt_that_is_too_long_is_refused(client: EngineClient) -> None:
    with pytest.raises(RefusedError, match="longer than the maximum model length"):
        await client.generate(PROMPT * 100, Sampling(max_tokens=1), seed=1, deadline_s=10)


async def test_faults_of_an_engine_itself(tmp_path: Path) -> None:
    """A server with a stale tied head and raw log-probabilities; then it is killed and must leave nothing behind."""
    model = tmp_path / "model"
    trainer = TinyTrainer(save_qwen3(model), directory=tmp_path / "staging")
    plugins = entry_point_path(tmp_path / "plugins", faults="tests.integration.faulty_backends:register")
    port = free_port()
    command = replaced(
        engine_argv(model=str(model), port=port, dtype="float32", max_model_len=512, device="cpu", kv_cache_gib=0.25),
        weight_transfer_config='{"backend": "files-stale-head"}',
        logprobs_mode="raw_logprobs",
    )
    environment = {**engine_environment(model=str(model), device="cpu"), "PYTHONPATH": plugins}
    with running(command, environment, port=port, log=tmp_path / "engine.log") as engine:
        async with EngineClient(engine.url) as client:
            await client.wait_healthy(HEALTHY_S)
            with pytest.raises(EngineError, match="nothing was published to it yet"):
                await client.generate(PROMPT, Sampling(max_tokens=1), seed=1, deadline_s=60)
            await publish_to(client, trainer.stage())  # the weights it was started with
            await raw_logprobs_are_found_out(client, trainer)
            trainer.step()
            with pytest.raises(PublishError, match="the probe shows a mean gap"):
                await publish_to(client, trainer.stage())
        family = engine.family()
        assert len(family) > 1
        engine.process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


async def raw_logprobs_are_found_out(client: EngineClient, trainer: TinyTrainer) -> None:
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        await client.require_processed_logprobs(PROMPT)
    [reply] = await client.generate(PROMPT, Sampling(temperature=0.7, max_tokens=50), seed=1, deadline_s=60)
    assert gap(reply, trainer, 0.7) > 100 * EXACT
    assert gap(reply, trainer, 1.0) <= EXACT


async def test_mixture_of_experts(tmp_path: Path) -> None:
    """Glm4Moe: experts, shared experts, router and its correction bias, a buffer in the trainer's model."""
    model = tmp_path / "model"
    trainer = TinyTrainer(save_glm4_moe(model), directory=tmp_path / "staging")
    port = free_port()
    command = engine_argv(
        model=str(model), port=port, dtype="float32", max_model_len=512, device="cpu", kv_cache_gib=0.25
    )
    environment = engine_environment(model=str(model), device="cpu")
    with running(command, environment, port=port, log=tmp_path / "engine.log") as engine:
        async with EngineClient(engine.url) as client:
            await client.wait_healthy(HEALTHY_S)
            for _ in range(3):
                report = await publish_to(client, trainer.stage())
                assert report.max_gap <= EXACT
                for temperature in (1.0, 0.7):
                    sampling = Sampling(temperature=temperature, max_tokens=50)
                    [reply] = await client.generate(PROMPT, sampling, seed=1, deadline_s=60)
                    assert gap(reply, trainer, temperature) <= EXACT
                trainer.step(0.05)
            await left_out_of_a_mixture(client, trainer)


async def left_out_of_a_mixture(client: EngineClient, trainer: TinyTrainer) -> None:
    layer = "model.layers.1.mlp"
    for left_out, said in [
        (f"{layer}.experts.3.up_proj.weight", r"mlp\.experts\.routed_experts got \d+ of \d+ elements"),
        (f"{layer}.gate.e_score_correction_bias", r"mlp\.gate\.e_score_correction_bias got nothing"),
        (f"{layer}.shared_experts.down_proj.weight", r"mlp\.shared_experts\.down_proj\.weight got nothing"),
    ]:
        tensors = trainer.layout(trainer.tensors())
        del tensors[left_out]
        with pytest.raises(PublishError, match=said):
            await publish_to(client, trainer.stage(tensors))
    report = await publish_to(client, trainer.stage())
    assert report.max_gap <= EXACT
