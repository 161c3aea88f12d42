"""The report in a real browser: by mouse and by keyboard, light and dark, on a phone and on paper."""

import browser
import pytest
import report_folders as folders
from PIL import Image

from sharedkd.lab.report import write_report

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING),
]

SCORES = {"none": [30.0, 31.0, 35.0], "low": [1.5, 2.5, 3.5], "gain": [110.0, 111.0, 115.5]}
SCORES["long_name_of_a_method_that_is_wider_than_most"] = [9.0, 10.0, 11.0]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = folders.comparison(tmp_path_factory.mktemp("a") / f"x{'y' * 60}", SCORES)
    folders.features(folder / "features")
    folders.detections(folder / "detections")
    return write_report(folder)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    page = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(autouse=True)
def page(started, report):
    """The report, opened on a screen; no test may leave an error on the console or load anything."""
    started.size(1200)
    started.prefer("light")
    started.open(report)
    started.js("localStorage.clear()")
    started.open(report)
    yield started
    assert started.problems == []
    assert {url.partition(":")[0] for url in started.requests} <= {"file", "data"}


def order(page):
    names = page.js("[...document.querySelectorAll('.sortable tbody th')].map(x => x.textContent)")
    return [name[:4] for name in names]


def heading(column):
    return f".sortable thead th:nth-child({column}) button"


def focus(page, selector):
    page.js(f"document.querySelector('{selector}').focus()")


def unfold(page):
    page.js("document.querySelectorAll('details').forEach(x => x.open = true)")


def test_a_click_sorts_by_number_and_a_second_one_turns_it_around(page):
    assert order(page) == ["none", "low", "gain", "long", "teac"]
    page.click(heading(2))  # AP: as texts, 9 and 10 would be the other way around
    assert order(page) == ["gain", "teac", "none", "long", "low"]
    page.click(heading(2))
    assert order(page) == ["low", "long", "none", "teac", "gain"]
    sorts = "[...document.querySelectorAll('.sortable th[aria-sort]')].map(x => x.ariaSort)"
    assert page.js(sorts)[:3] == ["none", "ascending", "none"]
    for _ in range(2):
        page.click(heading(3))  # the difference: the teacher has none, and is last both ways
        assert order(page)[-1] == "teac"
    focus(page, heading(1))
    page.press("Enter")
    assert order(page) == ["gain", "long", "low", "none", "teac"]


def test_the_slider_follows_mouse_and_keys(page, tmp_path):
    at = "document.querySelector('.compare').style.getPropertyValue('--at')"
    assert page.js(at) == "50%"
    focus(page, ".viewer input")
    page.press("ArrowRight")
    assert page.js(at) == "51%"
    page.press("End")
    assert page.js("document.querySelector('.viewer input').ariaValueText") == "100 % plain"
    page.click(".compare", x=0.3)
    assert page.js(at) == "30%"
    # Seen, and not only set: pixels of a screenshot on both sides of the handle.
    box = "(b => [b.x, b.y, b.width, b.height])(document.querySelector('.compare').getBoundingClientRect())"
    x, y, width, height = page.js(box)
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png").convert("RGB") as image:
        left, right = (
            image.getpixel((int(x + s * width), int(y + height / 2))) for s in (0.2, 0.4)
        )
    assert left == pytest.approx((60, 200, 90), abs=6)  # plain; JPEG
    assert right == pytest.approx((120, 200, 90), abs=6)  # distilled


def test_the_gallery_shows_the_chosen_models_and_images(page):
    def shown():
        """Whose pictures, on which image."""
        alts = "['.over', '.under'].map(x => document.querySelector(x).alt)"
        status = page.js("document.querySelector('.turn [role=status]').textContent")
        return [*page.js(alts), status]

    first, second = "0&.jpg, 1 object", "1&.jpg, 2 objects"
    assert shown() == [f"plain on {first}", f"distilled on {first}", f"1 of 2: {first}"]
    page.click(".turn button:last-of-type")
    assert shown() == [f"plain on {second}", f"distilled on {second}", f"2 of 2: {second}"]
    focus(page, ".viewer select")
    page.press("End")
    assert shown()[0] == f"{folders.NASTY} on {second}"


def test_a_legend_hides_its_curve(page):
    shown = "getComputedStyle(document.querySelector('#curves [data-series=\"0\"]')).display"
    assert page.js(shown) != "none"
    page.click("#curves [data-toggle='0']")
    assert page.js(shown) == "none"


def test_light_and_dark(page, report):
    light = "getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'"
    assert page.js(light)
    page.prefer("dark")
    assert not page.js(light)
    assert page.js("document.getElementById('theme').ariaPressed") == "true"
    page.click("#theme")
    assert page.js(light)
    page.open(report)
    assert page.js(light)  # remembered


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_can_be_seen(page, scheme):
    """WCAG's contrast with the page: 4.5 of text, 3 of graphics."""
    page.prefer(scheme)
    unfold(page)
    low = """(() => { const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
      .reduce((s, x, i) => s + x * [.2126, .7152, .0722][i], 0);
      const back = light(getComputedStyle(document.body).backgroundColor);
      const contrast = (c) => (Math.max(light(c), back) + .05) / (Math.min(light(c), back) + .05);
      const all = (selector, key, least) => [...document.querySelectorAll(selector)]
        .map(e => [contrast(getComputedStyle(e)[key]), least, e.outerHTML.slice(0, 80)]);
      return [...all('p, a, dt, dd, figcaption, .verdict', 'color', 4.5), ...all('svg text', 'fill', 4.5),
        ...all('[data-series] path', 'stroke', 3)].filter(x => x[0] < x[1]); })()"""
    assert page.js(low) == []
    assert page.js("document.querySelectorAll('[data-series] path').length") > 10


@pytest.mark.parametrize("width", [320, 390, 900])
def test_a_phone_scrolls_in_one_direction_and_words_of_plots_can_be_read(page, report, width):
    page.size(width, 844, phone=width < 900)
    page.open(report)
    unfold(page)
    assert page.js("document.documentElement.scrollWidth") == width
    size = """Math.min(...[...document.querySelectorAll('.plot svg text')].map(
      e => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b)))"""
    assert 11 <= page.js(size) < 20
    image = "document.querySelector('.paper img[alt=Mistakes]')"
    drawn = page.js(f"(({image}).loading = 'eager', {image}.decode()).then(() => {image}.width)")
    assert drawn == (folders.PICTURE[0] if width < 480 else width - 32)


def test_the_keyboard_skips_to_the_report_and_everything_that_can_be_used_has_a_name(page):
    page.press("Tab")
    assert page.js("document.activeElement.getBoundingClientRect().x") >= 0
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert page.js("document.activeElement.id") == "main"
    roles = {"button", "link", "slider", "combobox", "image", "region", "columnheader"}
    unnamed = [
        node["role"]["value"]
        for node in page.call("Accessibility.getFullAXTree")["nodes"]
        if node.get("role", {}).get("value") in roles and not node.get("name", {}).get("value")
    ]
    assert unnamed == []


def test_paper_shows_what_is_folded(page):
    folded = "document.querySelectorAll('details:not([open])').length"
    page.js(f"addEventListener('beforeprint', () => {{ window.printed = {folded} }})")
    before = page.js(folded)
    assert page.pdf().startswith(b"%PDF")
    assert before > 0 and page.js("window.printed") == 0
    assert page.js(folded) == before
