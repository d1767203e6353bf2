"""Evaluations of a hub in a real browser: leaderboard, two compared, a rollout; what is hostile stays text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from palestra.core.records import RolloutRecord, Sample, Seat, Span, TurnSpan
from palestra.hub.evals.archive import pack
from tests.hubs import running
from tests.integration.test_view_browser import AXE, CHROMIUM, browser, page
from tests.unit.hub.evals.made import records, told
from tests.unit.hub.test_web import ATTACK

__all__ = ["browser", "page"]  # fixtures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: make debian"),
]
HOME = "/alice/reverse-text/evaluations"


@dataclass(frozen=True)
class Site:
    url: str
    good: str  # ids
    poor: str
    hostile: str


def with_tokens(record: RolloutRecord) -> RolloutRecord:
    sample = Sample(
        token_ids=[1, 2, 3, 4],
        logprobs=[0.0, 0.0, -0.25, -1.5],
        sampled=[0, 0, 1, 1],
        spans=(Span(3, 2, 4),),
        turns=(TurnSpan(0, 2, 4),),
    )
    return msgspec.structs.replace(record, seats=(Seat(samples=(sample,)),))


def hostile() -> list[RolloutRecord]:
    task = msgspec.structs.replace(records()[0].task, key=ATTACK, prompt=ATTACK)
    message = {"role": "assistant", "content": ATTACK, "tool_calls": [{"function": {"name": ATTACK}}]}
    return [msgspec.structs.replace(one, task=task, messages=[message]) for one in records()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    place = tmp_path_factory.mktemp("site")
    with running(place / "data", "--admin", "alice") as hub, hub.client() as client:
        client.new_environment("alice", "reverse-text")

        def push(file: str, made: list[RolloutRecord], **changes) -> str:
            pack(told(**changes), made, place / f"{file}.zip")
            return client.push_evaluation("alice", "reverse-text", place / f"{file}.zip").id

        good = push("good", [with_tokens(one) for one in records("111111")], model="good")
        poor = push("poor", records("000001"), model="poor")
        attack = push("attack", hostile(), model=ATTACK, name=ATTACK, split=ATTACK, args={ATTACK: ATTACK})
        yield Site(hub.url, good, poor, attack)


def test_from_the_leaderboard_to_a_token(page, site: Site):
    page.goto(site.url + HOME)
    assert page.locator("tr[data-row] a.main").all_inner_texts() == ["good", ATTACK, "poor"]
    page.select_option("select[name=model]", "good")
    page.click("button:text-is('Filter')")
    page.wait_for_url("**model=good**")
    assert page.locator("tr[data-row]").count() == 1
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{HOME}/{site.good}")
    assert "--model good" in page.locator("pre").first.inner_text()
    page.click("text=Its rollouts")
    page.fill("input[name=min_reward]", "1")
    page.click("button:text-is('Filter')")
    page.wait_for_url("**min_reward=1**")
    page.locator("tr[data-row] a.main").nth(2).click()
    page.wait_for_url(f"**{HOME}/{site.good}/rollouts/results/2")
    page.wait_for_function("() => document.querySelectorAll('.token').length === 4")
    page.wait_for_function("() => document.querySelector('.token:not(.given)').style.background !== ''")
    page.hover(".token[data-i='3']")
    page.wait_for_function("() => document.getElementById('token-detail').innerText.includes('-1.5')")
    page.keyboard.press("]")
    page.wait_for_url(f"**{HOME}/{site.good}/rollouts/results/3")
    page.click(f"a[href='{HOME}/{site.good}']")
    page.wait_for_url(f"**{HOME}/{site.good}")


def test_two_are_chosen_and_compared(page, site: Site):
    page.goto(site.url + HOME)
    page.check(f"input[name=one][value='{site.poor}']")
    page.check(f"input[name=other][value='{site.good}']")
    page.click("text=Compare the two chosen")
    page.wait_for_url(f"**one={site.poor}**")
    assert page.locator("h1").inner_text() == "good against poor"
    assert "The second is better" in page.locator(".notice").inner_text()
    page.click("nav[aria-label='Which tasks'] >> text=won")
    page.wait_for_url("**which=won**")
    assert page.locator("table").last.locator("tbody tr").count() == 3
    page.locator("table").last.locator("tbody a").first.click()
    page.wait_for_url(f"**{HOME}/{site.poor}/rollouts**")
    assert page.locator("tr[data-row]").count() == 2


def test_what_is_hostile_stays_text(page, site: Site):
    compare = f"/compare?one={site.hostile}&other={site.hostile}"
    for path in ("", f"/{site.hostile}", f"/{site.hostile}/rollouts", f"/{site.hostile}/rollouts/results/0", compare):
        page.goto(f"{site.url}{HOME}{path}")
        page.wait_for_timeout(200)
        assert page.locator("main script, main img[src=x], main svg").count() == 0
        assert ATTACK in page.locator("main").inner_text(), path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_by_axe_and_a_phone_scrolls_one_way(browser, site: Site, scheme: str):
    if not AXE.exists():
        pytest.skip("needs axe-core: npm ci in tests/integration/browser")
    one = f"/{site.good}"
    paths = ("", one, f"{one}/rollouts", f"{one}/rollouts/results/0", f"/compare?one={site.poor}&other={site.good}")
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme, is_mobile=True)
    page, found = context.new_page(), []
    for path in paths:
        page.goto(f"{site.url}{HOME}{path}")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 391, path
        page.evaluate(Path(AXE).read_text())
        told = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        for violation in told["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found.append((path, violation["id"], [node["target"] for node in violation["nodes"]][:3]))
    context.close()
    assert found == []
