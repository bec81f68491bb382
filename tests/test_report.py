"""report.py: what the page says equals plain computations, and it is well-formed and closed."""

import re

import numpy as np
import pytest

import intervals
import report_figures
import report_seeds
import report_stats
from ranking import Ranking
from tests.reader_arrays import make_curves
from tests.report_pages import VARIANTS, make, page_of
from util.cli import InputError


@pytest.fixture(params=VARIANTS)
def ranking(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make(**VARIANTS[request.param])


def test_a_page_is_closed_and_well_formed(ranking):
    page = page_of(ranking)
    assert "://" not in page.text and "url(" not in page.text and "<script" not in page.text
    ids = [x["id"] for _, x in page.elements if "id" in x]
    assert len(ids) == len(set(ids))
    targets = [x["href"].removeprefix("#") for x in page.all("a")]
    targets += [x["aria-labelledby"] for _, x in page.elements if "aria-labelledby" in x]
    assert targets and set(targets) <= set(ids)
    assert all(x["href"].startswith("#") for x in page.all("a"))
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    charts = [x for x in page.all("svg") if x.get("role") == "img"]
    assert len(charts) >= 2 and all(len(x["aria-label"]) > 20 for x in charts)
    assert all(x.get("aria-hidden") or x.get("role") == "img" for x in page.all("svg"))
    assert not re.search(
        r"\bnan\b|\binf\b", re.sub(r"<style.*?</style>", "", page.text, flags=re.S)
    )


def plain(ranking: Ranking, way: str, query: int, scores=None) -> tuple[int, float, float]:
    """A query's rank from 1, its right score and its best wrong score, with loops."""
    scores = ranking.scores if scores is None else scores
    n, m = scores.shape
    right, wrong = [], []
    pairs = set(zip(*(x.tolist() for x in ranking.right_pairs), strict=True))
    for images, captions in ranking.folds():
        inside = query in (images if way == "i2t" else captions)
        for other in (captions if way == "i2t" else images) if inside else ():
            pair = (query, int(other)) if way == "i2t" else (int(other), query)
            (right if pair in pairs else wrong).append(scores[pair])
    return sum(x >= max(right) for x in wrong) + 1, max(right), max(wrong, default=-np.inf)


def test_best_wrong_candidates_and_ranks_equal_plain_loops(ranking, monkeypatch):
    monkeypatch.setattr(report_stats, "BLOCK", 50)  # several blocks
    for way in ("i2t", "t2i"):
        found = report_stats.look(ranking, way)
        for query, rank in enumerate(found.ranks):
            expected = plain(ranking, way, query)
            got = rank + 1, found.right_score[query], found.wrong_score[query]
            assert got == expected
            where = (query, found.wrong[query]) if way == "i2t" else (found.wrong[query], query)
            assert found.wrong[query] < 0 or ranking.scores[where] == expected[2]


def top_counts(ranking: Ranking, way: str) -> np.ndarray:
    """How many queries have each candidate among their first ten."""
    scores = ranking.scores if way == "i2t" else ranking.scores.T
    counts = np.zeros(scores.shape[1], int)
    for images, captions in ranking.folds():
        queries, others = (images, captions) if way == "i2t" else (captions, images)
        for query in queries:
            counts[others[np.argsort(-scores[query, others])[:10]]] += 1
    return counts


@pytest.mark.parametrize("name", ["usual", "folds", "uneven", "candidates"])
def test_counts_of_hubs(name, monkeypatch):
    ranking = make(**VARIANTS[name])
    monkeypatch.setattr(report_stats, "BLOCK", 100)
    for way in ("i2t", "t2i"):
        found = report_stats.look(ranking, way)
        assert np.array_equal(found.top, top_counts(ranking, way))
        first = ranking.ranks.first_caption if way == "i2t" else ranking.ranks.first_image
        assert [np.sum(first == c) for c in range(len(found.first))] == found.first.tolist()


def test_the_table_holds_recalls_and_intervals(ranking):
    rows, ranks = page_of(ranking).table("Direction"), ranking.ranks
    one = ranking.scores.shape[0] == 1
    bounds = None if one else intervals.recall_intervals(ranks)
    for row, way in zip(rows, ("i2t", "t2i"), strict=True):
        for text, name in zip(row[1:], ("r1", "r5", "r10", "medr", "meanr"), strict=True):
            said = f"{ranking.metrics[way][name]:.1f}"
            if not one and name != "medr":
                said += " [{:.1f}, {:.1f}]".format(*bounds[way][name])
            assert text == said
        if not ranking.fold5:
            shares = [100 * np.mean(getattr(ranks, way) < k) for k in (1, 5, 10)]
            assert [x.partition(" ")[0] for x in row[1:4]] == [f"{x:.1f}" for x in shares]


def test_the_cards_show_the_best_and_the_worst(ranking):
    page, expected = page_of(ranking), []
    for kind in ("worst", "best"):
        for way in ("i2t", "t2i"):
            total = ranking.scores.shape[way == "t2i"]
            all_of = [plain(ranking, way, q) for q in range(total)]
            some = [x for x in all_of if (x[0] == 1) == (kind == "best")]
            some.sort(key=lambda x: (-x[0], x[1] - x[2]) if kind == "worst" else x[2] - x[1])
            expected += some[:20]
    shown = [(rank, *scores) for rank, _, scores in page.cards()][: len(expected)]
    for got, (rank, *scores) in zip(shown, expected, strict=True):
        assert got == (rank, *(round(x, 4) for x in scores if np.isfinite(x)))


def test_side_by_side_and_paired_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for sources in (2, 3):
        ranking = make(sources=sources, n=20, seed=sources)
        page = page_of(ranking)
        ranks = [ranking.ranks_of(part) for part in ranking.parts]
        rows = page.table("Figure")
        assert [row[0] for row in rows[:2]] == ["Image to text", "R@1"] and rows[-1][0] == "rsum"
        for k, x in enumerate([*ranks, ranking.ranks]):
            low, high = intervals.recall_intervals(x)["i2t"]["r1"]
            share = 100 * np.mean(x.i2t == 0)
            assert rows[1][k + 1] == f"{share:.1f} [{low:.1f}, {high:.1f}]"
            metrics = report_stats.metrics_of(ranking, x)
            assert rows[-1][k + 1].startswith(f"{metrics['rsum']:.1f} [")
        assert same_metrics(metrics, ranking.metrics)
        tests = page.table("File")
        assert len(tests) == 2 * (sources - 1)
        for row, (k, way) in zip(
            tests, [(k, w) for k in range(1, sources) for w in ("i2t", "t2i")], strict=True
        ):
            a, b = (getattr(ranks[x], way) == 0 for x in (0, k))
            assert row[0] == f"{k}/model_best"
            assert row[2].startswith(f"{100 * (b.mean() - a.mean()):+.1f} [")
            assert row[-2:] == [f"{np.sum(b & ~a)}", f"{np.sum(a & ~b)}"]


def test_the_mean_in_folds_equals_what_is_printed():
    ranking = make(n=23, fold5=True)
    assert same_metrics(report_stats.metrics_of(ranking, ranking.ranks), ranking.metrics)


def same_metrics(a: dict, b: dict) -> bool:
    ways = all(a[way] == pytest.approx(b[way]) for way in ("i2t", "t2i"))
    return ways and all(a[name] == pytest.approx(b[name]) for name in ("ar", "ari", "rsum"))


@pytest.mark.parametrize("name", ["two", "three, in folds"])
def test_what_only_one_finds(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranking = make(**VARIANTS[name])
    expected = []
    for finds, misses in ((0, 1), (1, 0)):
        for way in ("i2t", "t2i"):
            both = [
                [plain(ranking, way, q, ranking.parts[k]) for k in (finds, misses)]
                for q in range(ranking.scores.shape[way == "t2i"])
            ]
            some = [b for a, b in both if a[0] == 1 and b[0] > 1]
            expected += sorted(some, key=lambda x: -x[0])[:20]
    shown = [(rank, *scores) for rank, _, scores in page_of(ranking).cards()][-len(expected) :]
    assert len(expected) > 4
    for got, (rank, *scores) in zip(shown, expected, strict=True):
        assert got == (rank, *(round(x, 4) for x in scores))


def test_charts_say_the_ranks(ranking):
    page = page_of(ranking)
    ranks, rows = ranking.ranks, page.table("Rank")
    for k, way in enumerate(("i2t", "t2i"), 1):
        rank = getattr(ranks, way)
        assert sum(int(row[k].split()[0].replace(",", "")) for row in rows) == len(rank)
        assert rows[0][k] == f"{np.sum(rank == 0):,} ({100 * np.mean(rank == 0):.1f} %)"
    for row in page.table("K"):
        if not ranking.parts and row[1]:
            assert row[1] == f"{100 * np.mean(ranks.i2t < int(row[0])):.1f}"


def test_bins_of_ranks():
    ranks = np.array([0, 0, 1, 4, 5, 9, 10, 19, 20, 49, 50, 99, 100, 199, 200])
    bins = report_stats.rank_bins(ranks, 240)
    assert [label for label, _ in bins] == ("1 2–5 6–10 11–20 21–50 51–100 101–200 201–240".split())
    assert [count for _, count in bins] == [2, 2, 2, 2, 2, 2, 2, 1]
    assert report_stats.rank_bins(np.zeros(3, int), 3) == [("1", 3), ("2–3", 0)]
    assert report_stats.rank_bins(np.zeros(3, int), 1) == [("1", 3)]


@pytest.mark.parametrize("seed", range(5))
def test_recall_by_bins(seed):
    rng = np.random.default_rng(seed)
    values, ranks = rng.integers(0, 30, 400), rng.integers(0, 20, 400)
    ends = report_stats.even_ends(values)
    bins = report_stats.recall_by(values, ranks, ends)
    assert len(bins) <= 7 and sum(x["n"] for x in bins) == 400 and ends[-1] == values.max()
    for found in bins:
        low, _, high = found["label"].partition("–")
        inside = (values >= int(low)) & (values <= int(high or low))
        assert inside.sum() == found["n"] > 20
        for k in (1, 5, 10):
            share, lower, upper = found[f"r{k}"]
            assert share == pytest.approx(100 * np.mean(ranks[inside] < k))
            assert 0 <= lower <= share + 1e-9 and share - 1e-9 <= upper <= 100


def test_wilsons_interval_and_skewness_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for hits, n in ((0, 1), (1, 1), (3, 7), (50, 1000), (7, 7)):
        expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert report_stats.wilson(hits, n) == pytest.approx([100 * x for x in expected], abs=0.01)
    counts = np.random.default_rng(0).poisson(1, 100)
    assert report_stats.skewness(counts) == pytest.approx(stats.skew(counts))
    assert report_stats.skewness(np.ones(5, int)) is None


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/a/model_best.pth.tar"], ["model_best"]),
        (["a/x.pth.tar", "a/y.pth.tar"], ["x", "y"]),
        (["runs/a/m.pth.tar", "runs/b/m.pth.tar"], ["a/m", "b/m"]),
        (["a/r/m.npy", "b/r/m.npy", "b/s/m.npy"], ["a/r/m", "b/r/m", "b/s/m"]),
        (["m.npy", "./m.npy"], ["m (1)", "m (2)"]),
        (["m.npy", "a/m.npy"], ["m", "a/m"]),
    ],
)
def test_labels_are_short_and_distinct(paths, labels):
    assert report_stats.labels_of(paths) == labels


