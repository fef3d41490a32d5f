"""The report in a real browser, on a phone and on a desk, light and dark, in both languages: what a reader would stumble over."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from katei import api
from katei.study.report.words import words_of
from tests.helpers.browser import MISSING, Page, browser
from tests.helpers.simulated import HOSTILE, simulated_run

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

LOOKS = [(390, False), (390, True), (1280, False), (1280, True)]

# Of every element with text of its own: the contrast of its colour with what is painted behind it (WCAG 2, relative luminance).
CONTRAST = """
const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('svg') &&
  [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())).map(e => {
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 80)]; });
"""

OUTSIDE = """
const width = arguments[0];
return [...document.querySelectorAll('main *')].filter(e => !e.closest('.wide, pre, thead') && e.checkVisibility()).filter(e => {
  const box = e.getBoundingClientRect(); return box.right > width + 1 || box.left < -1; }).map(e => e.outerHTML.slice(0, 90));
"""

# A glyph that the fonts lack is drawn as the same box as any other one they lack: a code point of private use is surely one.
GLYPHS = """
const canvas = document.createElement('canvas'); canvas.width = canvas.height = 40;
const pen = canvas.getContext('2d', {willReadFrequently: true});
pen.font = '30px ' + getComputedStyle(document.body).fontFamily;
const draw = letter => { pen.clearRect(0, 0, 40, 40); pen.fillText(letter, 4, 32); return pen.getImageData(0, 0, 40, 40).data.join(); };
return arguments[0].concat(['\\u{10FFFD}']).map(draw);
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_run(tmp_path_factory.mktemp("page"), labels=("非常に長い名前の冷たいラベル", "warm"))


@pytest.fixture(scope="module", params=["en", "ja"])
def page(request: pytest.FixtureRequest, run: Path) -> Iterator[Page]:
    api.report(run, lang=request.param)
    with browser(request.param) as one:
        yield one


def open_report(page: Page, run: Path, width: int, dark: bool, *, unfolded: bool = True) -> None:
    page.open((run / "report.html").as_uri(), width=width, dark=dark)
    assert page.run("return document.documentElement.lang") == page.language
    if unfolded:
        page.run("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_what_a_reader_sees(width: int, dark: bool, page: Page, run: Path) -> None:
    open_report(page, run, width, dark, unfolded=False)
    words = words_of(page.language)
    first, second, *_ = [line for line in page.run("return document.body.innerText").split("\n") if line]
    assert first == words["verdict"]
    assert api.report(run, lang=page.language)["verdict"].startswith(second)
    assert page.run("return document.querySelector('.lead').getBoundingClientRect().bottom < innerHeight")
    for unfolded in (False, True):  # by the width asked for: a phone's innerWidth grows with what sticks out
        open_report(page, run, width, dark, unfolded=unfolded)
        assert page.run("return document.documentElement.scrollWidth") <= width, "nothing to scroll sideways"
        outside = page.run(OUTSIDE, width)
        assert outside == []
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 22, 24)" if dark else "rgb(251, 250, 247)")
    assert page.run("return performance.getEntriesByType('resource').length") == 0, "nothing is fetched"
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(dark: bool, page: Page, run: Path) -> None:
    open_report(page, run, 1280, dark)
    contrasts = page.run(CONTRAST)
    assert len(contrasts) > 500
    assert [(ratio, what) for ratio, what in contrasts if ratio < 4.5] == []
    strokes = {
        name: page.run(f"return getComputedStyle(document.querySelector('{name}')).stroke")
        for name in (".strip .range", ".first", ".other", ".point", ".refers .strip .range", ".forest .zero")
    }
    paper = (22, 22, 24) if dark else (251, 250, 247)
    for name, stroke in strokes.items():
        assert _contrast(tuple(int(v) for v in stroke[4:-1].split(",")), paper) >= 3, name


def _contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    def light(colour: tuple[int, ...]) -> float:
        parts = [v / 255 / 12.92 if v / 255 <= 0.03928 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_japanese_is_drawn_and_not_as_boxes(page: Page, run: Path) -> None:
    open_report(page, run, 390, False)
    letters = [*"冷詩結論正解率あのカ、。「」"]
    shapes = page.run(GLYPHS, letters)
    assert len(set(shapes)) == len(letters) + 1, "each letter has a shape of its own, and none is the missing one's"


def test_every_plot_says_what_it_shows(page: Page, run: Path) -> None:
    open_report(page, run, 1280, False)
    labels = page.run(
        "return [...document.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label').trim())"
    )
    assert len(labels) > 60
    assert all(labels)
    silent = page.run(
        "return [...document.querySelectorAll('svg:not([role=img])')].filter(s => !s.closest('[aria-hidden]')).length"
    )
    assert silent == 0
    headings = page.run("return [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(headings))
    unnamed = page.run(
        "return [...document.querySelectorAll('section')].filter(s => !document.getElementById(s.getAttribute('aria-labelledby'))).length"
    )
    assert unnamed == 0
    broken = page.run(
        "return [...document.querySelectorAll('nav a')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    )
    assert broken == 0


def test_points_stand_where_the_numbers_say(page: Page, run: Path) -> None:
    """On the screen, an accuracy's dot lies between its axis' ends as its value does."""
    open_report(page, run, 1280, False)
    found = page.run(
        "return [...document.querySelectorAll('#scores tr[data-method]')].map(r => [+r.querySelector('data').value, "
        "r.querySelector('.dot').getBoundingClientRect().left])"
    )
    ticks = page.run(
        "return [...document.querySelectorAll('#scores .axis span')].map(s => [+s.textContent, "
        "s.getBoundingClientRect().left + s.getBoundingClientRect().width / 2])"
    )
    (low, left), (high, right) = ticks[0], ticks[-1]
    for value, x in found:
        assert x == pytest.approx(left + (value - low) / (high - low) * (right - left), abs=6)


def test_everything_can_be_reached_by_keyboard(page: Page, run: Path) -> None:
    open_report(page, run, 390, False)
    unreachable = page.run(
        "return [...document.querySelectorAll('.wide, pre')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0).length"
    )
    assert unreachable == 0, "what scrolls can be scrolled"
    assert page.run("return document.querySelectorAll('summary').length") >= 7
    small = page.run(
        "return [...document.querySelectorAll('nav a, summary')].filter(e => e.getBoundingClientRect().height < 24).length"
    )
    assert small == 0, "targets a finger can hit"


def test_a_hostile_text_is_shown_as_it_is(page: Page, run: Path) -> None:
    open_report(page, run, 390, False)
    assert page.run("return document.querySelector('.rows p').textContent") == HOSTILE
    assert page.run("return document.querySelectorAll('script, img').length") == 0
