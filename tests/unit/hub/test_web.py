"""Pages and twins: the same numbers as the files, nothing of a rollout that acts, nobody who should not ask."""

import asyncio
import itertools
import json
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import watchfiles

from palestra.core.errors import DeadlineError
from palestra.core.ledger import LedgerEntry
from palestra.core.metrics import Mean
from palestra.core.records import Ending, Sample, Seat, Span, Task, TurnSpan
from palestra.hub import site as site_module
from palestra.hub import watch
from palestra.hub.guard import is_ours
from palestra.hub.pages import PAGES
from palestra.hub.site import Site
from palestra.hub.watch import Changed, FullError, Subscription
from palestra.hub.web import application
from palestra.wire.rundir import RunDir
from palestra.wire.runlog import RunLog
from tests.unit.hub.written import record, scan, write, write_some

WAIT_S = 30.0
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7**20}}</pre>"
PATHS = {
    "/runs": "",
    "/compare": "?runs=demo,other",
    "/runs/{run}": "",
    "/runs/{run}/curves": "",
    "/runs/{run}/marks": "",
    "/runs/{run}/ledger": "",
    "/runs/{run}/groups": "",
    "/runs/{run}/rollouts": "",
    "/runs/{run}/rollouts/{file}/{line}": "",
    "/runs/{run}/task": "?task=task+1",
}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages wait for all of an index, as long as it takes."""
    monkeypatch.setattr(site_module, "PATIENCE_S", 60.0)


def write_run(outputs: Path, name: str) -> RunDir:
    run = RunDir(outputs / name)
    write_some(run)
    config = {"log": {"name": name}, "algo": {"group_size": 4}, "env": {"mix": [{"id": "calc"}]}, "x": name}
    run.config.write_text(json.dumps(config))
    log = RunLog(run)
    for step in range(4):
        log.metrics(step, {"reward/trained": Mean(step, 8), "age/mean": Mean(step, 3)})
        entry = LedgerEntry(
            process="trainer", started_at=100.0 + step, wall_s=1.0, parts_s={"work": 0.75, "idle": 0.25}
        )
        log.ledger(entry)
    log.close()
    return run


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    write_run(tmp_path, "demo")
    write_run(tmp_path, "other")
    return tmp_path


@asynccontextmanager
async def client_of(outputs: Path, host: str = "localhost") -> AsyncIterator[httpx.AsyncClient]:
    async with Site(outputs) as site:
        transport = httpx.ASGITransport(application(site))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}", timeout=20) as client:
            yield client


def address(path: str, suffix: str = "") -> str:
    return path.format(run="demo", file="step-000001", line=2) + suffix + PATHS[path]


def test_every_page_is_tested():
    assert sorted(PATHS) == sorted(page.path for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
async def test_every_page_has_its_twin(outputs: Path, page):
    async with client_of(outputs) as client:
        shown, twin = await client.get(address(page.path)), await client.get(address(page.path, ".json"))
    assert (shown.status_code, twin.status_code) == (200, 200), shown.text
    assert shown.headers["content-type"].startswith("text/html")
    msgspec.json.decode(twin.content, type=page.answer)


async def test_the_document_tells_of_every_twin_and_nothing_else(outputs: Path):
    async with client_of(outputs) as client:
        document = (await client.get("/openapi.json")).json()
    assert sorted(document["paths"]) == sorted(["/events", *(f"{page.path}.json" for page in PAGES)])
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert referred <= document["components"]["schemas"].keys()
    rollouts = document["paths"]["/runs/{run}/rollouts.json"]["get"]["parameters"]
    assert {"run", "min_reward", "after", "limit"} <= {one["name"] for one in rollouts}


async def test_numbers_on_pages_are_those_of_the_files(outputs: Path):
    lines = scan(RunDir(outputs / "demo"))
    async with client_of(outputs) as client:
        page = (await client.get("/runs/demo/rollouts?limit=200")).text
        one = (await client.get("/runs/demo/rollouts/step-000001/2")).text
        ledger = (await client.get("/runs/demo/ledger.json")).json()["bands"][0]
        curve = (await client.get("/runs/demo/curves.json")).json()["curves"][0]
        row = (await client.get("/runs.json")).json()["runs"][0]
    shown = re.findall(r'rollouts/([\w-]+)/(\d+)">([\d.]+)</a>', page)
    assert {(file, int(line), reward) for file, line, reward in shown} == {
        (line.file, line.line, f"{line.record.reward:.3f}") for line in lines
    }
    (line,) = [line for line in lines if (line.file, line.line) == ("step-000001", 2)]
    assert f"said by {line.record.rollout_id}" in one
    assert ledger["seconds"] == {"work": 3.0, "idle": 1.0}
    assert (curve["name"], curve["values"]) == ("reward/trained", [0.0, 0.125, 0.25, 0.375])
    assert (row["steps"], row["reward"], row["age"]) == (4, 0.375, 1.0)


class _Acting(HTMLParser):
    """What a browser would do at once or at an event, other than the scripts of the package."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "script" and not given.get("src", "").startswith("/static/"):
            self.found.append(f"a script: {given}")
        if tag in ("iframe", "object", "embed", "style", "base", "svg") or (tag == "img" and given.get("src") == "x"):
            self.found.append(tag)
        self.found += [name for name in given if name.startswith("on") or name == "style"]
        urls = [given.get(name, "") for name in ("href", "src", "action")]
        self.found += [
            url for url in urls if re.match(r"\s*(javascript|data:(?!image/(png|jpeg|gif|webp);)|//|http)", url)
        ]