def test_band_of_a_curve_holds_it():
    ranking = make(n=40)
    for way in ("i2t", "t2i"):
        rank, unit = getattr(ranking.ranks, way), ranking.ranks.unit[way]
        values = report_stats.recall_curve(rank, 40)
        assert len(values) == 40 and values[-1] == pytest.approx(100 * np.mean(rank < 40))
        low, high = report_stats.curve_band(rank, unit, 40)
        assert np.all(low <= values + 1e-3) and np.all(values - 1e-3 <= high)
        assert np.all(np.diff(values) >= 0) and (high - low)[0] > 1


@pytest.mark.parametrize("name", ["usual", "no texts"])
def test_recalls_by_length_need_texts_but_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranking = make(**VARIANTS[name])
    page, titles = (
        page_of(ranking),
        ("Text to image, by caption", "Words unknown to the vocabulary"),
    )
    found = [title in [text for _, text in page.headings] for title in titles]
    assert found == [ranking.captions is not None, False]
    assert ("no recalls by captions" in page.text) == (ranking.captions is None)
    if ranking.captions:
        (row,) = page.table("Words of the caption")  # all have seven
        assert row[:2] == ["7", "60"]
        assert row[2].startswith(f"{100 * np.mean(ranking.ranks.t2i == 0):.1f} [")


