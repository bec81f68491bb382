"""The search page in a real browser: type, look, click, upload; no error in its console."""

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest

from tests.browser import ActionChains, Browser, By, Keys

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")

from serve_schema import AttentionOf  # noqa: E402
from serve_search import SearchLimits  # noqa: E402
from tests.searching import (  # noqa: E402
    BARE,
    HOSTILE,
    make_finder,
    serving,
    write_hostile_captions,
    write_photos,
)


@pytest.fixture(scope="module")
def chromium():
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium):
    chromium.size(1280)
    chromium.scheme("light")
    yield chromium
    assert chromium.errors() == []


@pytest.fixture
def finder(tiny_positions):
    write_photos()
    write_hostile_captions()
    return make_finder(photos="photos")


@pytest.fixture
def page(finder, browser):
    with serving(finder, SearchLimits(upload_bytes=2**20)) as page:
        browser.open(page.address)
        yield page
        browser.driver.get("about:blank")  # closes its connections, which the server waits for


@contextlib.contextmanager
def opened(browser, finder):
    with serving(finder) as page:
        browser.open(page.address)
        yield page
        browser.driver.get("about:blank")


def test_a_sentence_finds_images(page, browser):
    assert "15 images and 75 captions" in browser.text("#about")
    browser.search("A red dog runs .")
    assert browser.text("#status").startswith("12 images found in ")
    assert "first stage" in browser.text("#times") and " ms" in browser.text("#times")
    cards = browser.all(".card")
    assert ["Rank 1", "Rank 12"] == [cards[k].text.splitlines()[0] for k in (0, -1)]
    assert all("score " in card.text and ".jpg" in card.text for card in cards)
    loaded = "return [...document.querySelectorAll('.card img')].filter(x => x.naturalWidth).length"
    photos = len(browser.all(".card img"))
    browser.js("document.querySelectorAll('.card img').forEach(x => { x.loading = 'eager' })")
    browser.until(lambda: browser.js(loaded) == photos)
    assert photos >= 11  # one image has no photo
    assert [word.text for word in browser.all("#words button")] == "a red dog runs .".split()


def test_the_ranking_is_that_of_the_searcher(page, finder, browser):
    browser.search("A small blue cat .")
    found = finder.searcher.images_for("A small blue cat .", 12)
    names = [card.find_element(By.CSS_SELECTOR, ".name").text for card in browser.all(".card")]
    assert names == [f"p{image}.jpg" for image in found.places]
    scores = [card.find_element(By.CSS_SELECTOR, ".scores").text for card in browser.all(".card")]
    want = [f"score {a:.3f}, first stage {b:.3f}" for a, b in zip(*found[1:3], strict=True)]
    assert scores == want


def strongest(finder, query: str, word: int, browser) -> list[list[float]]:
    """The box of the region that a word attends to most, in each image that is shown."""
    images = [int(name.text[1:-4]) for name in browser.all(".card .name")]
    found = finder.look(AttentionOf(query=query, images=images))["images"]
    boxes = [one["boxes"][int(np.argmax(one["weights"][word]))] for one in found]
    return [[x1, y1, round(x2 - x1, 1), round(y2 - y1, 1)] for x1, y1, x2, y2 in boxes]


def test_a_word_shows_its_regions_in_all_images(page, finder, browser):
    browser.search("A red dog runs .")
    assert set(browser.lit()) == {0}
    words = browser.all("#words button")
    browser.point_at(words[1])
    browser.until(lambda: all(browser.lit()))
    assert browser.strongest() == strongest(finder, "A red dog runs .", 1, browser)
    browser.point_at(words[2])
    want = strongest(finder, "A red dog runs .", 2, browser)
    browser.until(lambda: browser.strongest() == want)
    browser.point_at(browser.one("h1"))
    browser.until(lambda: not any(browser.lit()))
    words[3].click()
    browser.point_at(browser.one("h1"))
    assert all(browser.lit()) and words[3].get_attribute("aria-pressed") == "true"
    words[3].click()
    browser.point_at(browser.one("h1"))
    browser.until(lambda: not any(browser.lit()))
    browser.js("document.querySelector('#query').focus()")
    browser.js("document.querySelectorAll('#words button')[0].focus()")  # as Tab does
    browser.until(lambda: all(browser.lit()))


def test_an_image_shows_what_the_sentence_attends_to(page, browser):
    browser.search("A red dog runs .")
    browser.js("document.querySelector('.card').focus()")
    browser.until(lambda: browser.lit()[0])
    assert not any(browser.lit()[1:])
    browser.point_at(browser.all(".card")[2])
    browser.until(lambda: browser.lit()[2])


def test_the_first_click_of_a_mouse_opens_the_captions(page, browser):
    """Pointing at an image draws over it, and so does the press, which focuses it."""
    browser.search("A red dog runs .")
    card = browser.all(".card")[1]
    mouse = ActionChains(browser.driver).move_to_element(card).pause(0.6)
    mouse.click_and_hold().pause(0.3).release().perform()
    browser.until(lambda: len(browser.all("#captions-list li")) == 12)
    browser.driver.find_element(By.CSS_SELECTOR, "body").send_keys(Keys.ESCAPE)


