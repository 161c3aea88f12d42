"""The report in a real browser: by mouse and by keyboard, light and dark, on a phone and on paper."""

import browser
import pytest
import report_folders as folders
from PIL import Image

from sharedkd.lab.report import write_report

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING)

SCORES = {"none": [30.0, 31.0, 35.0], "low": [1.5, 2.5, 3.5], "gain": [110.0, 111.0, 115.5]}
SCORES["long_name_of_a_method_that_is_wider_than_most"] = [9.0, 10.0, 11.0]


PICTURE = (1430, 792)  # of AP bars and mistakes


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = folders.comparison(tmp_path_factory.mktemp("a") / f"x{'y' * 60}", SCORES)
    folders.features(folder / "features")
    folders.detections(folder / "detections")
    Image.new("RGB", PICTURE, "teal").save(folder / "detections/mistakes.png")
    return write_report(folder)


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    page = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(autouse=True)
def opened(page, report):
    page.size(1200)
    page.prefer("light")
    page.open(report)
    page.js("localStorage.clear()")
    page.open(report)
    yield page
    assert page.problems == []
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}


METHODS = "[...document.querySelectorAll('.sortable tbody th')].map(x => x.textContent)"


def order(page):
    return [name[:4] for name in page.js(METHODS)]


def heading(column):
    return f".sortable thead th:nth-child({column}) button"


def test_a_click_sorts_by_number_and_a_second_one_turns_it_around(opened):
    assert order(opened) == ["none", "low", "gain", "long", "teac"]
    opened.click(heading(2))  # AP: as texts, 9 and 10 would be the other way around
    assert order(opened) == ["gain", "teac", "none", "long", "low"]
    opened.click(heading(2))
    assert order(opened) == ["low", "long", "none", "teac", "gain"]
    sorts = "[...document.querySelectorAll('.sortable th[aria-sort]')].map(x => x.ariaSort)"
    assert opened.js(sorts)[:3] == ["none", "ascending", "none"]


@pytest.mark.parametrize("key", ["Enter", " "])
def test_the_keyboard_sorts(opened, key):
    opened.js(f"document.querySelector('{heading(1)}').focus()")
    opened.press(key)
    assert order(opened) == ["gain", "long", "low", "none", "teac"]


def test_what_has_no_number_is_last_both_ways(opened):
    for _ in range(2):
        opened.click(heading(3))  # the difference: the teacher has none
        assert order(opened)[-1] == "teac"


AT = "document.querySelector('.compare').style.getPropertyValue('--at')"


def test_the_slider_follows_mouse_and_keys(opened):
    assert opened.js(AT) == "50%"
    opened.click(".compare", x=0.8)
    assert opened.js(AT) == "80%"
    opened.js("document.querySelector('.viewer input').focus()")
    opened.press("ArrowRight")
    assert opened.js(AT) == "81%"
    opened.press("End")
    assert opened.js(AT) == "100%"
    assert "plain" in opened.js("document.querySelector('.viewer input').ariaValueText")


COLOR = """(x) => { const image = document.querySelector(x), canvas = document.createElement('canvas');
canvas.width = canvas.height = 1; const c = canvas.getContext('2d'); c.drawImage(image, 0, 0, 1, 1);
return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); }"""


def colors(page):
    """Of the left and the right picture."""
    decode = "Promise.all([...document.querySelectorAll('.compare img')].map(x => x.decode()))"
    both = f"[({COLOR})('.compare .over'), ({COLOR})('.compare img:not(.over)')]"
    return page.js(f"{decode}.then(() => {both})")


def test_the_gallery_shows_the_chosen_models_and_images(opened):
    near = lambda *expected: pytest.approx(list(expected), abs=6)  # noqa: E731  JPEG
    left, right = colors(opened)
    assert (left, right) == (near(60, 200, 90), near(120, 200, 90))
    opened.click(".turn button:last-of-type")
    assert colors(opened)[0] == near(60, 100, 90)
    assert "2 of 2: 1&.jpg, 2 objects" in opened.js("document.querySelector('.turn').textContent")
    opened.js("document.querySelector('.viewer select').focus()")
    opened.press("End")  # the last model
    assert colors(opened)[0] == near(180, 100, 90)
    opened.js("document.querySelector('.turn button').focus()")
    opened.press("Enter")
    assert colors(opened)[0] == near(180, 200, 90)


def test_the_left_picture_covers_the_left_part(opened, tmp_path):
    """Seen, and not only set: pixels of a screenshot on both sides of the handle."""
    opened.click(".compare", x=0.3)
    box = opened.js("(() => { const b = document.querySelector('.compare').getBoundingClientRect();"
                    "return [b.x, b.y, b.width, b.height] })()")  # fmt: skip
    opened.screenshot(tmp_path / "page.png", whole=False)
    with Image.open(tmp_path / "page.png").convert("RGB") as image:
        at = [
            image.getpixel((int(box[0] + s * box[2]), int(box[1] + box[3] / 2))) for s in (0.2, 0.4)
        ]
    assert at[0] == pytest.approx((60, 200, 90), abs=6)
    assert at[1] == pytest.approx((120, 200, 90), abs=6)