def test_curves_over_seeds_stand_in_a_section_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_curves(tmp_path)
    page = page_of(make(), seeds=str(path))
    assert page.table("Epochs") == [
        [f"{k}", f"{mean}.0 [{low}.0, {high}.0] ({a}, {b})", f"{mean}.0 ({a}, {b})"]
        for k, mean, low, high, a, b in (
            (1, 105, 90, 120, "100.0", "110.0"),
            (2, 195, 180, 210, "200.5", "190.0"),
            (3, 305, 290, 320, "300.0", "310.0"),
        )
    ]
    pair = "SCAN --margin 0.1, SCAN --margin 0.1"
    assert page.table("Settings") == [[pair, "dev, epoch 2", "-1.5 [-3.0, 0.5]", "0.500", "4.0"]]
    section = page.text.partition('id="seeds"')[2].partition("</section>")[0]
    drawn = re.findall(r'<path class="(line|seed|band) s(\d)" d="M[\d.]+ [\d.]+L', section)
    assert drawn.count(("seed", "0")) == drawn.count(("seed", "1")) == 2
    assert ("band", "0") in drawn and ("band", "1") not in drawn
    labels = re.findall(r'text-anchor="end">([\d.-]+)<', section)
    assert labels == ["100", "150", "200", "250", "300", "350"]  # seeds of 100 to 310
    assert "<h2" in page.text and 'href="#seeds"' in page.text
    assert 'href="#seeds"' not in page_of(make()).text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 600), (498.2, 532), (3.3, 3.31), (300, 300), (512, 513.7), (100, 311)]
)
def test_ticks_are_round_few_and_around(low, high):
    ticks = report_figures.ticks_around(low, high)
    assert 4 <= len(ticks) <= 7 and ticks[0] <= low and high <= ticks[-1]
    assert len({f"{x:g}" for x in ticks}) == len(ticks)
    heights = [report_figures.height_of(x, ticks) for x in ticks]
    assert heights == sorted(heights, reverse=True)
    assert report_figures.height_of(-1e9, ticks) == heights[0]  # a band ends with the axis


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rsum": [[100.0', '"rsum": [[-1'),
        ('"rsum": [[100.0', '"rsum": [[1e400'),
        ('"rsum": [[100.0, ', '"rsum": [['),
        ('"mean": [105.0', '"mean": ["x"'),
        ('"interval": null', '"interval": [[1, 2]]'),
        ('"title": "SCAN', '"title": "' + "S" * 2000),
        ('"seeds": [0, 1]', '"seeds": [0]'),
        ('"p_holm": 0.5', '"p_holm": "x"'),
        ('"a": "a"', '"a": "c"'),
    ],
)
def test_odd_curves_are_one_line(tmp_path, old, new):
    path = make_curves(tmp_path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match="curves.json: not the curves.json of scripts/compare.py"):
        report_seeds.read(str(path))
