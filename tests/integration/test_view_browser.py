"""The viewer in a real browser: a run is opened, rollouts filtered, a token looked at; what is hostile stays text.

Needs Debian's chromium, and axe-core for one of them (`npm ci` in tests/integration/browser).
"""

import contextlib
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from benchmarks.viewer import NAME, make

from palestra.core.records import Task
from tests.fault.doomed import Fault
from tests.fault.whole_run import FaultyRun, config_of, save_table
from tests.integration.test_view import viewer
from tests.unit.hub.test_web import ATTACK
from tests.unit.hub.written import record, write

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make install, then make test")
CHROMIUM = shutil.which("chromium")
AXE = Path(__file__).parent / "browser/node_modules/axe-core/axe.min.js"

WAIT_S = 100
POINTS = "#chart-reward .numbers tbody tr"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: make debian"),
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("outputs")
    run = make(directory, steps=6, rollouts=64, seed=0, num_batches=2)
    hostile = record(9999, random.Random(0), error=ATTACK, environment=ATTACK)
    message = {"role": "assistant", "content": ATTACK, "tool_calls": [{"function": {"name": ATTACK}}]}
    hostile = msgspec.structs.replace(hostile, task=Task(prompt=ATTACK, key=ATTACK), messages=[message])
    write(run, "eval-hostile-v000006", [hostile])
    run.restarts.write_text(
        json.dumps({"process": ATTACK, "attempt": 1, "life": 1, "why": ATTACK, "ended_at": 1.0, "gone_s": None}) + "\n"
    )
    return directory


@pytest.fixture(scope="module")
def url(outputs: Path) -> Iterator[str]:
    with viewer(outputs) as (url, _):
        yield url.rstrip("/")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """Whatever a page complains of fails the test: errors of scripts, refusals by its policy, dialogs."""
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.complaints = complaints
    yield page
    context.close()
    assert complaints == []


def drawn(page) -> None:
    page.wait_for_selector("#chart-reward canvas")


def test_a_run_is_opened_from_the_list_by_keys(page, url: str):
    page.goto(url)
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"{url}/runs/{NAME}")
    drawn(page)
    assert page.locator(".chart:not([hidden]) canvas").count() >= 5
    label = page.locator("#chart-reward .plot").get_attribute("aria-label")
    assert label.startswith("Reward. reward/trained: ")
    page.wait_for_selector(".band canvas")
    page.locator("#chart-reward summary").click()
    page.wait_for_selector(POINTS)  # filled at once, when the browser says that it is open
    assert page.locator(POINTS).count() == 6
    page.keyboard.press("x")
    page.wait_for_function("() => document.getElementById('axis').getAttribute('aria-pressed') === 'true'")


def test_rollouts_are_filtered_and_paged(page, url: str):
    page.goto(f"{url}/runs/{NAME}/rollouts")
    page.select_option("select[name=kind]", "training")
    page.fill("input[name=min_reward]", "1")
    page.select_option("select[name=sort]", "-tokens")
    page.click("button:text-is('Filter')")
    page.wait_for_url("**min_reward=1**")
    rewards = page.locator("tr[data-row] a.main").all_inner_texts()
    assert rewards
    assert set(rewards) == {"1.000"}
    tokens = [int(text) for text in page.locator("tr[data-row] td:nth-child(6)").all_inner_texts()]
    assert tokens == sorted(tokens, reverse=True)
    page.keyboard.press("n")
    page.wait_for_url("**after=**")
    assert page.locator(".count").first.inner_text().startswith("51–")
    page.keyboard.press("p")
    page.wait_for_url("**before=**")
    assert page.locator(".count").first.inner_text().startswith("1–50 ")


def test_a_token_is_looked_at(page, url: str):
    page.goto(f"{url}/runs/{NAME}/rollouts/step-000005/7")
    page.wait_for_function("() => document.querySelector('.token:not(.given)').style.background !== ''")
    page.hover(".token[data-i='12']")
    detail = page.locator("#token-detail").inner_text()
    shown = page.request.get(f"{url}/runs/{NAME}/rollouts/step-000005/7.json").json()["tokens"]
    assert f"{shown['engine_logprobs'][12]:.4g}" in detail
    assert f"{shown['trainer_logprobs'][12]:.4g}" in detail
    assert f"{shown['advantages'][12]:.4g}" in detail
    assert str(shown["versions"][12]) in detail
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.on").get_attribute("data-i") == "13"
    assert page.locator("text=calculate(").count() == 1
    page.keyboard.press("Escape")
    page.keyboard.press("]")
    page.wait_for_url("**/rollouts/step-000005/8")


def test_what_is_hostile_stays_text(page, url: str):
    for path in ("", "/rollouts", "/rollouts/eval-hostile-v000006/0", "/marks", "/groups", "/curves"):
        page.goto(f"{url}/runs/{NAME}{path}")
        page.wait_for_load_state("load")
        page.wait_for_timeout(300)
        assert page.locator("main script, main img[src=x], main svg").count() == 0
    page.goto(f"{url}/runs/{NAME}/rollouts/eval-hostile-v000006/0")
    assert ATTACK in page.locator("main").inner_text()
    assert page.evaluate("document.cookie") == ""


def test_an_attack_would_be_seen(browser, url: str):
    """The control: without escaping, and without the policy, the same text runs."""
    assert _said_by_an_attack(browser.new_context(bypass_csp=True), url, is_stopped=False) == ["2"]


def test_the_policy_stops_what_would_get_through(browser, url: str):
    assert _said_by_an_attack(browser.new_context(), url, is_stopped=True) == []