def test_a_legend_hides_its_curve(opened):
    shown = "getComputedStyle(document.querySelector('#curves [data-series=\"0\"]')).display"
    assert opened.js(shown) != "none"
    opened.click("#curves [data-toggle='0']")
    assert opened.js(shown) == "none"


LIGHTNESS = (
    "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)"
    ".reduce((a, b) => +a + +b) / 3"
)


def test_light_and_dark(opened, report):
    assert opened.js(LIGHTNESS) > 200
    opened.prefer("dark")
    assert opened.js(LIGHTNESS) < 60
    assert opened.js("document.getElementById('theme').ariaPressed") == "true"
    opened.click("#theme")
    assert opened.js(LIGHTNESS) > 200
    opened.open(report)
    assert opened.js(LIGHTNESS) > 200  # remembered


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(opened, scheme):
    """WCAG's contrast of at least 4.5 between the text and the page."""
    opened.prefer(scheme)
    ratio = """(() => { const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
      .reduce((s, x, i) => s + x * [.2126, .7152, .0722][i], 0);
      const back = light(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll('p, a, caption, figcaption, .verdict, svg text')].map(e => {
        const s = getComputedStyle(e), l = light(e instanceof SVGElement ? s.fill : s.color);
        return [(Math.max(l, back) + .05) / (Math.min(l, back) + .05), e.outerHTML.slice(0, 80)]; })
      .filter(x => x[0] < (x[1].includes('class="name"') ? 3 : 4.5)); })()"""
    assert opened.js(ratio) == []


@pytest.mark.parametrize("width", [320, 375])
def test_a_phone_scrolls_in_one_direction(opened, report, width):
    opened.size(width, 700, phone=True)
    opened.open(report)
    assert opened.js("document.querySelectorAll('details').forEach(x => x.open = true)") is None
    assert opened.js("document.documentElement.scrollWidth") == width
    wide = "[...document.querySelectorAll('.scroll')].filter(x => x.scrollWidth > x.clientWidth).length"
    assert opened.js(wide) > 0  # so the tables have to scroll by themselves


TEXT = """Math.min(...[...document.querySelectorAll('.plot > svg text')].map(
  e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a || 99))"""


@pytest.mark.parametrize("width", [320, 390, 481, 900, 1200])
def test_words_of_plots_are_large_enough(opened, report, width):
    opened.size(width, 844, phone=width < 900)
    opened.open(report)
    opened.js("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert 11 <= opened.js(TEXT) < 99


def test_pictures_of_plots_keep_their_size_on_a_phone_and_fit_a_screen(opened, report):
    image = "document.querySelector('.paper img[alt^=mistakes]')"
    shown = f"(({image}).loading = 'eager', {image}.decode()).then(() => {image}.width)"
    assert 900 < opened.js(shown) < 1200
    opened.size(390, 844, phone=True)
    opened.open(report)
    assert opened.js(shown) == PICTURE[0]
    assert opened.js("document.documentElement.scrollWidth") == 390


def test_a_screen_shows_the_whole_results_and_heat_maps_before_beside_after(opened):
    wide = (
        "[...document.querySelectorAll('#results .scroll')].map(x => x.scrollWidth - x.clientWidth)"
    )
    assert opened.js(wide) == [0]
    tops = """['initial', 'final'].map(x => [...document.querySelectorAll('.heat')].find(
      e => e.caption.textContent == 'student - student, ' + x).getBoundingClientRect().y)"""
    before, after = opened.js(tops)
    assert before == after


def test_the_first_tab_skips_to_the_report_and_focus_is_seen(opened):
    opened.press("Tab")
    assert opened.js("document.activeElement.className") == "skip"
    assert opened.js("document.activeElement.getBoundingClientRect().x") >= 0
    assert opened.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    opened.press("Enter")
    assert opened.js("document.activeElement.id") == "main"


def test_what_can_be_used_has_a_name(opened):
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "slider", "combobox", "image", "region", "columnheader"}
    unnamed = [
        node["role"]["value"]
        for node in nodes
        if node.get("role", {}).get("value") in roles and not node.get("name", {}).get("value")
    ]
    assert unnamed == []


def test_paper_shows_what_is_folded(opened):
    opened.js("addEventListener('beforeprint', () => { window.printed ="
              "document.querySelectorAll('details:not([open])').length })")  # fmt: skip
    before = "document.querySelectorAll('details:not([open])').length"
    folded = opened.js(before)
    assert opened.pdf().startswith(b"%PDF")
    assert folded > 0 and opened.js("window.printed") == 0
    assert opened.js(before) == folded


def test_names_are_text(opened):
    assert opened.js("document.querySelectorAll('script').length") == 1
    assert folders.NASTY in opened.js("document.querySelector('#about').textContent")
