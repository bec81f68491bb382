"""intervals.py: against plain loops over images, brute force over all signs, and known coverage."""

import itertools
import math
import random
import sys
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest

import intervals
from intervals import paired_test, recall_intervals, sign_flip_p
from ranking import Ranking, Ranks
from scripts import check_intervals
from util.cli import InputError

NORMAL = NormalDist()
COUNTS = {"five": lambda rng, n: np.full(n, 5), "uneven": lambda rng, n: rng.integers(1, 8, n)}


def draw(seed, n=40, counts="five", shuffle=True):
    """Ranks of images with so many captions, which hang together; the captions in any order."""
    rng = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(n), COUNTS[counts](rng, n))
    image_of = rng.permutation(image_of) if shuffle else image_of
    quality = rng.beta(1, 1, n).clip(0.02)
    unit = {"i2t": np.arange(n), "t2i": image_of}
    ways = [3 * (rng.geometric(quality[of]) - 1) for of in unit.values()]
    return Ranks(*ways, None, None, unit)


def flat(found):
    """All intervals of recall_intervals by name."""
    ways = {f"{way} {name}": x for way in ("i2t", "t2i") for name, x in found[way].items()}
    return ways | {name: found[name] for name in ("ar", "ari", "rsum")}


def plain_figures(images):
    """The figures of a list of images, each a pair of lists: ranks of its two kinds of queries."""
    found = {}
    for k, way in enumerate(("i2t", "t2i")):
        ranks = [rank for image in images for rank in image[k]]
        for top in (1, 5, 10):
            found[f"{way} r{top}"] = 100 * sum(rank < top for rank in ranks) / len(ranks)
        found[f"{way} meanr"] = sum(ranks) / len(ranks) + 1
    recalls = [[found[f"{way} r{k}"] for k in (1, 5, 10)] for way in ("i2t", "t2i")]
    return found | {
        "ar": sum(recalls[0]) / 3,
        "ari": sum(recalls[1]) / 3,
        "rsum": sum(sum(recalls, [])),
    }


def plain_bca(images, resamples):
    """BCa intervals as Efron and Tibshirani (1993) write them, by loops; and standard errors."""
    generator = random.Random(1)
    drawn = [plain_figures(generator.choices(images, k=len(images))) for _ in range(resamples)]
    without = [plain_figures(images[:k] + images[k + 1 :]) for k in range(len(images))]
    found = {}
    for name, value in plain_figures(images).items():
        values = sorted(x[name] for x in drawn)
        below = sum(x < value for x in values) + sum(x == value for x in values) / 2
        z0 = NORMAL.inv_cdf(below / resamples)
        mean = sum(x[name] for x in without) / len(without)
        apart = [mean - x[name] for x in without]
        a = sum(x**3 for x in apart) / (6 * sum(x**2 for x in apart) ** 1.5)
        ends = []
        for z in (z0 + NORMAL.inv_cdf(0.025), z0 + NORMAL.inv_cdf(0.975)):
            ends.append(values[int(NORMAL.cdf(z0 + z / (1 - a * z)) * (resamples - 1) + 0.5)])
        error = math.sqrt(sum((x - sum(values) / resamples) ** 2 for x in values) / resamples)
        found[name] = ends, error
    return found


@pytest.mark.parametrize("counts", COUNTS)
def test_the_intervals_are_those_of_plain_loops(counts):
    ranks = draw(3, counts=counts)
    images = [
        tuple(getattr(ranks, way)[ranks.unit[way] == image].tolist() for way in ("i2t", "t2i"))
        for image in range(40)
    ]
    found = flat(recall_intervals(ranks, resamples=5000))
    expected = plain_bca(images, 5000)
    assert found.keys() == expected.keys()
    for name, (ends, error) in expected.items():
        step = 100 / 40 if name.startswith("i2t r") else 0
        assert found[name] == pytest.approx(ends, abs=0.4 * error + step), name
        assert found[name][0] <= plain_figures(images)[name] <= found[name][1]


def test_a_seed_gives_the_same_numbers_again():
    ranks = draw(1)
    assert recall_intervals(ranks) == recall_intervals(ranks, seed=0)
    assert recall_intervals(ranks) != recall_intervals(ranks, seed=1)
    other = draw(2)._replace(unit=ranks.unit)
    assert paired_test(ranks, other) == paired_test(ranks, other, seed=0)


def test_more_confidence_is_a_wider_interval():
    low, high = (flat(recall_intervals(draw(4), confidence=x)) for x in (0.8, 0.99))
    assert all(high[n][0] <= low[n][0] < low[n][1] <= high[n][1] for n in low)