def acting(page: str) -> list[str]:
    parser = _Acting()
    parser.feed(page)
    return parser.found


@pytest.mark.parametrize("planted", [ATTACK, "<a href='javascript:x()'>", "<p style='x'>", "<b onclick=x>", "<svg/>"])
def test_what_acts_is_noticed(planted: str):
    assert acting(f"<p>{planted}</p>")


async def test_what_is_in_a_rollout_is_text(outputs: Path):
    """Everywhere that something of it is shown: tasks, messages, errors, tools, names."""
    run, chance = RunDir(outputs / "demo"), random.Random(0)
    message = {"role": ATTACK, "content": ATTACK, "name": ATTACK, "reasoning_content": ATTACK, "tool_call_id": ATTACK}
    call = {"function": {"name": ATTACK, "arguments": ATTACK}}
    odd = [{"role": "assistant", "content": [{"type": "text", "text": ATTACK}], "tool_calls": [call, ATTACK, None]}]
    image = {"type": "image_url", "image_url": {"url": 'data:image/svg+xml,<svg onload="alert(1)"/>'}}
    made = record(0, chance, environment=ATTACK, ending=Ending.FAILED, error=ATTACK, tools=[{"name": ATTACK}])
    task = msgspec.structs.replace(made.task, prompt=ATTACK, key=ATTACK, answer=ATTACK)
    said = [message, *odd, {"role": "user", "content": [image]}]
    made = msgspec.structs.replace(made, task=task, messages=said, metrics={ATTACK: 1.0}, rewards={ATTACK: 0.5, "b": 1})
    write(run, "step-000001", [made, made, made])
    run.restarts.write_text(
        json.dumps({"process": ATTACK, "attempt": 1, "life": 1, "why": ATTACK, "ended_at": 1.0, "gone_s": None}) + "\n"
    )
    run.moves.write_text(json.dumps({"step": 1, "source": ATTACK, "key": ATTACK, "from": ATTACK, "to": ATTACK}) + "\n")
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 2, "time": 1, "phase": "warning", "rule": ATTACK, "text": ATTACK}) + "\n")
        file.write(json.dumps({"step": 9, "time": 1, ATTACK: 1.0, f"curriculum/{ATTACK}/easy_tasks": 1}) + "\n")
    async with client_of(outputs) as client:
        pages = {page.path: (await client.get(address(page.path))).text for page in PAGES}
        pages["task"] = (await client.get("/runs/demo/task", params={"task": ATTACK})).text
        pages["asked"] = (await client.get("/runs/demo/rollouts", params={"task": ATTACK, "error": ATTACK})).text
        pages["refused"] = (await client.get("/runs/demo/rollouts", params={ATTACK: ATTACK})).text
        pages["unknown"] = (await client.get(f"/runs/{ATTACK.replace('/', '')}")).text
    for path, text in pages.items():
        assert acting(text) == [], path
    shown = unescape(pages["/runs/{run}/rollouts/{file}/{line}"])
    assert shown.count(ATTACK) > 8, "the control: what was written is shown"


