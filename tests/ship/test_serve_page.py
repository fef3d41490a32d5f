"""The page at `/` in a real browser: what a person sees, on a phone and on a desk, in both languages, without any network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from katei.ship.serve.page import page_html, page_policy
from katei.ship.serve.shelf import Shelf, load_shelf
from tests.helpers.browser import MISSING, Page, browser
from tests.helpers.serving import Running, serving
from tests.helpers.trained import Trained

TEXT = "春の風、砕けた鏡 <b>the</b> iron gate"
in_a_browser = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def shelf(llama: Trained) -> Shelf:
    return load_shelf([llama.trial("lora"), llama.trial("ia3"), llama.trial("head")], say=lambda text: None)


@pytest.fixture(scope="module")
def server(shelf: Shelf) -> Iterator[Running]:
    with serving(shelf) as running:
        yield running


@pytest.fixture(scope="module", params=["en", "ja"])
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    with browser(request.param) as one:
        yield one


def test_the_page_is_one_file_that_asks_nobody_else(server: Running) -> None:
    reply = server.get("/")
    assert reply.body.decode() == page_html()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", page_html())
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page_html()), "texts stay texts"
    policy = reply.headers["content-security-policy"]
    assert policy == page_policy()
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


@in_a_browser
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1100, False)])
def test_what_a_person_sees(width: int, dark: bool, page: Page, server: Running, tmp_path: Path) -> None:
    page.open(f"http://127.0.0.1:{server.port}/", width=width, dark=dark)
    page.until("return !document.querySelector('#ask').hidden")
    assert page.run("return document.documentElement.lang") == page.language
    assert page.text("#classify") == {"en": "Classify", "ja": "分類する"}[page.language]
    page.type("#text", TEXT)
    page.click("#classify")
    page.until(
        "return document.querySelectorAll('article').length == 3 && !document.querySelector('#classify').disabled"
    )
    cards = page.run(
        "return [...document.querySelectorAll('article')].map(a => [a.querySelector('h2').textContent, "
        "a.querySelector('.prediction').textContent, [...a.querySelectorAll('.row')].map(r => "
        "[r.children[0].textContent, r.children[1].firstChild.offsetWidth / r.children[1].offsetWidth, r.children[2].textContent])])"
    )
    (expected,) = server.post("/classify", {"texts": [TEXT]}).json["results"]
    assert [name for name, _, _ in cards] == list(expected)
    for name, prediction, bars in cards:
        assert prediction == expected[name]["prediction"]
        for (label, share, shown), (own_label, p) in zip(bars, expected[name]["probabilities"].items(), strict=True):
            assert (label, shown) == (own_label, f"{100 * p:.1f}%")
            assert share == pytest.approx(p, abs=0.02)

    page.click("#explain")
    page.until("return document.querySelectorAll('.why').length == 3 && !document.querySelector('#explain').disabled")
    assert page.run("return [...document.querySelectorAll('.parts')].map(p => p.textContent)") == [TEXT] * 3
    why = server.post("/explain", {"text": TEXT, "adapter": "run/lora"}).json
    page.click("article:first-child .part:nth-child(2)")
    told, part = page.text("article:first-child .told"), why["parts"][1]
    before = why["probabilities"][why["prediction"]]
    for piece in (part["text"], why["prediction"], f"{100 * before:.1f}%", f"{100 * (before - part['effect']):.1f}%"):
        assert piece in told

    page.click("#language")
    assert page.text("#classify") == {"ja": "Classify", "en": "分類する"}[page.language]
    assert page.run("return document.querySelectorAll('.why').length") == 3, (
        "what was asked stays when the language changes"
    )
    page.click("#language")
    scrolled = page.run("return document.documentElement.scrollWidth")
    assert scrolled <= width, "nothing to scroll sideways"  # not innerWidth: a phone's grows with what sticks out
    small = page.run(
        "return [...document.querySelectorAll('button')].filter(b => b.offsetHeight && b.offsetHeight < 40).length"
    )
    assert small == 0, "buttons a finger can hit"
    away = page.run(
        "return performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(origin))"
    )
    assert away == []
    assert page.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(22, 22, 24)" if dark else "rgb(251, 250, 247)"
    )
    assert page.complaints() == []
    page.screenshot(tmp_path / f"{page.language}-{width}.png")


@in_a_browser
def test_what_goes_wrong_is_said(page: Page, shelf: Shelf) -> None:
    with serving(shelf, tokens=16) as running:
        page.open(f"http://127.0.0.1:{running.port}/", width=360)
        page.until("return !document.querySelector('#ask').hidden")
        page.type("#text", "the iron gate " * 5)
        page.click("#classify")
        page.until("return !document.querySelector('#problem').hidden")
        assert "at most 16" in page.text("#problem")
        assert page.run("return document.documentElement.scrollWidth") <= 360
    page.click("#classify")
    page.until("return !document.querySelector('#classify').disabled")
    assert page.text("#problem") == page.run("return WORDS[document.documentElement.lang].unreachable")
    page.complaints()


@in_a_browser
def test_a_token_is_asked_for_once(page: Page, shelf: Shelf) -> None:
    with serving(shelf, token="a-token") as running:
        page.open(f"http://127.0.0.1:{running.port}/", width=360)
        page.until("return !document.querySelector('#entry').hidden")
        page.type("#token", "wrong")
        page.click("#entry button")
        page.until("return !document.querySelector('#problem').hidden")
        page.run("document.querySelector('#token').value = ''")
        page.type("#token", "a-token")
        page.click("#entry button")
        page.until("return !document.querySelector('#ask').hidden")
        page.open(f"http://127.0.0.1:{running.port}/", width=360)
        page.until("return !document.querySelector('#ask').hidden")
        page.type("#text", "朝")
        page.click("#classify")
        page.until("return document.querySelectorAll('article').length == 3")
    page.complaints()


@in_a_browser
def test_both_languages_have_all_words(page: Page, server: Running) -> None:
    page.open(f"http://127.0.0.1:{server.port}/")
    english, japanese, used = page.run(
        "return [Object.keys(WORDS.en), Object.keys(WORDS.ja), [...document.querySelectorAll('[data-say]')].map(e => e.dataset.say)]"
    )
    assert english == japanese
    assert set(used) <= set(english)