def test_the_order_of_captions_does_not_count_and_that_of_images_hardly(order=7):
    rng, ranks = np.random.default_rng(order), draw(5, counts="uneven")
    at = rng.permutation(len(ranks.t2i))
    unit = ranks.unit | {"t2i": ranks.unit["t2i"][at]}
    assert recall_intervals(ranks._replace(t2i=ranks.t2i[at], unit=unit)) == recall_intervals(ranks)
    new = rng.permutation(40)  # the number of each image
    unit = {way: new[of] for way, of in ranks.unit.items()}
    one, two = (flat(recall_intervals(x)) for x in (ranks, ranks._replace(unit=unit)))
    for name, (low, high) in one.items():
        assert two[name] == pytest.approx([low, high], abs=0.1 * (high - low)), name
    unit = {way: 10 * of + 3 for way, of in ranks.unit.items()}  # numbers with gaps
    assert recall_intervals(ranks._replace(unit=unit)) == recall_intervals(ranks)


def test_copies_of_a_caption_make_nothing_surer():
    ranks = draw(6, n=60)
    one = ranks._replace(t2i=ranks.i2t, unit=ranks.unit | {"t2i": np.arange(60)})
    many = ranks._replace(t2i=one.t2i.repeat(5), unit=ranks.unit | {"t2i": np.arange(60).repeat(5)})
    few, all_ = flat(recall_intervals(one)), flat(recall_intervals(many))
    assert all(all_[name] == pytest.approx(few[name]) for name in few)
    other = one._replace(i2t=one.i2t[::-1], t2i=one.t2i[::-1])
    more = many._replace(i2t=other.i2t, t2i=other.t2i.repeat(5))
    few, all_ = paired_test(one, other)["t2i"], paired_test(many, more)["t2i"]
    assert few["p"] == pytest.approx(all_["p"]) and few["difference"] == all_["difference"]
    assert 5 * few["only_a"] == all_["only_a"]


@pytest.mark.parametrize("n", [2, 37, 1000])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("counts", COUNTS)
def test_all_or_none_found_gives_the_exact_bound_over_images(n, confidence, counts):
    ranks = draw(8, n, counts)
    best = ranks._replace(i2t=0 * ranks.i2t, t2i=0 * ranks.t2i)
    exact = binomtest(n, n).proportion_ci(confidence, "exact").low
    found = flat(recall_intervals(best, confidence))
    for name, interval in found.items():
        most = 600 if name == "rsum" else 100
        expected = [1, 1] if "meanr" in name else [most * exact, most]
        assert interval == pytest.approx(expected), name
    worst = ranks._replace(i2t=ranks.i2t + 10, t2i=ranks.t2i + 10)
    found = recall_intervals(worst, confidence)
    assert found["i2t"]["r10"] == pytest.approx([0, 100 * (1 - exact)])
    assert found["rsum"] == pytest.approx([0, 600 * (1 - exact)])
    mixed = recall_intervals(ranks._replace(i2t=best.i2t), confidence)
    assert mixed["i2t"]["r1"] == pytest.approx([100 * exact, 100])
    assert mixed["t2i"] == recall_intervals(ranks, confidence)["t2i"]


def test_the_same_share_found_of_each_image_is_not_taken_for_certain():
    ranks = draw(9, 200, shuffle=False)._replace(t2i=np.tile([0, 0, 0, 20, 20], 200))
    (low, high), unseen = recall_intervals(ranks)["t2i"]["r5"], 1 - 0.025 ** (1 / 200)
    assert (low, high) == pytest.approx((60 - 60 * unseen, 60 + 40 * unseen))


@pytest.mark.parametrize(("found", "n"), [(989, 1000), (3, 1000), (199, 200), (1, 50)])
def test_almost_all_or_none_is_near_the_exact_interval(found, n):
    """Where the usual interval, plus or minus two standard errors, leaves 0 to 100."""
    ranks = draw(10, n)._replace(i2t=np.where(np.arange(n) < found, 0, 50))
    low, high = recall_intervals(ranks)["i2t"]["r1"]
    exact = binomtest(found, n).proportion_ci(0.95, "exact")
    assert 0 <= low < 100 * found / n < high <= 100
    width = 100 * (exact.high - exact.low)
    assert (low, high) == pytest.approx((100 * exact.low, 100 * exact.high), abs=0.25 * width)


def test_one_image_has_no_interval():
    ranks = Ranks(np.array([0]), np.array([0, 3]), None, None, {"i2t": [0], "t2i": [0, 0]})
    for call in (lambda: recall_intervals(ranks), lambda: paired_test(ranks, ranks)):
        with pytest.raises(InputError, match="of one image: an interval needs at least 2 images"):
            call()


def test_without_scipy_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    for call in (intervals.check_scipy, lambda: recall_intervals(draw(1))):
        with pytest.raises(InputError, match="tests need scipy: pip install scipy$"):
            call()


