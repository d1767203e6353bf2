"""The gateway and the fleet: where calls go, what an engine's death costs, and what the ledger says of it."""

import asyncio
from contextlib import contextmanager

import msgspec
import pytest

from palestra.core.errors import DeadlineError, InfrastructureError
from palestra.core.ledger import Ledger
from palestra.core.records import Reply, Routes, Sampling, Span
from palestra.orchestrate.fleet import EngineLink, EngineState, Fleet
from palestra.orchestrate.gateway import Gateway
from palestra.wire.policy import EngineError, UnpublishedError, UnreachableError

LONG = Sampling(max_tokens=1000, stop_token_ids=(9999,))


class Counter:
    """An engine whose reply to a prompt goes on counting from the prompt's last token, to `end`.

    After `breaks_at` tokens of a reply it raises `failure`, or waits for ever.
    """

    cache_salt = "v"

    def __init__(self, version: int, *, end: int = 60, breaks_at: int | None = None, failure: Exception | None = None):
        self.serving: int | None = version
        self.end, self.breaks_at, self.failure = end, breaks_at, failure
        self.prompts: list[list[int]] = []
        self.limits: list[int] = []
        self.asked: list[Sampling] = []
        self.broke = asyncio.Event()
        self.healthy = True

    async def stream(self, token_ids, sampling, *, seed, silence_s, draft, cache_salt, stream_tokens):
        self.prompts.append(token_ids)
        self.limits.append(sampling.max_tokens)
        self.asked.append(sampling)
        for token in range(token_ids[-1] + 1, self.end + 1):
            if len(draft.token_ids) == self.breaks_at:
                self.broke.set()
                await (asyncio.Event().wait() if self.failure is None else asyncio.sleep(0))
                assert self.failure is not None
                raise self.failure
            draft.add([token], [-float(token)])
        spans = (Span(self.serving, 0, len(draft.token_ids)),)
        reply = Reply(token_ids=draft.token_ids, logprobs=draft.logprobs, spans=spans, finish_reason="stop")
        if sampling.routes_from is None:
            return reply
        routes = Routes(bytes([*token_ids, *draft.token_ids][sampling.routes_from : -1]), 1, 1)
        return msgspec.structs.replace(reply, routes=routes)

    async def generate(self, token_ids, sampling, *, seed, deadline_s, num_replies=1, cache_salt=None):
        self.prompts.append(token_ids)
        if self.failure is not None:
            raise self.failure
        one = Reply(token_ids=[7], logprobs=[-1.0], spans=(Span(self.serving, 0, 1),), finish_reason="stop")
        return [one] * num_replies

    async def is_healthy(self):
        return self.healthy

    def forget(self):
        self.serving = None

    async def close(self):
        pass


def make_gateway(*engines: Counter, healthy_s: float = 5, join: int = 0) -> tuple[Gateway, list[tuple[str, str]]]:
    restarts: list[tuple[str, str]] = []
    links = [EngineLink(f"engine-{i}", engine, Ledger(f"engine-{i}")) for i, engine in enumerate(engines)]  # type: ignore[arg-type]
    fleet = Fleet(links, healthy_s=healthy_s, restart=lambda *why: restarts.append(why), changed=lambda: None)
    for link in links:
        fleet.healthy(link)
        fleet.joined(link)
    return Gateway(fleet, join_max_tokens=join, call_s=5, stream_tokens=4), restarts


DEAD = UnreachableError("connection reset")


@pytest.mark.parametrize("breaks_at", [0, 1, 20, 49])
async def test_a_reply_whose_engine_dies_is_gone_on_with_from_its_tokens(breaks_at: int):
    first, second = Counter(3, breaks_at=breaks_at, failure=DEAD), Counter(4)
    gateway, restarts = make_gateway(first, second)
    reply = await gateway.call(0, [5, 10], LONG, seed=1)
    assert reply.token_ids == list(range(11, 61)), "no token twice, none missing"
    assert reply.logprobs == [-float(token) for token in range(11, 61)]
    assert reply.spans == ((Span(3, 0, breaks_at), Span(4, breaks_at, 50)) if breaks_at else (Span(4, 0, 50),))
    assert second.prompts == [[5, 10, *range(11, 11 + breaks_at)]]
    assert second.limits == [1000 - breaks_at]
    assert restarts == [("engine-0", "connection reset")]


async def test_a_reply_without_its_tokens_from_before_is_seen_by_the_test_above():
    """Control: asked again from the start, the second engine samples everything, under its own version."""
    first, second = Counter(3, breaks_at=20, failure=DEAD), Counter(4)
    gateway, _ = make_gateway(first, second)
    gateway.fleet.take_out(gateway.fleet.links[0], "planted")
    reply = await gateway.call(0, [5, 10], LONG, seed=1)
    assert reply.spans == (Span(4, 0, 50),)