async def test_only_its_own_names_are_answered(outputs: Path):
    for host, status in {"localhost": 200, "127.0.0.1:8003": 200, "[::1]:80": 200, "evil.example": 421}.items():
        async with client_of(outputs, host) as client:
            assert (await client.get("/runs.json")).status_code == status, host
            assert (await client.get("/static/view.js")).status_code == status, host


def test_names():
    assert is_ours("Localhost:80", frozenset({"localhost"}))
    assert is_ours("10.0.0.7:8003", frozenset())
    for other in ("localhost.evil.example", "", "127.0.0.1.evil.example:80", "evil", "[evil]:80"):
        assert not is_ours(other, frozenset({"localhost"})), other


@pytest.mark.parametrize("path", ["/runs", "/nothing", "/runs.json", "/static/view.js", "/runs/demo/rollouts?limit=x"])
async def test_every_answer_says_what_browsers_may_do(outputs: Path, path: str):
    async with client_of(outputs) as client:
        headers = (await client.get(path)).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/runs/..%2F..%2Fetc",
        "/runs/../../etc/passwd",
        "/runs/demo/rollouts/..%2F..%2Fconfig/0",
        "/runs/demo/rollouts/..%2F..%2Fother%2Frollouts%2Fstep-000000/0.json",
        "/runs/demo/rollouts/step-000001/999999",
        "/runs/demo/rollouts/step-000001/-1",
        "/static/..%2Fweb.py",
        "/static/../web.py",
        "/runs/nobody.json",
    ],
)
async def test_nothing_else_is_found(outputs: Path, path: str):
    async with client_of(outputs) as client:
        answer = await client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "query", ["min_reward=x", "limit=0", "limit=201", "colour=red", "sort=x", "after=x", "group=-1"]
)
async def test_a_query_that_cannot_be_is_told(outputs: Path, query: str):
    async with client_of(outputs) as client:
        answer = await client.get(f"/runs/demo/rollouts.json?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]


async def test_it_only_reads(outputs: Path):
    async with client_of(outputs) as client:
        assert (await client.post("/runs")).status_code == 405
        assert (await client.delete("/runs/demo")).status_code == 405


async def test_torn_files_are_no_errors(outputs: Path):
    run = RunDir(outputs / "demo")
    for path in (run.metrics, run.ledger, run.config, run.rollouts / "step-000003.jsonl"):
        path.write_bytes(path.read_bytes()[:-7])
    (run.path / "status.json").write_text("{")
    (run.path / "summary.json").write_text("")
    async with client_of(outputs) as client:
        for page in PAGES:
            assert (await client.get(address(page.path))).status_code == 200, page.path


async def test_a_run_without_anything_is_shown(tmp_path: Path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    async with client_of(tmp_path) as client:
        for page in PAGES:
            path = page.path.format(run="bare", file="step-000000", line=0)
            status = (await client.get(path + ("?task=x" if path.endswith("task") else ""))).status_code
            assert status == (404 if "{file}" in page.path else 200), path


async def test_no_more_listen_than_may(outputs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "MOST_SUBSCRIBERS", 2)
    async with Site(outputs) as site:
        first = site.watch.subscribe("demo")
        site.watch.subscribe("")
        with pytest.raises(FullError):
            site.watch.subscribe("demo")
        site.watch.leave(first)
        again = site.watch.subscribe("demo")
    assert again.is_closed
    assert await again.next(1.0) == {}


async def test_those_who_listen_hear_what_is_theirs(outputs: Path):
    async with Site(outputs) as site:
        of_demo, of_all = site.watch.subscribe("demo"), site.watch.subscribe("")
        of_demo.tell({"other": {"metrics"}})
        for subscription in (of_demo, of_all):
            subscription.tell({"demo": {"metrics"}, "other": {"rollouts"}})
            subscription.tell({"demo": {"ledger"}})
        assert await of_demo.next(1.0) == {"demo": {"metrics", "ledger"}}
        assert await of_all.next(1.0) == {"demo": {"metrics", "ledger"}, "other": {"rollouts"}}


@pytest.mark.parametrize(("patience_s", "is_told"), [(0.0, True), (60.0, False)])
async def test_who_saw_a_part_hears_when_all_has_been_read(outputs: Path, monkeypatch, patience_s, is_told):
    """Nothing of a finished run changes any more: nobody else would tell."""
    monkeypatch.setattr(site_module, "PATIENCE_S", patience_s)
    async with Site(outputs) as site:
        subscription = site.watch.subscribe("demo")
        run = site.library.open("demo")
        await site.ready(run)
        await asyncio.wrap_future(site._update(run))
        if is_told:
            assert await subscription.next(WAIT_S) == {"demo": {"rollouts"}}
        else:
            with pytest.raises(DeadlineError):
                await subscription.next(0.2)


async def test_a_run_is_heard_of_wherever_it_begins(tmp_path: Path):
    """In a directory that had none, and whose files come after it."""
    (tmp_path / "evals").mkdir()
    async with Site(tmp_path) as site:
        subscription = site.watch.subscribe("")
        await asyncio.wait_for(site.watch.begun.wait(), WAIT_S)
        begun = RunDir(tmp_path / "evals" / "later")
        begun.path.mkdir()
        begun.config.write_text(json.dumps({"log": {"name": "later"}}))
        heard = await subscription.next(WAIT_S)
    assert [kinds for run, kinds in heard.items() if "later" in run] == [{"state"}]


def before_watching(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Have it done when directories have been listed and are not watched yet, the `number`th time."""
    calls, awatch = itertools.count(1), watchfiles.awatch

    def watching(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            act()
        return awatch(*given, **named)

    monkeypatch.setattr(watchfiles, "awatch", watching)


async def heard_of(subscription: Subscription, expected: Changed) -> Changed:
    """All that it hears until it has heard of that."""
    heard: Changed = {}
    while not all(kinds <= heard.get(run, set()) for run, kinds in expected.items()):
        for run, kinds in (await subscription.next(WAIT_S)).items():
            heard.setdefault(run, set()).update(kinds)
    return heard


async def test_a_run_that_begins_while_a_watch_is_set_up_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before_watching(monkeypatch, 1, lambda: write_run(tmp_path, "meanwhile"))
    async with Site(tmp_path) as site:
        heard = await heard_of(site.watch.subscribe(""), {"meanwhile": {"state", "metrics", "ledger", "rollouts"}})
    assert heard.keys() == {"meanwhile"}


async def test_what_is_written_while_the_next_watch_is_set_up_is_heard_of(outputs: Path, monkeypatch):
    """Into what was watched, and into what is going to be."""
    old, new = RunDir(outputs / "demo"), RunDir(outputs / "later")

    def write_both() -> None:
        with old.metrics.open("a") as file:
            file.write("{}\n")
        write(new, "step-000000", [record(0, random.Random(0))])

    before_watching(monkeypatch, 2, write_both)
    async with Site(outputs) as site:
        subscription = site.watch.subscribe("")
        await asyncio.wait_for(site.watch.begun.wait(), WAIT_S)
        new.rollouts.mkdir(parents=True)
        new.config.write_text("{}")
        heard = await heard_of(subscription, {"demo": {"metrics"}, "later": {"state", "rollouts"}})
    assert heard == {"demo": {"metrics"}, "later": {"state", "rollouts"}}


@pytest.mark.parametrize("refusal", [OSError("OS file watch limit reached"), RuntimeError("Error creating watcher")])
async def test_where_the_kernel_takes_one_watch_it_has_the_newest(outputs: Path, monkeypatch, refusal: Exception):
    """What there is when it takes that one counts as changed, of all runs."""
    held, awatch = [], watchfiles.awatch

    async def watching(*given: Any, **named: Any):
        if held:
            raise refusal
        held.append(given)
        try:
            async for changes in awatch(*given, **named):
                yield changes
        finally:
            held.clear()

    monkeypatch.setattr(watchfiles, "awatch", watching)
    monkeypatch.setattr(watch, "_AGAIN_S", 0.01)
    later = RunDir(outputs / "later")
    async with Site(outputs) as site:
        subscription = site.watch.subscribe("")
        await asyncio.wait_for(site.watch.begun.wait(), WAIT_S)
        later.rollouts.mkdir(parents=True)
        later.config.write_text("{}")
        heard = await heard_of(subscription, {"demo": {"metrics", "rollouts"}, "later": {"state"}})
        assert any(str(later.path) in str(place) for place in held[0])
    assert heard.keys() == {"demo", "later", "other"}


async def test_a_watcher_that_fails_begins_again(tmp_path: Path, monkeypatch, capsys):
    calls, has_begun_again = [], asyncio.Event()

    async def fails(self, directories):
        calls.append(directories)
        if len(calls) == 1:
            raise OSError("No space left on device")
        has_begun_again.set()
        await self._stop.wait()

    monkeypatch.setattr(watch.Watch, "_until_new", fails)
    monkeypatch.setattr(watch, "_AGAIN_S", 0.01)
    async with Site(tmp_path):
        await asyncio.wait_for(has_begun_again.wait(), WAIT_S)
    assert len(calls) == 2
    assert "No space left on device" in capsys.readouterr().err


async def test_links_to_a_task_name_its_environment(outputs: Path):
    """Sets of one environment have the same tasks."""
    async with client_of(outputs) as client:
        for page in ("rollouts", "groups"):
            links = re.findall(r'href="(/runs/demo/task[^"]*)"', (await client.get(f"/runs/demo/{page}")).text)
            assert links
            assert all("environment=" in link for link in links)


async def test_what_is_invalid_is_in_no_mean_of_a_task(tmp_path: Path):
    run = write_run(tmp_path, "demo")
    chance = random.Random(0)
    made = [
        record(i, chance, version=1, task=Task(prompt="p", key="one"), environment="calc", reward=reward, ending=ending)
        for i, (reward, ending) in enumerate([(1.0, Ending.OK), (0.5, Ending.OK), (0.0, Ending.INVALID)])
    ]
    sampled = [msgspec.structs.replace(one, seats=made_seats(1)) for one in made]
    write(run, "step-000009", sampled)
    async with client_of(tmp_path) as client:
        found = (await client.get("/runs/demo/task.json", params={"task": "one", "environment": "calc"})).json()
    assert [(row["num_rollouts"], row["mean_reward"]) for row in found["versions"]] == [(2, 0.75)]


def made_seats(version: int) -> tuple[Seat, ...]:
    spans, turns = (Span(version, 2, 4),), (TurnSpan(0, 2, 4),)
    said = Sample(
        token_ids=[1, 2, 3, 4], logprobs=[0.0, 0.0, -1.0, -1.0], sampled=[0, 0, 1, 1], spans=spans, turns=turns
    )
    return (Seat(samples=(said,)),)