def test_an_image_opens_its_captions_and_escape_goes_back(page, browser):
    browser.search("A red dog runs .")
    card = browser.all(".card")[1]
    card.send_keys(Keys.ENTER)
    browser.until(lambda: len(browser.all("#captions-list li")) == 12)
    name = card.find_element(By.CSS_SELECTOR, ".name").text
    assert browser.text("#captions-heading") == f"Captions for image {name}"
    assert browser.js("return document.activeElement.closest('dialog') !== null")
    assert "score" in browser.one("#captions-list li").text
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
    browser.until(lambda: not browser.one("#captions").is_displayed())
    assert browser.driver.switch_to.active_element == card
    browser.all(".card")[4].click()
    browser.until(lambda: browser.one("#captions").is_displayed())
    browser.one("#close").click()
    assert browser.driver.switch_to.active_element == browser.all(".card")[4]


def test_each_choice_of_stages_shows_its_time(page, browser):
    browser.search("A red dog runs .")
    for stages in ("first", "exact"):
        browser.one(f"[value={stages}]").click()
        browser.until(lambda stages=stages: " ms" in browser.text(f"[data-of={stages}]"))
    assert " ms" in browser.text("[data-of=two]")
    assert "exact scores" in browser.text("#times")
    assert "first stage" not in browser.text("#times") + browser.one(".card .scores").text
    browser.search("A blue cat .")
    assert not browser.text("[data-of=two]") and browser.text("[data-of=exact]")


def test_captions_that_hold_html_are_shown_as_text(page, browser):
    assert HOSTILE in [button.text for button in browser.all("#examples button")]
    browser.all("#examples button")[0].click()
    browser.until(lambda: browser.all(".card"))
    assert HOSTILE in browser.text("#results-heading")
    browser.js("document.querySelector('#topk').value = 96")
    browser.all(".card")[0].click()
    browser.until(lambda: len(browser.all("#captions-list li")) == 75)
    shown = [x.text for x in browser.all("#captions-list .caption")]
    assert shown.count(HOSTILE) == 5
    assert browser.js("return window.pwned === undefined")
    assert not browser.all("#captions-list script, #captions-list img, h2 script, h2 img")


def test_a_picture_of_ones_own_finds_captions(page, finder, browser):
    path = Path("<b>mine.png").absolute()
    Image.new("RGB", (300, 200), (200, 40, 40)).save(path)
    browser.one("#picture").send_keys(str(path))
    browser.until(lambda: len(browser.all("#captions-list li")) == 12)
    assert browser.text("#captions-heading") == "Captions for <b>mine.png"
    photo = "return document.querySelector('#captions-picture img').naturalWidth"
    assert browser.until(lambda: browser.js(photo)) == 300
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
    browser.until(lambda: not browser.one("#captions").is_displayed())
    browser.js(
        """const files = new DataTransfer();
        const canvas = document.createElement("canvas");
        canvas.toBlob((blob) => {
          files.items.add(new File([blob], "dropped.png", { type: "image/png" }));
          dispatchEvent(new DragEvent("drop", { dataTransfer: files, cancelable: true }));
        });"""
    )
    browser.until(lambda: "dropped.png" in browser.text("#captions-heading"))
    browser.until(lambda: len(browser.all("#captions-list li")) == 12)


def test_what_cannot_be_uploaded_is_said(page, browser):
    text = Path("notes.txt").absolute()
    text.write_text("no picture")
    browser.one("#picture").send_keys(str(text))
    browser.until(lambda: "notes.txt is not a picture" in browser.text("#status"))
    large = Path("large.png").absolute()
    large.write_bytes(bytes(2**20 + 1))
    browser.one("#picture").send_keys(str(large))
    browser.until(lambda: "at most 1 MiB" in browser.text("#status"))
    bad = Path("bad.png").absolute()
    bad.write_bytes(b"no picture")
    browser.one("#picture").send_keys(str(bad))
    browser.until(lambda: "refused" in browser.text("#captions-status"))
    assert all("422" in line for line in browser.errors())  # the browser's own line


def test_errors_of_the_server_are_said_in_words(finder, browser):
    with serving(finder) as page:
        browser.open(page.address)
        browser.search("A red dog .")
        browser.one("#query").send_keys(" a" * 300, Keys.ENTER)
        browser.until(lambda: "words, expected at most" in browser.text("#status"))
        assert not browser.one("#found").is_displayed()
    browser.one("#query").clear()
    browser.one("#query").send_keys("a dog", Keys.ENTER)
    browser.until(lambda: "does not answer" in browser.text("#status"))
    browser.errors()