async def test_an_engine_taken_out_while_it_is_silent_keeps_nobody_waiting():
    first, second = Counter(3, breaks_at=20), Counter(4)
    gateway, _ = make_gateway(first, second)
    call = asyncio.create_task(gateway.call(0, [5, 10], LONG, seed=1))
    await first.broke.wait()
    gateway.fleet.engine_ended("engine-0")
    assert (await call).spans == (Span(3, 0, 20), Span(4, 20, 50))


async def test_a_reply_goes_on_after_any_number_of_turns_of_the_trainer():
    """An engine that sleeps drops its calls; that says nothing against the reply, and whoever waits is not silent."""
    engine = Counter(3, breaks_at=2)
    gateway, restarts = make_gateway(engine)
    [link], waits = gateway.fleet.links, []

    @contextmanager
    def at_work():
        waits.append(engine.serving)
        yield

    call = asyncio.create_task(gateway.call(0, [5, 10], LONG, seed=1, at_work=at_work))
    for version in range(4, 24):
        await engine.broke.wait()
        engine.broke.clear()
        gateway.fleet.sleeps(link)
        assert (link.state, gateway.fleet.serving, gateway.fleet.room <= 0) == (EngineState.ASLEEP, [], True)
        await asyncio.sleep(0.005)  # the trainer's turn
        engine.serving, engine.breaks_at = version, 2 if version < 23 else None
        gateway.fleet.joined(link)
    reply = await call
    assert reply.token_ids == list(range(11, 61))
    assert len(reply.spans) >= 20
    assert len(waits) >= 20
    assert restarts == []


async def test_pieces_are_told_on_the_way_and_all_of_them_when_it_breaks():
    first, second = Counter(3, end=700, breaks_at=600, failure=DEAD), Counter(4, end=700)
    gateway, _ = make_gateway(first, second)
    pieces: list[Reply] = []
    reply = await gateway.call(0, [0], LONG, seed=1, note=pieces.append)
    assert [len(piece.token_ids) for piece in pieces] == [256, 256, 88]
    told = pieces[0].then(pieces[1]).then(pieces[2])
    assert told.token_ids == reply.token_ids[:600]
    assert told.spans == (Span(3, 0, 600),)


async def test_what_came_of_a_reply_that_nobody_waits_for_any_more_is_told():
    """The worker that wanted it has died: whoever plays the rollout again goes on from there."""
    engine = Counter(3, breaks_at=20)
    gateway, _ = make_gateway(engine)
    pieces: list[Reply] = []
    call = asyncio.create_task(gateway.call(0, [5, 10], LONG, seed=1, note=pieces.append))
    await engine.broke.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert [piece.token_ids for piece in pieces] == [list(range(11, 31))]


async def test_a_reply_begun_before_a_restart_is_gone_on_with():
    engine = Counter(8)
    gateway, _ = make_gateway(engine)
    begun = Reply(token_ids=[11, 12], logprobs=[-11.0, -12.0], spans=(Span(2, 0, 2),), finish_reason="abort")
    reply = await gateway.call(0, [5, 10], LONG, seed=1, begun=begun)
    assert reply.token_ids == list(range(11, 61))
    assert reply.spans == (Span(2, 0, 2), Span(8, 2, 50))
    assert engine.limits == [998]


@pytest.mark.parametrize(("last", "limit", "reason"), [(9999, 1000, "stop"), (12, 2, "length")])
async def test_a_reply_that_broke_off_after_its_end_is_whole(last: int, limit: int, reason: str):
    engine = Counter(8)
    gateway, _ = make_gateway(engine)
    begun = Reply(token_ids=[11, last], logprobs=[-1.0, -1.0], spans=(Span(2, 0, 2),), finish_reason="abort")
    sampling = Sampling(max_tokens=limit, stop_token_ids=(9999,))
    assert (await gateway.call(0, [5], sampling, seed=1, begun=begun)).finish_reason == reason
    assert engine.prompts == []


async def test_a_joined_request_of_a_dead_engine_is_asked_again_elsewhere():
    first, second = Counter(3, failure=DEAD), Counter(4)
    gateway, restarts = make_gateway(first, second, join=64)
    short = Sampling(max_tokens=8)
    replies = await asyncio.gather(*(gateway.call(0, [5], short, seed=seed) for seed in range(4)))
    assert [reply.spans for reply in replies] == [(Span(4, 0, 1),)] * 4
    assert [name for name, _ in restarts] == ["engine-0"]
    assert len(first.prompts) == len(second.prompts) == 1


