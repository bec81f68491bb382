"""util/attention_figure.py and attention_page.py: any words, any number of them."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import explain
from util import attention_figure, attention_page
from util.drawn_text import cut, quiet_fonts, width_of, wrap

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("PIL")


def data_of(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


def invented(words: list[str], regions: int, sides: int = 2, seed: int = 0) -> explain.Explanation:
    """An explanation of a caption that is only made up."""
    rng = torch.Generator().manual_seed(seed)
    w = len(words)
    e = {"dots": torch.randn(w, regions, generator=rng), "word_scores": torch.randn(w)}
    e |= {"t2i": e["dots"].softmax(1), "i2t": (3 * e["dots"]).softmax(0)}
    e |= {"region_scores": torch.randn(regions)}
    if sides == 2:
        e |= {"text_edges": torch.rand(w, w), "visual_edges": torch.rand(regions, regions)}
    if sides == 0:
        e = {"dots": e["dots"]}
    more = {"scored": ("t2i", "i2t")[:sides], "notes": ["A note. " * 30]}
    return explain.Explanation("SCAN", " ".join(words), words, 0.5, **e, **more)


LONG = [
    "<start>",
    *(f"word{k}" for k in range(23)),
    "Donaudampfschifffahrtsgesellschaft" * 3,
    "<end>",
]


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize(
    ("words", "regions", "sides"),
    [
        (LONG, 36, 2),
        (LONG, 100, 2),
        (LONG, 100, 0),
        (["<start>", "<end>"], 1, 2),
        (["$x^2", "$", r"\$\frac", "{", "%", "_", "a" * 400], 5, 1),
        (["狗", "собака", "كلب", "👍", "\u0301", "\x07", "e\u0301", ""], 24, 1),
    ],
)
def test_no_texts_overlap(words, regions, sides, boxes):
    """Whatever the words are, and however many: each text has its own place on the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    e = invented(words, regions, sides)
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((regions, 2, 2)), axis=1).reshape(regions, 4)
    corners *= np.tile((640, 480), 2)
    where = (corners, (640.0, 480.0)) if boxes else ()
    pixels = rng.integers(0, 255, (480, 640, 3)).astype(np.uint8) if boxes else None
    figure = attention_figure.draw(e, *where, pixels=pixels)
    canvas = FigureCanvasAgg(figure)
    with quiet_fonts():
        canvas.draw()
    renderer = canvas.get_renderer()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
    texts = [x for x in texts if x.get_text().strip() and x.get_visible()]
    upright = [x for x in texts if x.get_rotation() == 0]
    places = np.array([x.get_window_extent(renderer).extents for x in upright])
    assert places.min() >= 0 and (places[:, 2:] <= figure.bbox.size).all()
    low, high = places[:, None, :2] + 1, places[None, :, 2:] - 1
    overlap = (low < high).all(2) & (low < high).all(2).T & ~np.eye(len(places), dtype=bool)
    pairs = [(upright[i].get_text(), upright[j].get_text()) for i, j in np.argwhere(overlap)]
    assert not pairs
    assert attention_page.render(e, "0", *where, pixels=pixels)


def test_text_fits_its_place():
    for text in ("a dog", "W" * 300, "狗" * 100, "ein " * 50, "a\u0301" * 99):
        assert width_of(cut(text, 1.5, 10), 10) <= 1.5
        lines = wrap(text, 2.0, 12)
        assert all(width_of(line, 12) <= 2.0 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_brightness_adds_up_the_boxes():
    boxes = np.array([[0, 0, 2, 3], [1, 0, 4, 1], [0, 0, 4, 3]], np.float32)
    light = attention_figure.brightness(np.array([0.5, 0.25, 0.125]), boxes, 3, 4)
    top = [0.625, 0.875, 0.375, 0.375]
    assert light.tolist() == [top, *[[0.625, 0.625, 0.125, 0.125]] * 2]


def test_boxes_are_scaled_to_the_photo():
    pixels = np.zeros((60, 80, 3), np.uint8)
    scene = attention_figure.Scene(1, [[10, 20, 160, 120]], (160.0, 120.0), pixels)
    assert scene.boxes.tolist() == [[5, 10, 80, 60]]
    lit = scene.lit(np.array([1.0]))
    assert lit[30, 40].max() == 0 and lit[5, 2].min() > 0.8  # black under the box, pale beside it


EVIL = [
    "<start>",
    "<script>alert(1)</script>",
    "</script>",
    '"onload="x',
    "'",
    "&amp;",
    "{{ 7 * 7 }}",
]


def test_what_a_caption_says_stays_text():
    e = invented(EVIL, 3)
    e.notes = ["<b>note</b>"]
    page = attention_page.render(e, '<img src=x onerror="1">')
    assert len(re.findall("<script", page)) == 2 and len(re.findall("</script", page)) == 2
    assert (
        "<b>" not in page and "<img" not in page and "49" not in re.findall("<h1.*?</h1>", page)[0]
    )
    assert '"onload="' not in page
    assert data_of(page)["tokens"] == EVIL


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ACT = """
<script>
const key = (name) =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
words[0].focus(); key("ArrowRight"); key("ArrowRight");
const told = [one("said").textContent];
rects[3].dispatchEvent(new MouseEvent("mouseenter")); told.push(one("said").textContent);
heads[0].focus(); key("End"); told.push(one("said").textContent);
words[1].click(); told.push(one("said").textContent);
document.querySelectorAll("#views input")[1].click(); told.push(one("said").textContent);
const root = document.documentElement;
document.body.textContent = "@@" + JSON.stringify({told, wide: root.scrollWidth > root.clientWidth,
  pressed: words.map((x) => x.getAttribute("aria-pressed"))}) + "@@";
</script>
"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.parametrize("regions", [5, 100])
def test_the_page_answers_mouse_and_keyboard(tmp_path, regions):
    e = invented(["<start>", "a", "dog", *["word" * 9] * 9, "<end>"], regions)
    page = tmp_path / "page.html"
    page.write_text(attention_page.render(e, "0").replace("</body>", ACT + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path}/profile", "--window-size=500,900", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    got = json.loads(html.unescape(done.stdout.split("@@")[1]))
    starts = ["“dog”", "Region 3", f"Region {regions - 1}", "“a”", "“a”"]
    assert all(said.startswith(x) for said, x in zip(got["told"], starts, strict=True)), got
    best = int(e.t2i[2].argmax())
    assert f": region {best} ({e.t2i[2, best]:.2f})" in got["told"][0]
    assert got["told"][3] != got["told"][4], "the other direction has other weights"
    assert got["pressed"].index("true") == 1 and not got["wide"]
