"""Sandboxes over HTTP, to whoever asks without our client: tenants apart, bounds, idempotency, accounts, metrics."""

import asyncio
import io
import json
import os
import sys
import time
from collections.abc import AsyncIterator

import pytest

from palestra.sandbox import Limits, SandboxFullError
from palestra.sandbox.agent import frame, frames
from tests.integration.sandbox.services import ALICE, BOB, Running, serving, tenant, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="the backend local is Linux's"),
]

SMALL = Limits(memory_mb=64, disk_mb=16)
LIMITS = {"memory_mb": 64, "disk_mb": 16}


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with serving() as running:
        yield running


# --- who may what


async def test_without_a_tenants_token_nothing_is_answered(running: Running):
    for token in (None, "", "wrong", ALICE + "x"):
        for method, path in (("POST", "/v1/sandboxes"), ("GET", "/v1/usage"), ("POST", "/v1/run"), ("GET", "/v1/x")):
            status, said = await running.ask(method, path, token=token)
            assert (status, said["error"]["kind"]) == (401, "token")
    assert running.headers["WWW-Authenticate"] == "Bearer"
    assert (await running.ask("GET", "/v1/usage"))[0] == 200
    for path in ("/health", "/ready", "/metrics"):
        assert (await running.ask("GET", path, token=None))[0] == 200


async def test_another_tenants_sandbox_is_none(running: Running):
    _, made = await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS, "labels": ["x"]})
    one = f"/v1/sandboxes/{made['id']}"
    asked = [
        ("GET", one, {}),
        ("DELETE", one, {}),
        ("POST", f"{one}/call", {"data": frame({"do": "exec", "argv": ["true"], "timeout_s": 1})}),
        ("POST", f"{one}/exec", {"json": {"command": "true"}}),
        ("PUT", f"{one}/files/a", {"data": b"a"}),
        ("GET", f"{one}/files/a", {}),
        ("POST", f"{one}/timeout", {"json": {"seconds": 1}}),
        ("POST", f"{one}/ports", {"json": {"port": 80}}),
        ("GET", f"{one}/logs", {}),
    ]
    for method, path, more in asked:
        status, said = await running.ask(method, path, token=BOB, **more)
        assert (status, said["error"]["kind"]) == (404, "not_found"), path
    assert (await running.ask("DELETE", "/v1/sandboxes?label=x", token=BOB))[1] == {"deleted": 0}
    assert (await running.ask("GET", "/v1/sandboxes", token=BOB))[1] == {"sandboxes": []}
    assert (await running.ask("GET", one))[0] == 200  # it is there, and was let alone
    assert (await running.ask("POST", f"{one}/exec", json={"command": "echo a"}))[1]["stdout"] == "a\n"
    assert (await running.ask("DELETE", one))[0] == 204
    assert (await running.ask("GET", one))[0] == 410
    assert (await running.ask("GET", one, token=BOB))[0] == 404
    assert (await running.ask("DELETE", one))[0] == 204
    assert (await running.ask("DELETE", "/v1/sandboxes/none"))[0] == 404


# --- by hand


async def test_people_can_use_it_by_hand(running: Running):
    _, made = await running.ask("POST", "/v1/sandboxes", data=b"")
    one = f"/v1/sandboxes/{made['id']}"
    assert (await running.ask("PUT", f"{one}/files/a%20b/c", data=b"\x00\xff"))[0] == 204
    assert await running.ask("GET", f"{one}/files/a%20b/c") == (200, b"\x00\xff")
    assert (await running.ask("GET", f"{one}/files//home/user/a%20b/c"))[0] == 200
    assert (await running.ask("GET", f"{one}/files/none"))[0] == 404
    status, end = await running.ask("POST", f"{one}/exec", json={"command": ["cat"], "stdin": {"base64": "aGk="}})
    assert (status, end["stdout"], end["exit_code"]) == (200, "hi", 0)
    big = os.urandom(9 * 2**20)
    assert (await running.ask("PUT", f"{one}/files/big", data=io.BytesIO(big)))[0] == 204
    assert (await running.ask("GET", f"{one}/files/big"))[1] == big
    assert (await running.ask("POST", "/v1/run", json={"code": "print(4)"}))[1]["stdout"] == "4\n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/sandboxes", b"{"),
        ("/v1/sandboxes", b"[]"),
        ("/v1/sandboxes", b'{"limit": {}}'),
        ("/v1/sandboxes", b'{"limits": {"memory_mb": 1}}'),
        ("/v1/sandboxes", b'{"timeout_s": -1}'),
        ("/v1/sandboxes", b'{"timeout_s": NaN}'),
        ("/v1/sandboxes", b'{"egress": ["http://x/"], "limits": {"memory_mb": 64, "disk_mb": 16}}'),
        ("/v1/sandboxes/bulk", b'{"count": 0}'),
        ("/v1/run", b"{}"),
        ("/v1/run", b'{"code": 3}'),
        ("/v1/run", b'{"code": "", "timeout_s": 1e5}'),
        ("/v1/run", b'{"code": "", "files": {"/etc/x": ""}}'),
        ("/v1/run", b'{"code": {"base64": "?"}}'),
    ],
)
async def test_bad_input_is_told(running: Running, path: str, body: bytes):
    status, said = await running.ask("POST", path, data=body)
    assert status == 400
    assert said["error"]["message"]
    assert running.host.boxes == {}