def _said_by_an_attack(context, url: str, *, is_stopped: bool) -> list[str]:
    page, said = context.new_page(), []
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.goto(f"{url}/runs")
    plant = "text => { document.getElementById('content').innerHTML = text }"
    if is_stopped:
        page.evaluate(plant, ATTACK)
        page.wait_for_timeout(500)
    else:
        with page.expect_event("dialog"):
            page.evaluate(plant, ATTACK)
        page.evaluate("0")  # once the dialog is gone
    context.close()
    return said


def test_it_is_live(page, url: str, outputs: Path):
    page.goto(f"{url}/runs/{NAME}")
    drawn(page)
    page.wait_for_selector("#live:not([hidden])")
    with (outputs / NAME / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 77, "time": 1780000900.0, "reward/trained": 0.777}\n')
    page.wait_for_function("() => document.querySelector('#head').innerText.includes('0.777')", timeout=20_000)


class PacedRun(FaultyRun):
    """Its trainer waits before every step until it may train it; its threads go on, and tell what was done."""

    def __init__(self, directory: Path, *, steps: int):
        (outputs := directory / "outputs").mkdir()
        patient = {
            "train": {"steps": steps, "batch_deadline_s": 300},
            "engine": {"healthy_s": 120, "call_s": 60},
            "sync": {"deadline_s": 120},
            "env": {"stall_s": 300, "answer_s": 60},
        }
        config = config_of(outputs, save_table(directory / "model"), **patient)
        self._permits = [directory / f"step-{step}" for step in range(steps)]
        at = "tests.fault.table_trainer:TableTrainer.train"
        waits = [
            Fault(process="trainer", at=at, nth=step + 1, do="wait", after=str(permit))
            for step, permit in enumerate(self._permits)
        ]
        super().__init__(config, waits, directory, step_s=0.0)

    def train_one(self, step: int) -> None:
        self._permits[step].touch()


@pytest.mark.timeout(400)
def test_the_curve_of_a_run_grows_while_it_trains(page, browser, tmp_path: Path):
    """A whole run by the real supervisor, orchestrator and workers; its model is a table, for the sake of time. It
    trains a step once the page shows the one before.

    The control is a second page, which hears of no events.
    """
    steps = 6
    run = PacedRun(tmp_path, steps=steps)
    with viewer(Path(run.config.log.outputs)) as (url, _), run.start(output=subprocess.DEVNULL) as training:
        try:
            page.goto(url)
            page.click("a.main:text-is('run')", timeout=WAIT_S * 1000)
            run.train_one(0)
            _open_table(page)
            _shows(page, 1)
            deaf = _deaf(browser, page.url)
            for step in range(1, steps):
                assert page.request.get(f"{url}runs/run.json").json()["row"]["state"] == "running"
                run.train_one(step)
                _shows(page, step + 1)
            page.wait_for_function(
                "() => document.querySelector('#head').innerText.includes('finished')", timeout=WAIT_S * 1000
            )
            assert training.wait(timeout=WAIT_S) == 0
            assert deaf.locator(POINTS).count() == 1
        finally:
            page.goto("about:blank")  # its stream of events would break off
            if training.poll() is None:
                training.terminate()
                training.wait(timeout=WAIT_S)
    run.require_gone()


def _open_table(page) -> None:
    drawn(page)
    page.locator("#chart-reward summary").click()


def _shows(page, num_steps: int) -> None:
    """So many points in the opened table."""
    page.wait_for_function(f"() => document.querySelectorAll('{POINTS}').length === {num_steps}", timeout=WAIT_S * 1000)


def _deaf(browser, url: str):
    page = browser.new_context().new_page()
    page.route("**/events?**", lambda route: route.abort())
    page.goto(url)
    _open_table(page)
    _shows(page, 1)
    return page


def test_keys_are_told(page, url: str):
    page.goto(f"{url}/runs/{NAME}/rollouts")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "kind"
    page.keyboard.press("Escape")
    for _ in range(5):  # the second must come soon after the first
        page.keyboard.press("g")
        page.keyboard.press("g")
        with contextlib.suppress(sync_api.TimeoutError):
            page.wait_for_url(f"{url}/runs/{NAME}/groups", timeout=5000)
            break
    assert page.url == f"{url}/runs/{NAME}/groups"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_by_axe(browser, url: str, scheme: str):
    if not AXE.exists():
        pytest.skip("needs axe-core: npm ci in tests/integration/browser")
    pages = {
        "list": "/runs",
        "run": f"/runs/{NAME}",
        "rollouts": f"/runs/{NAME}/rollouts",
        "rollout": f"/runs/{NAME}/rollouts/step-000005/7",
        "groups": f"/runs/{NAME}/groups",
        "ledger": f"/runs/{NAME}/ledger",
        "marks": f"/runs/{NAME}/marks",
        "compare": f"/compare?runs={NAME}",
        "task": f"/runs/{NAME}/task?task=0*0",
    }
    context = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme=scheme)
    page, found = context.new_page(), []
    for name, path in pages.items():
        page.goto(url + path)
        page.wait_for_timeout(500)
        page.evaluate(AXE.read_text())
        told = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        for one in told["violations"]:
            if one["impact"] in ("serious", "critical"):
                found.append((name, one["id"], [node["target"] for node in one["nodes"]][:3]))
    context.close()
    assert found == []


@pytest.mark.parametrize("path", ["", "/rollouts", "/rollouts/step-000005/7", "/groups", "/ledger"])
def test_a_phone_scrolls_one_way(browser, url: str, path: str):
    context = browser.new_context(viewport={"width": 390, "height": 800}, is_mobile=True)
    page = context.new_page()
    page.goto(f"{url}/runs/{NAME}{path}")
    page.wait_for_timeout(500)
    width = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert width <= 391
