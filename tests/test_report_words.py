"""report.py: the sentences of the page fit what it shows."""

import re
from types import SimpleNamespace

import pytest

from tests.report_pages import VARIANTS, make, page_of

BANDS = "The bands are 95&nbsp;% intervals"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def words(ranking) -> str:
    return re.sub(r"\s+", " ", page_of(ranking).text)


@pytest.mark.parametrize(
    "how",
    [
        {"n": 1, "counts": [3]},
        {"n": 1, "counts": [1]},
        {"n": 1, "counts": [4], "sources": 2},
        {"n": 3, "counts": [1], "candidates": True},
    ],
)
def test_one_image_has_no_intervals_and_the_page_says_why(how):
    page = words(make(**how))
    no_tests = " and no paired tests" if how.get("sources") else ""
    what = "caption" if how.get("candidates") else "image"
    assert f"There are no intervals{no_tests}: " in page and f"from one {what} alone" in page
    assert BANDS not in page and "In brackets" not in page and 'class="band' not in page
    assert "intervals by bootstrap" not in page and not re.search(r"\b1 (images|captions)", page)
    n = 3 if what == "caption" else 1
    ranked = (
        f"{n} image{'s' * (n > 1)}, {sum(how['counts'])} caption{'s' * (sum(how['counts']) > 1)}"
    )
    assert f"<dd>{ranked}</dd>" in page


@pytest.mark.parametrize(("n", "few"), [(2, True), (49, True), (50, False), (60, False)])
def test_few_images_make_intervals_too_narrow(n, few):
    page = words(make(n=n))
    assert ("With fewer than about 50 images, as here" in page) == few
    assert BANDS in page and "(BCa)" in page and "There are no intervals" not in page


@pytest.mark.parametrize(
    ("how", "uneven"),
    [
        ({"n": 20, "fold5": True}, False),
        ({"n": 23, "fold5": True}, True),
        ({"n": 10, "counts": [5] * 9 + [4], "fold5": True}, True),  # captions alone
        ({"n": 12}, False),
    ],
)
def test_folds_of_different_sizes_are_said(how, uneven):
    assert ("The folds differ in size: " in words(make(**how))) == uneven


def test_hubs_say_how_equal_scores_count():
    assert "of equal scores the one that stands first in the files" in words(make(digits=0, n=9))


def test_headings_without_queries_have_no_number():
    ranking = make(n=3, counts=[1] * 3)
    ranking.scores[:] = 0
    ranking.scores[ranking.own_image, range(3)] = 1
    titles = [text for _, text in page_of(ranking).headings]
    assert titles.count("Image to text") == 1 and "Image to text: 3 best" in titles
    same = make(sources=2)
    same.parts[1] = same.parts[0]
    page = page_of(same)
    assert sum(text.endswith("does not") for _, text in page.headings) == 4
    assert [row for rows in page.tables for row in rows if "only this file" in row]


@pytest.mark.parametrize(
    ("sources", "models", "where", "title"),
    [
        (
            ["runs/x/m.pth.tar"],
            ["scan"],
            ("data/demo_precomp/", "test"),
            "SCAN on test of demo_precomp: runs/x/m",
        ),
        (
            ["/a/b/c/d/m.pth.tar"],
            ["gsmn"],
            ("f30k_precomp", "dev"),
            "GSMN on dev of f30k_precomp: c/d/m",
        ),
        (
            ["a/m.pth.tar", "b/m.pth.tar"],
            ["scan"] * 2,
            ("x", "test"),
            "SCAN on test of x: a/m, b/m",
        ),
        (
            ["a", "b", "c"],
            ["scan", "chan", "pfan"],
            ("x", "test"),
            "SCAN, CHAN and PFAN on test of x: a, b, c",
        ),
        (["out/x/sims.npy"], [], (None, None), "Evaluation: out/x/sims"),
        (
            ["e/images.npy", "e/texts.npy"],
            [],
            ("x", "test"),
            "Evaluation on test of x: e/images, e/texts",
        ),
    ],
)
def test_the_title_names_system_split_data_and_folder(sources, models, where, title):
    import report

    ranking = make(n=2)
    ranking.sources, (ranking.folder, ranking.split) = sources, where
    ranking.splits = [SimpleNamespace(opt=SimpleNamespace(model=model)) for model in models]
    assert report.title_of(ranking) == title
    ranking.splits = []
    page = page_of(ranking)
    assert page.headings[0][1] == report.title_of(ranking)
    assert f"<title>{report.title_of(ranking)}</title>" in page.text


@pytest.mark.parametrize("name", VARIANTS)
def test_no_page_counts_one_of_several(name):
    assert not re.search(
        r"(?<![\d.,@])\b1 (images|captions|queries)\b", words(make(**VARIANTS[name]))
    )