async def test_a_request_that_makes_a_healthy_engine_fail_fails_alone():
    engine = Counter(3, breaks_at=0, failure=EngineError("assertion failed"))
    gateway, restarts = make_gateway(engine)
    with pytest.raises(InfrastructureError, match="assertion failed"):
        await gateway.call(0, [5], LONG, seed=1)
    assert restarts == []
    engine.healthy = False
    call = asyncio.create_task(gateway.call(0, [5], LONG, seed=1))
    await asyncio.wait([call], timeout=0.1)
    assert restarts == [("engine-0", "assertion failed")]
    call.cancel()


async def test_an_engine_that_has_no_weights_of_this_run_fails_and_not_the_request():
    stranger, engine = Counter(3, breaks_at=9, failure=UnpublishedError("labels its tokens 'default'")), Counter(3)
    gateway, restarts = make_gateway(stranger, engine)
    reply = await gateway.call(0, [5], LONG, seed=1)
    assert restarts == [("engine-0", "labels its tokens 'default'")]
    assert (engine.prompts, reply.token_ids) == ([[5]], list(range(6, 61))), "none of its tokens is kept"


async def test_calls_wait_for_an_engine_to_come_back_and_say_so():
    engine = Counter(3)
    gateway, _ = make_gateway(engine, healthy_s=0.05)
    gateway.fleet.engine_ended("engine-0")
    with pytest.raises(DeadlineError, match="an engine that serves"):
        await gateway.call(0, [5], LONG, seed=1)

    gateway, _ = make_gateway(engine)
    fleet, [link] = gateway.fleet, gateway.fleet.links
    fleet.engine_ended("engine-0")
    call = asyncio.create_task(gateway.call(0, [5, 58], LONG, seed=1))
    await asyncio.sleep(0)
    fleet.healthy(fleet.engine_started("engine-0"))
    assert engine.serving is None, "a new process has no weights"
    assert not call.done()
    engine.serving = 9
    fleet.joined(link)
    assert (await call).spans == (Span(9, 0, 2),)


# --- routes


def test_groups_spread_a_session_stays_and_a_slow_engine_gets_less():
    gateway, _ = make_gateway(Counter(1), Counter(1))
    fast, slow = gateway.fleet.links
    fast.note_speed(300, 1.0)
    slow.note_speed(100, 1.0)
    counts = {fast.name: 0, slow.name: 0}

    async def deal() -> None:
        for session in range(80):
            link = await gateway.fleet.engine_for(session)
            assert await gateway.fleet.engine_for(session) is link
            counts[link.name] += 1

    asyncio.run(deal())
    assert counts == {"engine-0": 60, "engine-1": 20}


async def test_sessions_of_an_engine_that_left_move():
    gateway, _ = make_gateway(Counter(1), Counter(1))
    link = await gateway.fleet.engine_for(5)
    gateway.fleet.engine_ended(link.name)
    assert await gateway.fleet.engine_for(5) is not link


def test_states_that_cannot_follow_are_refused():
    link = EngineLink("engine-0", Counter(1), Ledger("engine-0"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="engine-0 cannot go from starting to serving"):
        link.move(EngineState.SERVING)


# --- ledger


class Clock:
    now = 0.0


@pytest.mark.parametrize(("refills", "expected"), [(True, {"prefill again": 3.0}), (False, {})])
async def test_prefilling_again_is_booked_from_the_resume_to_the_first_token(monkeypatch, refills, expected):
    monkeypatch.setattr("palestra.core.ledger.time.perf_counter", lambda: Clock.now)
    gateway, _ = make_gateway(Counter(1))
    [link] = gateway.fleet.links

    def after(seconds: float) -> None:
        Clock.now += seconds

    link.ledger.close()
    with link.busy():
        after(5)
        link.stop(True, refills=refills)
        after(2)
        link.stop(False, refills=refills)
        after(3)
        link.progressed()
        after(4)
    parts = link.ledger.close().parts_s
    generated = 9.0 if refills else 12.0
    assert {cause: seconds for cause, seconds in parts.items() if seconds} == {
        "generate": generated,
        "publish": 2.0,
        **expected,
    }


async def test_an_engine_without_requests_prefills_nothing_again():
    gateway, _ = make_gateway(Counter(1))
    [link] = gateway.fleet.links
    link.stop(True, refills=True)
    link.stop(False, refills=True)
    assert link.ledger.cause == "idle"


async def test_routes_of_a_reply_that_broke_off_come_with_the_rest():
    """What an engine said before it died has no routes; the next one computes those tokens again, and says them."""
    first, second = Counter(3, breaks_at=20, failure=DEAD), Counter(4)
    gateway, _ = make_gateway(first, second)
    reply = await gateway.call(0, [5, 10], msgspec.structs.replace(LONG, routes_from=1), seed=1)
    assert [sampling.routes_from for sampling in (*first.asked, *second.asked)] == [1, 1]
    assert list(reply.routes.data) == list(range(10, 60)), "from the second token of the prompt to the last but one"