@pytest.mark.parametrize(
    ("version", "old"), [("1.9.3", 1), ("1.14.1", 1), ("1.15.0rc1", 0), ("2.0", 0)]
)
def test_an_old_scipy_is_named(monkeypatch, version, old):
    monkeypatch.setattr("scipy.__version__", version)
    if old:
        with pytest.raises(InputError, match=f"1.15 or newer, found {version}: pip install --upg"):
            intervals.check_scipy()
    else:
        intervals.check_scipy()


def ranking(seed, n, m, **how):
    rng = np.random.default_rng(seed)
    image_of = how.get("image_of")
    scores = rng.normal(size=(n, m))
    own = image_of if image_of is not None else np.arange(m) * n // m
    if n > m:
        scores[np.arange(n), np.arange(n) * m // n] += 2
    else:
        scores[own, np.arange(m)] += 2
    how = {"image_of": None} | how
    return Ranking(["x"], scores, metrics={}, **how)


@pytest.mark.parametrize("uneven", [False, True])
def test_five_folds(uneven):
    rng = np.random.default_rng(0)
    image_of = rng.permutation(np.repeat(np.arange(50), rng.integers(1, 8, 50))) if uneven else None
    m = 250 if image_of is None else len(image_of)
    folds = ranking(1, 50, m, image_of=image_of, fold5=True)
    whole = ranking(1, 50, m, image_of=image_of)
    one, all_ = recall_intervals(folds.ranks), recall_intervals(whole.ranks)
    share = 100 * (folds.ranks.t2i < 1).mean()
    assert one["t2i"]["r1"][0] < share < one["t2i"]["r1"][1]
    assert one["rsum"][0] > all_["rsum"][0]  # among a fifth of the candidates
    test = paired_test(whole.ranks, folds.ranks)["t2i"]
    assert test["only_a"] == 0 < test["only_b"] and test["p"] < 1e-3


def test_candidate_images_are_drawn_with_their_caption():
    whole = ranking(2, 120, 40, candidates=True)
    found = recall_intervals(whole.ranks)
    i2t, t2i = whole.ranks.i2t, whole.ranks.t2i
    turned = Ranks(t2i, i2t, None, None, {"i2t": np.arange(40), "t2i": np.arange(120) // 3})
    other = recall_intervals(turned)
    assert found["i2t"] == other["t2i"] and found["t2i"] == other["i2t"]


# The paired test


def brute_force(differences):
    """The p value over all signs, and with the observed outcome counted half."""
    sums = [sum(s) for s in itertools.product(*[(d, -d) for d in differences])]
    observed = abs(sum(differences))
    at_least = sum(abs(x) >= observed for x in sums)
    beyond = sum(abs(x) > observed for x in sums)
    half = 1.0 if observed == 0 else (at_least + beyond) / 2 / len(sums)
    return at_least / len(sums), half


@pytest.mark.parametrize("seed", range(30))
def test_the_p_value_is_that_of_all_signs(seed):
    rng = np.random.default_rng(seed)
    largest = (1, 5, 9)[seed % 3]
    differences = rng.integers(-largest, largest + 1, 1 + seed % 12).tolist()
    exact, half = brute_force(differences)
    assert sign_flip_p(differences, mid=False) == pytest.approx(exact)
    assert sign_flip_p(differences) == pytest.approx(half)
    assert sign_flip_p([-d for d in differences]) == pytest.approx(half)


@pytest.mark.parametrize(("n", "seed"), [(30, 1), (300, 2), (2000, 3)])
def test_image_to_text_is_mcnemars_test(n, seed):
    rng = np.random.default_rng(seed)
    a = draw(seed, n)
    b = a._replace(i2t=np.where(rng.random(n) < 0.2, rng.integers(0, 2, n), a.i2t))
    only_a = int(((a.i2t < 1) & (b.i2t >= 1)).sum())
    only_b = int(((a.i2t >= 1) & (b.i2t < 1)).sum())
    found = paired_test(a, b)["i2t"]
    assert (found["only_a"], found["only_b"]) == (only_a, only_b)
    assert found["difference"] == pytest.approx(100 * (only_b - only_a) / n)
    exact = binomtest(only_a, only_a + only_b)
    assert sign_flip_p([1] * only_b + [-1] * only_a, mid=False) == pytest.approx(exact.pvalue)
    chance = math.comb(only_a + only_b, only_a) / 2 ** (only_a + only_b)
    half = exact.pvalue - chance if only_a != only_b else 1
    assert found["p"] == pytest.approx(half)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("k", [1, 5])
def test_text_to_image_counts_images(counts, k):
    a, b = draw(11, 12, counts), draw(12, 12, counts)
    b = a._replace(i2t=b.i2t, t2i=np.random.default_rng(0).permutation(a.t2i))
    found = paired_test(a, b, k)
    for way in ("i2t", "t2i"):
        gains = [0] * 12
        for old, new, image in zip(getattr(a, way), getattr(b, way), a.unit[way], strict=True):
            gains[image] += int(new < k) - int(old < k)
        assert found[way]["p"] == pytest.approx(brute_force(gains)[1])
        queries = len(getattr(a, way))
        assert found[way]["difference"] == pytest.approx(100 * sum(gains) / queries)
        low, high = found[way]["interval"]
        assert low <= found[way]["difference"] <= high
    back = paired_test(b, a, k)
    for way in ("i2t", "t2i"):
        one, two = found[way], back[way]
        assert (one["only_a"], one["only_b"]) == (two["only_b"], two["only_a"])
        assert one["difference"] == -two["difference"] and one["p"] == two["p"]
        assert one["interval"] == pytest.approx([-x for x in reversed(two["interval"])])


def test_a_system_and_itself():
    found = paired_test(draw(13, 100), draw(13, 100))
    unseen = 100 * (1 - 0.025 ** (1 / 100))
    for test in found.values():
        assert test["p"] == 1 and test["difference"] == 0
        assert test["only_a"] == test["only_b"] == 0
        assert test["interval"] == pytest.approx([-unseen, unseen])


def test_large_differences_and_many_images():
    a = draw(14, 5000)
    worse = a._replace(i2t=a.i2t + 1, t2i=a.t2i + 1)
    found = paired_test(a, worse)
    for way, test in found.items():
        assert test["p"] < 1e-100 and test["interval"][1] < 0 and test["only_b"] == 0
        assert test["only_a"] == (getattr(a, way) < 1).sum()


def test_other_queries_are_refused():
    one = draw(1)
    with pytest.raises(InputError, match="40 images and 200 captions, and of 41 images and 205"):
        paired_test(one, draw(1, 41))
    other = one._replace(unit=one.unit | {"t2i": one.unit["t2i"][::-1]})
    with pytest.raises(InputError, match="are of other images: a paired test needs the same split"):
        paired_test(one, other)


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5], [0.5]),
        ([0.9, 0.6, 0.001, 0.02], [1, 1, 0.004, 0.06]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([], []),
    ],
)
def test_holm(p, corrected):
    assert intervals.holm(p) == pytest.approx(corrected)


