"""Publishing: order of the calls, numbers of the probe, and every way in which a version does not arrive."""

import asyncio
import math

import httpx
import pytest

from palestra.core.errors import PublishError
from palestra.wire.policy import EngineClient
from palestra.wire.publish import NoEngineLeft, ProbeGap, PublishReport, measure, publish, require_arrived
from palestra.wire.weights.manifest import Probe, Staged
from tests.unit.core.clocks import LoopClock
from tests.unit.wire.fake_engine import FakeEngine, error


def staged(version: int, weights: float, previous: float | None) -> Staged:
    """A fake engine with `weights` w scores every token -(w + 1)."""
    probe = Probe(
        token_ids=[1, 2, 3],
        logprobs=[-(weights + 1)] * 2,
        previous_logprobs=None if previous is None else [-(previous + 1)] * 2,
    )
    return Staged(version=version, directory=f"v{version}", probe=probe)


def engine_with(weights: float, label: str = "default", **loads: float) -> tuple[FakeEngine, EngineClient]:
    engine = FakeEngine(weights=weights, label=label)
    engine.staged = loads
    return engine, EngineClient(f"http://engine-{id(engine)}", transport=engine)


async def publish_one(client: EngineClient, version: Staged, kv: str = "keep") -> PublishReport:
    return await publish([client], version, kv=kv, at_once=1, tolerance=1e-4, deadline_s=20)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kv", "clear_cache"), [("keep", "false"), ("recompute", "true")])
async def test_order_of_a_publish(kv: str, clear_cache: str) -> None:
    engine, client = engine_with(0.0, v0=1.0)
    report = await publish_one(client, staged(0, 1.0, None), kv=kv)
    assert engine.paths() == [
        "/pause",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/weight_info",
        "/resume",
        "/inference/v1/generate",
    ]
    assert engine.calls[0][2]["clear_cache"] == clear_cache
    assert (engine.label, engine.paused) == ("0", False)
    assert (report.version, report.failed, report.max_gap) == (0, (), 0.0)
    [timing] = report.engines
    assert timing.stopped_s >= timing.pause_s + timing.load_s + timing.resume_s > 0


@pytest.mark.parametrize(("keeps_weights", "level"), [(False, "2"), (True, "1")])
async def test_an_engine_that_sleeps_is_woken_around_the_load(keeps_weights: bool, level: str) -> None:
    """Its cache comes last: until then a trainer on the same device may hold what it sent."""
    engine, client = engine_with(0.0, v0=1.0)
    await client.sleep(keeps_weights=keeps_weights)
    assert engine.calls[0] == ("/sleep", {}, {"level": level, "mode": "abort"})
    report = await publish_one(client, staged(0, 1.0, None))
    assert engine.paths()[1:] == [
        "/wake_up",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/weight_info",
        "/wake_up",
        "/resume",
        "/inference/v1/generate",
    ]
    assert [params for path, _, params in engine.calls if path == "/wake_up"] == [
        {"tags": "weights"},
        {"tags": "kv_cache"},
    ]
    assert report.engines[0].wake_s > 0
    assert not client.is_asleep
    assert (await publish_one(client, staged(0, 1.0, None))).engines[0].wake_s == 0


async def test_an_engine_that_did_not_wake_is_asleep_until_another_takes_its_place() -> None:
    engine, client = engine_with(0.0, v0=1.0)
    await client.sleep(keeps_weights=False)
    engine.faults["/wake_up"] = [error(500, "out of memory")]
    with pytest.raises(NoEngineLeft, match="out of memory"):
        await publish_one(client, staged(0, 1.0, None))
    assert client.is_asleep
    client.forget()
    assert not client.is_asleep


async def test_what_is_asked_before_the_engine_has_paused_shares_no_prefix_with_what_is_asked_after() -> None:
    """It is prefilled under the weights before."""
    engine, client = engine_with(0.0, v0=1.0)
    engine.delay_s = 0.05
    publishing = asyncio.create_task(publish_one(client, staged(0, 1.0, None)))
    while not engine.calls:  # noqa: ASYNC110 - the first one, which pauses, takes 0.05 s
        await asyncio.sleep(0)
    while_pausing = client.cache_salt
    await publishing
    assert len({"unpublished", while_pausing, client.cache_salt}) == 3


@pytest.mark.parametrize("is_healthy", [True, False])
async def test_a_server_whose_engine_is_dead_is_lost_and_one_that_refuses_is_not(is_healthy: bool) -> None:
    engine, client = engine_with(0.0, v0=1.0)
    engine.healthy = is_healthy
    engine.faults["/update_weights"] = [error(500, "EngineCore encountered an issue")]
    with pytest.raises(NoEngineLeft) as failure:
        await publish_one(client, staged(0, 1.0, None))
    assert failure.value.is_lost is not is_healthy


async def test_the_cache_salt_changes_with_every_publish() -> None:
    _, client = engine_with(0.0, v0=1.0, v1=2.0)
    salts = [client.cache_salt]
    for version, weights in enumerate((1.0, 2.0)):
        await publish_one(client, staged(version, weights, None))
        salts.append(client.cache_salt)
    assert len(set(salts)) == 3