async def test_a_frame_asks_for_nothing_that_is_not_allowed(running: Running):
    _, made = await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS})
    call = f"/v1/sandboxes/{made['id']}/call"
    for header in (
        *({"do": do} for do in ("dial", "listen", "environment", "ping", "code", "", None, 3, ["exec"])),
        {"do": "exec", "argv": ["true"], "timeout_s": "x"},
        {"do": "exec", "argv": ["true"], "timeout_s": 1e9},
        {"do": "exec", "argv": ["true"], "timeout_s": float("nan")},
        {"do": "output", "process": 1, "wait_s": "x"},
        {"do": "exec", "argv": ["true"], "most": -1},
    ):
        assert (await running.ask("POST", call, data=frame(header)))[0] == 400, header
    for body in (b"", b"x" * 20, frame({"do": "processes"}) * 2, frame({"do": "processes"}) + b"x"):
        assert (await running.ask("POST", call, data=body))[0] == 400
    status, answer = await running.ask("POST", call, data=frame({"do": "processes"}))
    assert status == 200
    assert next(iter(frames(bytearray(answer))))[0]["processes"] == []
    status, answer = await running.ask("POST", call, data=frame({"do": "exec"}))  # of the agent's own judgement
    assert next(iter(frames(bytearray(answer))))[0]["error"] == "value"
    assert (await running.ask("POST", f"/v1/sandboxes/{made['id']}/exec", json={"command": "true"}))[0] == 200


async def test_a_body_above_the_limit_is_refused_and_one_below_is_not():
    async with serving(most_body_mb=1) as running:
        for data in (io.BytesIO(b"x" * (2**20 + 1)), _chunks(2**20 + 1)):
            status, said = await running.ask("POST", "/v1/run", data=data)
            assert (status, said["error"]["kind"]) == (413, "too_large")
        fits = json.dumps({"code": "print(len(input()))", "stdin": "x" * 900_000})
        assert (await running.ask("POST", "/v1/run", data=fits))[1]["stdout"] == "900000\n"


async def _chunks(total: int) -> AsyncIterator[bytes]:
    for at in range(0, total, 65_536):
        yield b"x" * min(65_536, total - at)


async def test_hosts_that_a_tenant_may_not_reach_are_not_reached_by_its_sandboxes(running: Running):
    for host in ("pypi.org", "127.0.0.1:80"):
        status, said = await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS, "egress": [host]})
        assert (status, said["error"]["kind"]) == (400, "input")
    assert running.host.boxes == {}
    async with serving(tenant("alice", egress=("pypi.org",))) as other:
        status, made = await other.ask("POST", "/v1/sandboxes", json={"limits": LIMITS, "egress": ["pypi.org"]})
        assert status == 201
        ask = {"command": "echo $http_proxy"}
        assert (await other.ask("POST", f"/v1/sandboxes/{made['id']}/exec", json=ask))[1]["stdout"] != "\n"


# --- how many