def test_the_latest_search_wins(page, browser):
    browser.js(
        """const plain = fetch;
        window.signals = [];
        window.fetch = async (path, options) => {
          if (path === "/api/search") signals.push(options.signal);
          const reply = await plain(path, { ...options, signal: undefined });
          if (options?.body?.includes("first one"))
            await new Promise((done) => setTimeout(done, 1000));
          return reply;
        };"""
    )
    browser.one("#query").send_keys("first one", Keys.ENTER)
    browser.until(lambda: browser.text("#status") == "Searching …")
    browser.search("second one")
    assert browser.js("return signals.map(x => x.aborted)") == [True, False]
    time.sleep(1.5)
    assert "second one" in browser.text("#results-heading")
    assert [x.text for x in browser.all("#words button")] == ["second", "one"]


def test_a_model_without_attention(tiny_positions, browser):
    with opened(browser, make_finder({"model": "vse"}, uploads=False)):
        browser.search("A red dog runs .")
        assert not browser.all("#words button")
        assert "No regions can be shown" in browser.one("#words-help").text
        browser.point_at(browser.all(".card")[1])
        assert "Off, because" in browser.one("#no-upload").text
        assert not browser.one("#drop").is_displayed()


def test_images_without_photos_are_drawn(tiny_positions, browser):
    with opened(browser, make_finder(uploads=False)):
        assert "No photos" in browser.text("#about")
        browser.search("A red dog runs .")
        cards = browser.all(".card")
        numbers = [card.find_element(By.CSS_SELECTOR, "svg text").text for card in cards]
        assert numbers == [card.find_element(By.CSS_SELECTOR, ".name").text for card in cards]
        assert all(len(card.find_elements(By.CSS_SELECTOR, ".outline")) == 4 for card in cards)
        browser.point_at(browser.all("#words button")[0])
        browser.until(lambda: all(browser.lit()))


@pytest.mark.parametrize("photos", [None, "photos"])
def test_regions_without_boxes_are_a_grid_but_not_on_photos(tiny, browser, photos):
    Path("photos").mkdir()
    for number in range(15):
        Image.new("RGB", (40, 30)).save(f"photos/{number}.jpg")
    with opened(browser, make_finder(uploads=False, photos=photos)):
        browser.search("A red dog runs .")
        with_photos = len(browser.all(".card img"))
        assert with_photos == (12 if photos else 0)
        browser.point_at(browser.all("#words button")[1])
        answered = "return search.cards.every(card => card.attention)"
        browser.until(lambda: browser.js(answered))
        assert [n > 0 for n in browser.lit()] == [not photos] * 12


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_needs_no_sideways_scrolling(page, browser, width):
    browser.size(width)
    browser.open(page.address)
    assert browser.overflow() <= 0
    browser.search("A red dog runs .")
    assert browser.overflow() <= 0
    assert browser.one("#results").rect["y"] < browser.js("return scrollY + innerHeight")
    browser.one(".card").click()
    browser.until(lambda: browser.all("#captions-list li"))
    assert browser.overflow() <= 0
    inside = "const d = document.querySelector('dialog'); return d.scrollWidth - d.clientWidth"
    assert browser.js(inside) <= 0


CONTRAST = """
const light = (c) => {
  const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
};
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const found = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.checkVisibility() || e.closest("svg, script, style, .unseen")) continue;
  const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  found.push([ratio, e.tagName + " " + e.textContent.slice(0, 30)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page, browser, scheme):
    browser.scheme(scheme)
    browser.search("A red dog runs .")
    browser.all("#words button")[1].click()
    browser.one(".card").send_keys(Keys.ENTER)
    browser.until(lambda: browser.all("#captions-list li"))
    found = browser.js(CONTRAST)
    assert len(found) > 60 and not [x for x in found if x[0] < 4.5]


def test_a_screen_reader_hears_a_name_for_everything(page, browser):
    browser.search("A red dog runs .")
    browser.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [node for node in nodes if not node["ignored"]]

    def names(role):
        found = [x for x in nodes if x["role"]["value"] == role]
        return [x.get("name", {}).get("value", "") for x in found]

    for role in ("button", "searchbox", "radio", "combobox", "heading", "image", "group"):
        assert names(role) and all(names(role)), role
    assert names("searchbox") == ["Describe an image in a sentence"]
    ranked = [name for name in names("button") if "Rank 3" in name]
    assert len(ranked) == 1 and ".jpg" in ranked[0] and "score" in ranked[0]
    assert ranked[0].count(".jpg") == 1  # it is not read twice
    assert names("status")  # a live region
    photos = set(names("image"))
    assert photos <= {f"Image p{k}.jpg" for k in range(BARE)}


def test_the_start_page(tiny_positions, browser):
    from tests.serving import write_checkpoint

    with serving(None, path=write_checkpoint({"model": "scan"})) as page:
        browser.size(390)
        browser.driver.get(page.address)
        assert "--data_path data" in browser.one("pre").text
        assert browser.overflow() <= 0
        browser.driver.get("about:blank")