async def test_weights_that_were_not_delivered() -> None:
    engine, client = engine_with(1.0, label="0", v1=1.0)  # the load changes nothing
    with pytest.raises(PublishError, match=r"mean gap of 1\.00e\+00 \(largest 1\.00e\+00\).*tolerance is 1\.00e-04"):
        await publish_one(client, staged(1, 2.0, 1.0))
    assert engine.paused


async def test_weights_that_were_not_delivered_though_the_step_was_smaller_than_the_tolerance() -> None:
    _, client = engine_with(1.0, label="0", v1=1.0)
    with pytest.raises(PublishError, match="nearer to the version before"):
        await publish_one(client, staged(1, 1.00005, 1.0))


async def test_a_stale_label_is_found_before_the_engine_samples() -> None:
    engine, client = engine_with(0.0, label="0", v1=1.0)
    engine.faults["/finish_weight_update"] = [httpx.Response(200, json={"message": "Weight update finished"})]
    with pytest.raises(PublishError, match="after the load of version 1 the engine labels its tokens with version 0"):
        await publish_one(client, staged(1, 1.0, 0.0))
    assert "/resume" not in engine.paths()


async def test_a_failed_load_is_quoted_and_the_engine_not_resumed() -> None:
    engine, client = engine_with(0.0, v1=1.0)
    engine.faults["/update_weights"] = [error(500, "module model.norm got 3 of 4 elements")]
    with pytest.raises(PublishError, match=r"module model\.norm got 3 of 4 elements"):
        await publish_one(client, staged(1, 1.0, 0.0))
    assert engine.paused
    assert "/resume" not in engine.paths()


async def test_one_engine_that_fails_does_not_hinder_the_others() -> None:
    pairs = [engine_with(0.0, v1=1.0) for _ in range(3)]
    pairs[1][0].faults["/update_weights"] = [error(500, "out of memory")]
    report = await publish(
        [client for _, client in pairs], staged(1, 1.0, 0.0), kv="keep", at_once=3, tolerance=1e-4, deadline_s=20
    )
    assert [engine.ok for engine in report.engines] == [True, False, True]
    assert "out of memory" in report.failed[0].failure
    assert [engine.paused for engine, _ in pairs] == [False, True, False]


async def test_an_engine_that_hangs_is_given_up_at_the_deadline(monkeypatch) -> None:
    clock = LoopClock(monkeypatch)
    good, hanging = engine_with(0.0, v1=1.0), engine_with(0.0, v1=1.0)
    hanging[0].delay_s = 60
    clients = [good[1], hanging[1]]
    version = staged(1, 1.0, 0.0)
    publishing = asyncio.create_task(
        publish(clients, version, kv="keep", at_once=2, tolerance=1e-4, deadline_s=0.2)  # type: ignore[arg-type]
    )
    while not publishing.done():
        await clock.pass_by(0.0 if "/inference/v1/generate" not in good[0].paths() else 0.21)
    report = await publishing
    assert [engine.ok for engine in report.engines] == [True, False]
    assert "DeadlineError: waited" in report.failed[0].failure


@pytest.mark.parametrize("at_once", [1, 2, 4])
async def test_no_more_engines_stand_still_than_allowed(at_once: int) -> None:
    pairs = [engine_with(0.0, v1=1.0) for _ in range(4)]
    for engine, _ in pairs:
        engine.delay_s = 0.002
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, sum(engine.paused for engine, _ in pairs))
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    clients = [client for _, client in pairs]
    await publish(clients, staged(1, 1.0, 0.0), kv="keep", at_once=at_once, tolerance=1e-4, deadline_s=20)
    watcher.cancel()
    assert most == at_once


def test_gaps_by_hand() -> None:
    probe = Probe(token_ids=[1, 2, 3], logprobs=[-1.0, -2.0], previous_logprobs=[-1.5, -2.0])
    gap = measure([-1.1, -2.3], probe)
    assert gap.mean == pytest.approx(0.2)
    assert gap.max == pytest.approx(0.3)
    assert gap.from_previous == pytest.approx(0.35)
    assert gap.between == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("gap", "arrived"),
    [
        (ProbeGap(mean=0.0, max=0.0), True),
        (ProbeGap(mean=0.02, max=0.5), False),  # beyond the tolerance
        (ProbeGap(mean=math.nan, max=math.nan), False),
        (ProbeGap(mean=0.001, max=0.1, from_previous=0.3, between=0.3), True),
        (ProbeGap(mean=0.009, max=0.1, from_previous=0.001, between=0.009), False),  # still at the version before
        (ProbeGap(mean=0.005, max=0.1, from_previous=0.0049, between=0.0001), True),  # a step below the noise
        (None, False),
    ],
)
def test_what_counts_as_arrived(gap: ProbeGap | None, arrived: bool) -> None:
    if arrived:
        require_arrived(gap, 0.01)
    else:
        with pytest.raises(PublishError):
            require_arrived(gap, 0.01)