async def test_what_is_full_is_told_with_when_to_ask_again():
    async with serving(tenant("alice", most_sandboxes=2), tenant("bob", most_memory_mb=100), most=3) as running:
        first = (await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS}))[1]
        assert (await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS}))[0] == 201
        status, said = await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS})
        assert (status, said["error"]["kind"]) == (429, "full")
        assert int(running.headers["Retry-After"]) >= 1
        async with running.remote() as host:
            with pytest.raises(SandboxFullError, match="of at most 2"):
                await host.create(limits=SMALL)
        assert (await running.ask("POST", "/v1/sandboxes", token=BOB, json={"limits": LIMITS}))[0] == 201
        assert (await running.ask("POST", "/v1/sandboxes", token=BOB, json={"limits": LIMITS}))[0] == 429
        assert (await running.ask("POST", "/v1/sandboxes", token=BOB))[0] == 400  # it never fits into 100 MB
        await running.ask("DELETE", f"/v1/sandboxes/{first['id']}")
        assert (await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS}))[0] == 201
        assert await running.metric('palestra_sandbox_refusals_total{reason="full"}') == 3


async def test_programs_wait_for_their_turn_within_bounds():
    async with serving(running=1, most_waiting=2, wait_s=3) as running:
        turns, alice = running.service.turns, tenant("alice")
        await turns.begin(alice, 80)  # as a program that runs for as long as this test likes
        code = {"code": "print(4)", "limits": LIMITS}
        ends = await asyncio.gather(*(running.ask("POST", "/v1/run", json=code) for _ in range(3)))
        assert [status for status, _ in ends] == [429, 429, 429]
        reasons = sorted(said["error"]["message"] for _, said in ends)
        assert ["2 programs of yours wait already" in reason for reason in reasons] == [True, False, False]
        assert ["no turn came within 3 s" in reason for reason in reasons] == [False, True, True]
        turns.end(alice, 80)
        assert (await running.ask("POST", "/v1/run", json={"code": "print(5)"}))[1]["stdout"] == "5\n"


async def test_a_program_that_nobody_waits_for_any_more_does_not_begin():
    async with serving(running=1) as running:
        turns, alice = running.service.turns, tenant("alice")
        await turns.begin(alice, 80)  # as a program that runs until the other is given up
        longer = {"code": "import time; time.sleep(50)", "timeout_s": 55}
        gone = asyncio.create_task(running.ask("POST", "/v1/run", json=longer))
        await until(lambda: turns.num_waiting == 1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert (await running.ask("GET", "/ready", token=None))[0] == 200  # so the service has heard that it is gone
        turns.end(alice, 80)
        began = time.monotonic()
        assert (await running.ask("POST", "/v1/run", json={"code": "print(6)"}))[1]["stdout"] == "6\n"
        assert time.monotonic() - began < 25


# --- once


async def test_one_key_is_one_sandbox_however_often_and_at_once_it_is_asked(running: Running):
    asked = [running.ask("POST", "/v1/sandboxes", key="k", json={"limits": LIMITS}) for _ in range(8)]
    answers = await asyncio.gather(*asked)
    assert {status for status, _ in answers} == {201}
    assert len({said["id"] for _, said in answers}) == 1
    assert len(running.host.boxes) == 1
    again = await running.ask("POST", "/v1/sandboxes", key="k", json={"limits": LIMITS})
    assert again[1]["id"] == answers[0][1]["id"]
    status, said = await running.ask("POST", "/v1/sandboxes", key="k", json={"limits": LIMITS, "labels": ["other"]})
    assert (status, said["error"]["kind"]) == (409, "conflict")
    for token, key in ((BOB, "k"), (ALICE, "k2"), (ALICE, None)):  # of another, with another, and without
        other = await running.ask("POST", "/v1/sandboxes", token=token, key=key, json={"limits": LIMITS})
        assert other[1]["id"] != answers[0][1]["id"]
    assert len(running.host.boxes) == 4
    bulk = {"limits": LIMITS, "count": 2}
    many = [await running.ask("POST", "/v1/sandboxes/bulk", key="b", json=bulk) for _ in range(2)]
    assert many[0] == many[1]
    assert len(running.host.boxes) == 6
    assert (await running.ask("POST", "/v1/sandboxes", key="x" * 201))[0] == 400


async def test_a_key_that_failed_can_be_used_again():
    async with serving(tenant("alice", most_sandboxes=1)) as running:
        _, first = await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS})
        assert (await running.ask("POST", "/v1/sandboxes", key="k", json={"limits": LIMITS}))[0] == 429
        await running.ask("DELETE", f"/v1/sandboxes/{first['id']}")
        status, second = await running.ask("POST", "/v1/sandboxes", key="k", json={"limits": LIMITS})
        assert status == 201
        await running.ask("DELETE", f"/v1/sandboxes/{second['id']}")
        status, third = await running.ask("POST", "/v1/sandboxes", key="k", json={"limits": LIMITS})
        assert status == 201
        assert third["id"] != second["id"]