# The proof


@pytest.mark.parametrize("captions", check_intervals.SPREAD)
def test_the_intervals_cover_the_truth(captions):
    """A few draws, so the limits are wide; scripts/check_intervals.py has narrow ones."""
    found = check_intervals.coverage(check_intervals.Setting(100, captions, 0.5), 100, True)
    assert (found["BCa"] > 86).all() and found["BCa"].mean() < 99
    assert (found["percentile"] > 80).all()
    assert found["naive"][0] < found["BCa"][4]


def test_the_paired_test_has_few_false_alarms_and_finds_differences():
    setting = check_intervals.Setting(100, "uneven", 0.6, 0.0)
    equal = check_intervals.alarms(setting, 100)
    assert (
        max(equal["i2t"], equal["t2i"]) < 14 and min(equal["covers t2i"], equal["covers i2t"]) > 86
    )
    assert equal["naive t2i"] > equal["t2i"] >= equal["exact t2i"]
    better = check_intervals.alarms(setting._replace(alike=0.8, gain=0.5), 50)
    assert better["t2i"] > 90 and better["covers t2i"] > 80


@pytest.mark.parametrize("r1", [0.2, 0.8])
def test_the_proofs_truth_is_the_mean_of_many_draws(r1):
    setting = check_intervals.Setting(100_000, "uneven", r1)
    ranks = check_intervals.draw(np.random.default_rng(0), setting)
    found = intervals.recalls(intervals.image_table(ranks).sum(0))
    truth = check_intervals.true_figures(r1)
    assert found == pytest.approx(truth, rel=0.03)
    a, b = check_intervals.draw_two(np.random.default_rng(1), setting._replace(alike=0.5, gain=0.4))
    for ranks, share in ((a, r1), (b, r1 + 0.4 * (1 - r1))):
        for way in ("i2t", "t2i"):
            assert (getattr(ranks, way) < 1).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("limits", "code"), [((0, 100), 0), ((101, 102), 1)])
def test_the_proof_fails_if_a_figure_lies_outside(monkeypatch, capsys, limits, code):
    for name in ("COVERED", "NEAR_100", "EQUAL", "BETTER"):
        monkeypatch.setattr(check_intervals, name, [check_intervals.Setting(20, "even", 0.5, 0.5)])
    for name in ("COVERAGE", "ALARMS", "TOO_LOW", "TOO_MANY"):
        monkeypatch.setattr(check_intervals, name, limits)
    with pytest.raises(SystemExit) as end:
        check_intervals.main(["--draws", "2"])
    assert end.value.code == code
    said = capsys.readouterr().out
    assert ("*" in said) == bool(code) and f"{13 if code else 0} figures outside" in said
