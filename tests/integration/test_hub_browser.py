"""The hub in a real browser: log in, find an environment, yank a version by its form; hostile text stays text."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hubs import Running, running
from tests.integration.test_view_browser import AXE, CHROMIUM
from tests.unit.hub.registry.packages import sdist, wheel
from tests.unit.hub.test_web import ATTACK

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make install, then make test")

README = Path(__file__).resolve().parents[2] / "environments/wordle/README.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: make debian"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Running]:
    """`token` is that of alice, who has three environments of two versions, and one that attacks."""
    directory = tmp_path_factory.mktemp("hub")
    texts = {
        "wordle": "Find a hidden word of five letters in six guesses",
        "logic": "Knights and knaves",
        "calc": "A tool",
    }
    with running(directory / "data") as found:
        with found.client() as client:
            client.new_owner("alice", kind="person")
            client.new_owner("bob", kind="person")
            found.token = client.new_token(person="alice", scope="admin", name="laptop").token
        with found.client(found.token) as client:
            for name, summary in texts.items():
                for version in ("0.1.0", "0.2.0"):
                    for make in (wheel, sdist):
                        of = {"summary": summary, "keywords": "game", "readme": README.read_text(), "python": ">=3.11"}
                        _push(client, directory, make(f"palestra-{name}", version, requires=["palestra"], **of))
            hostile = {"summary": ATTACK, "keywords": ATTACK, "license": ATTACK, "readme": f"{ATTACK}\n\n<{ATTACK}>"}
            _push(client, directory, wheel("palestra-hostile", files={"a.html": ATTACK.encode()}, **hostile))
            client.yank("alice", "hostile", "1.0", reason=ATTACK)
        yield found


def _push(client, directory: Path, made: tuple[str, bytes]) -> None:
    (directory / made[0]).write_bytes(made[1])
    client.push("alice", directory / made[0])


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """Whatever a page complains of fails the test: errors of scripts, refusals by its policy, dialogs."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
    yield page
    context.close()
    assert complaints == []


def log_in(page, hub: Running) -> None:
    page.goto(f"{hub.url}/login")
    page.fill("input[name=token]", hub.token)
    page.click("main button")
    page.wait_for_url("**/account")


def test_an_environment_is_found_opened_and_yanked_by_its_form(page, hub, tmp_path):
    """PALESTRA_IMAGES=docs/images takes the picture of the manual anew."""
    log_in(page, hub)
    page.click("a.brand")
    page.wait_for_url("**/environments")
    page.keyboard.press("/")
    page.keyboard.type("hidden letters")
    page.keyboard.press("Enter")
    page.wait_for_url("**words=hidden+letters**")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/alice/wordle")
    assert page.locator("h1").inner_text().startswith("wordle 0.2.0")
    assert f"{hub.url}/alice/wordle/simple/" in page.locator(".install").inner_text()
    assert page.locator(".readme h2").first.inner_text() == "wordle"
    version = page.locator(".version", has_text="palestra_wordle-0.1.0.tar.gz")
    version.locator("input[name=reason]").fill("a word was missing")
    version.locator("button").click()
    version.locator(".tag", has_text="yanked").wait_for()
    assert "a word was missing" in version.inner_text()
    page.screenshot(path=Path(os.environ.get("PALESTRA_IMAGES", tmp_path)) / "hub-environment.png")
    version.locator("a", has_text="source").first.click()
    page.locator("a.main", has_text=re.compile("__init__.py")).click()
    page.locator("pre.source", has_text="VERSION").wait_for()


def test_a_token_is_made_used_and_revoked(page, hub):
    log_in(page, hub)
    page.fill("form[action='/api/tokens'] input[name=name]", "ci")
    page.select_option("select[name=scope]", "read")
    page.click("button:text-is('Make it')")
    token = page.locator("main pre").inner_text()
    with hub.client(token) as client:
        assert client.account().scope == "read"
    page.goto(f"{hub.url}/account")
    page.locator("tr", has_text="ci").locator("button").click()
    page.wait_for_function(
        "() => ![...document.querySelectorAll('td')].some((cell) => cell.textContent.startsWith('ci '))"
    )
    page.click("button:text-is('Log out')")
    page.locator("header a:text-is('Log in')").wait_for()


def test_an_organisation_is_founded_and_a_member_let_in_changed_and_taken_out(page, hub, tmp_path):
    log_in(page, hub)
    page.fill("form[action='/api/owners'] input[name=name]", "team")
    page.click("button:text-is('Found it')")
    page.click("main a:text-is('team')")
    page.fill("input[name=person]", "bob")
    page.select_option("form.filters select", "read")
    page.click("button:text-is('Let in')")
    bob = page.locator("tr", has_text="bob")
    assert bob.locator("select").input_value() == "read"
    bob.locator("select").select_option("admin")
    with page.expect_navigation():
        bob.locator("button:text-is('Set')").click()
    assert page.locator("select[aria-label='Role of bob']").input_value() == "admin"
    page.screenshot(path=tmp_path / "members.png")
    with page.expect_navigation():
        page.click("button:text-is('Take bob out')")
    page.locator("tr", has_text="bob").wait_for(state="detached")
    assert axe(page) == []


def axe(page) -> list[tuple[str, str]]:
    """What is not accessible."""
    if not AXE.exists():
        pytest.skip("needs axe-core: make debian")
    page.evaluate(AXE.read_text())
    return [(one["id"], one["nodes"][0]["html"]) for one in page.evaluate("axe.run()")["violations"]]


@pytest.mark.parametrize("path", ["/environments", "/alice", "/alice/hostile", "/alice/hostile/source?path=a.html"])
def test_hostile_text_stays_text(page, hub, path):
    page.goto(hub.url + path)
    assert "<script>alert(1)</script>" in page.locator("main").inner_text()
    assert page.locator("main script, main img, [onerror]").count() == 0


def test_pages_are_accessible_in_light_and_dark(browser, hub):
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, bypass_csp=True, viewport={"width": 1200, "height": 900})
        page = context.new_page()
        log_in(page, hub)
        for path in ("/account", "/environments", "/alice/wordle", "/alice/wordle/source", "/alice", "/alice/hostile"):
            page.goto(hub.url + path)
            assert axe(page) == []
        context.close()


@pytest.mark.parametrize("path", ["/environments", "/alice/wordle", "/alice/wordle/source", "/alice"])
def test_pages_fit_on_a_phone(browser, hub, path):
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(hub.url + path)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