async def test_all_of_a_bulk_or_none():
    async with serving(tenant("alice", most_sandboxes=3)) as running:
        assert (await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS}))[0] == 201
        assert (await running.ask("POST", "/v1/sandboxes/bulk", json={"limits": LIMITS, "count": 3}))[0] == 429
        assert len(running.host.boxes) == 1
        assert (await running.ask("POST", "/v1/sandboxes/bulk", json={"limits": LIMITS, "count": 2}))[0] == 201
        assert len(running.host.boxes) == 3


# --- what is counted


async def test_usage_is_what_was_used(running: Running):
    asked = time.monotonic()
    _, made = await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS})
    one, began = f"/v1/sandboxes/{made['id']}", time.monotonic()
    burn = "python3 -c 'import time\nwhile time.process_time() < 0.4: pass'"
    assert (await running.ask("POST", f"{one}/exec", json={"command": burn}))[1]["exit_code"] == 0
    await running.ask("POST", f"{one}/exec", json={"command": "exit 1"})
    await running.ask("POST", f"{one}/exec", json={"command": "sleep 9", "timeout_s": 0.1})
    least_s = time.monotonic() - began
    assert (await running.ask("DELETE", one))[0] == 204
    most_s = time.monotonic() - asked
    used = (await running.ask("GET", "/v1/usage"))[1]
    assert used["programs"] == {"ok": 1, "failed": 1, "timed_out": 1}
    assert used["sandboxes"] == 1
    assert least_s - 0.01 < used["sandbox_s"] < most_s + 0.01
    assert used["memory_mb_s"] == pytest.approx(used["sandbox_s"] * 80)
    assert 0.4 <= used["cpu_s"] < 2
    assert (await running.ask("GET", "/v1/usage", token=BOB))[1] == {"tenant": "bob"}
    later = (await running.ask("GET", "/v1/usage"))[1]
    assert later == used  # what is gone uses nothing


async def test_cpu_time_of_what_runs_in_the_background_is_counted_too(running: Running):
    async with running.remote() as host:
        box = await host.create(limits=SMALL)
        burning = await box.background("python3 -c 'import time\nwhile time.process_time() < 0.5: pass\nprint(1)'")
        assert (await burning.wait(20)).stdout == "1\n"
        await box.delete()
        used = await host.usage()
        assert used["cpu_s"] >= 0.5
        assert used["programs"] == {"opened": 1}


async def test_metrics_tell_what_happened(running: Running):
    _, made = await running.ask("POST", "/v1/sandboxes", json={"limits": LIMITS})
    await running.ask("POST", f"/v1/sandboxes/{made['id']}/exec", json={"command": "exit 1"})
    await running.ask("POST", "/v1/run", json={"code": "print(1)"})
    await running.ask("POST", "/v1/run", token="wrong")
    for name, number in {
        "palestra_sandbox_live": 1,
        "palestra_sandbox_waiting": 0,
        "palestra_sandbox_starts_total": 1,
        "palestra_sandbox_start_seconds_count": 1,
        "palestra_sandbox_program_seconds_count": 2,
        'palestra_sandbox_results_total{status="ok"}': 1,
        'palestra_sandbox_results_total{status="failed"}': 1,
        'palestra_sandbox_results_total{status="oom"}': 0,
        'palestra_sandbox_refusals_total{reason="token"}': 1,
    }.items():
        assert await running.metric(name) == number, name
    await running.ask("DELETE", f"/v1/sandboxes/{made['id']}")
    assert await running.metric("palestra_sandbox_live") == 0
    assert b"alice" not in (await running.ask("GET", "/metrics", token=None))[1]
