"""Prove intervals.py on drawn ranks whose true recalls are known.

    python scripts/check_intervals.py                # 7 minutes with one process
    python scripts/check_intervals.py --draws 100    # a look; its figures are less sure

Each draw is a new test split: images of a known distribution, and ranks of their queries. The share
of draws whose 95 % interval covers the true recall must lie between 93 and 97 %, and the paired
test's false alarms at 5 % between 3 and 7 %. The script marks each figure that lies outside with
`*`; if there is one, it exits with status 1. It also shows why images are drawn: an interval and a
test that take the captions as independent fail. docs/statistics.md has the figures.

Shapes: N images, Q queries.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import intervals
from ranking import Ranks
from util.arguments import COUNT, Parser
from util.cli import progress, run

LEVEL = 0.05
COVERAGE, ALARMS = (93, 97), (3, 7)
TOO_LOW, TOO_MANY = (0, 93), (7, 100)  # what captions taken as independent give
RANK = np.array([0, 1, 5, 10, 25, 60, 150, 400])  # of a query, after so many failed tries
BETA = 2.0  # the sum of the distribution's parameters: the captions of an image hang together
SPREAD = {"even": "5 captions each", "uneven": "1 to 9 captions"}


class Setting(NamedTuple):
    n: int  # images
    captions: str  # even or uneven
    r1: float  # the true R@1, from 0 to 1
    alike: float = 1.0  # of two systems: the share of images and queries that they see alike
    gain: float = 0.0  # of the second system: the share of the first one's misses that it finds


# With 0.9, the true R@10 would be 97.8, a share that 1,000 images can show: intervals that end just
# there would count as right, and too many of them would.
COVERED = [
    *(Setting(1000, "even", r1) for r1 in (0.2, 0.5, 0.8, 0.9037)),
    Setting(1000, "uneven", 0.5),
    *(Setting(200, captions, r1) for captions in SPREAD for r1 in (0.2, 0.5, 0.8)),
]
NEAR_100 = [Setting(n, "even", r1) for n in (1000, 200) for r1 in (0.98, 0.995)]
EQUAL = [
    *(Setting(200, "even", r1, alike) for r1 in (0.3, 0.6, 0.9) for alike in (0, 0.8)),
    Setting(200, "uneven", 0.6, 0.5),
    Setting(1000, "even", 0.6, 0.8),
    Setting(1000, "uneven", 0.9, 0.5),
]
BETTER = [Setting(1000, "even", 0.6, 0.8, gain) for gain in (0.05, 0.1)]


def random(setting: Setting, seed: int) -> np.random.Generator:
    """A generator of its own for each draw of each setting."""
    numbers = (round(1000 * x) for x in (setting.r1, setting.alike, setting.gain))
    return np.random.default_rng([seed, setting.n, setting.captions == "even", *numbers])


def draw_images(rng: np.random.Generator, setting: Setting) -> tuple[dict, np.ndarray]:
    """The image of each query by direction, and the chance of each image's queries at a try."""
    n = setting.n
    counts = np.full(n, 5) if setting.captions == "even" else rng.integers(1, 10, n)
    unit = {"i2t": np.arange(n), "t2i": np.repeat(np.arange(n), counts)}
    return unit, rng.beta(BETA * setting.r1, BETA * (1 - setting.r1), n)


def ranks_by_tries(uniform: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Ranks (Q,): a query is tried until it succeeds, each time with the chance `quality` (Q,)."""
    fails = np.log(uniform) / np.log1p(-quality.clip(1e-12, 1 - 1e-12))
    return RANK[fails.clip(0, len(RANK) - 1).astype(int)]


def true_figures(r1: float) -> np.ndarray:
    """The true figures (11,) of intervals.recalls(): E (1 - quality)^k is known."""
    k = np.arange(len(RANK) - 1)
    fail = np.cumprod((BETA * (1 - r1) + k) / (BETA + k))  # that the first 1, 2, ... tries fail
    recalls = 100 * (1 - fail[:3])
    way = [*recalls, (np.diff(RANK) * fail).sum() + 1]
    return np.array([*way, *way, recalls.mean(), recalls.mean(), 2 * recalls.sum()])


def draw(rng: np.random.Generator, setting: Setting) -> Ranks:
    """The ranks of a split."""
    unit, quality = draw_images(rng, setting)
    ways = [ranks_by_tries(rng.random(len(u)), quality[u]) for u in unit.values()]
    return Ranks(*ways, None, None, unit)


def draw_two(rng: np.random.Generator, setting: Setting) -> tuple[Ranks, Ranks]:
    """The ranks of two systems on one split; without `gain`, their true recalls are the same."""
    unit, quality = draw_images(rng, setting)
    own = np.where(rng.random(setting.n) < setting.alike, quality, draw_images(rng, setting)[1])
    first, second = [], []
    for u in unit.values():
        uniform = rng.random(len(u))
        other = np.where(rng.random(len(u)) < setting.alike, uniform, rng.random(len(u)))
        first.append(ranks_by_tries(uniform, quality[u]))
        rank = ranks_by_tries(other, own[u])
        second.append(np.where(rng.random(len(u)) < setting.gain, 0, rank))
    return Ranks(*first, None, None, unit), Ranks(*second, None, None, unit)


def inside(interval: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Whether intervals (..., 2) cover the truth (...); figures are exact to 1e-9."""
    interval = np.asarray(interval)
    return (interval[..., 0] <= truth + 1e-9) & (truth <= interval[..., 1] + 1e-9)


def flat(found: dict) -> list:
    """The intervals of recall_intervals in the order of intervals.recalls()."""
    ways = [found[way][name] for way in intervals.WAYS for name in intervals.PER_WAY]
    return [*ways, found["ar"], found["ari"], found["rsum"]]


def naive_interval(ranks: Ranks) -> list[float]:
    """The usual interval of R@1, text to image, as if the captions were independent."""
    share, n = (ranks.t2i < 1).mean(), len(ranks.t2i)
    half = 1.96 * np.sqrt(share * (1 - share) / n)
    return [100 * (share - half), 100 * (share + half)]


def coverage(setting: Setting, draws: int, percentile: bool) -> dict[str, np.ndarray]:
    """The share of intervals, in percent, that cover each figure (11,), and the naive one (1,)."""
    truth, covered = true_figures(setting.r1), {"BCa": [], "naive": [], "percentile": []}
    for seed in progress(range(draws), str(setting)):
        ranks = draw(random(setting, seed), setting)
        found = flat(intervals.recall_intervals(ranks, seed=seed))
        covered["BCa"].append(inside(found, truth))
        covered["naive"].append(inside([naive_interval(ranks)], truth[4:5]))
        if percentile:
            how = intervals.recalls, intervals.LIMITS, 0.95, 2000, seed, "percentile"
            found = intervals.bootstrap(intervals.image_table(ranks), *how)
            covered["percentile"].append(inside(found, truth))
    return {name: 100 * np.mean(rows, axis=0) for name, rows in covered.items() if rows}


def alarms(setting: Setting, draws: int) -> dict[str, float]:
    """For each direction, the share of tests below 5 %, in percent: of intervals.paired_test.

    Also the shares of two other tests: 'exact' counts the observed outcome in full, 'naive' takes
    the captions as independent; and of the intervals of the difference that cover the true one.
    """
    found = {f"{name}{way}": [] for name in ("", "exact ", "covers ") for way in intervals.WAYS}
    found["naive t2i"] = []
    gain = 100 * (1 - setting.r1) * setting.gain
    for seed in progress(range(draws), str(setting)):
        a, b = draw_two(random(setting, seed), setting)
        for way, test in intervals.paired_test(a, b, seed=seed).items():
            won = (getattr(b, way) < 1).astype(int) - (getattr(a, way) < 1)  # (Q,)
            exact = intervals.sign_flip_p(np.bincount(a.unit[way], won), mid=False)
            found[way].append(test["p"] < LEVEL)
            found[f"exact {way}"].append(exact < LEVEL)
            found[f"covers {way}"].append(inside(test["interval"], gain))
        found["naive t2i"].append(intervals.sign_flip_p(won) < LEVEL)
    return {name: 100 * np.mean(values) for name, values in found.items()}


class Table:
    """Prints rows of figures; counts those outside their limits, and marks them."""

    outside = 0

    def head(self, title: str, columns: list[str]) -> None:
        print(f"\n{title}\n\n| images | captions | true R@1 | {' | '.join(columns)} |")
        print(f"|---|---|---|{'---|' * len(columns)}", flush=True)

    def row(self, setting: Setting, before: list[str], figures: list, limits: list) -> None:
        """Print a line; `limits` holds the least and the most of each figure, or None."""
        cells = [f"{setting.n:,}", SPREAD[setting.captions], f"{100 * setting.r1:g}", *before]
        for figure, limit in zip(figures, limits, strict=True):
            wrong = limit is not None and not limit[0] <= figure <= limit[1]
            self.outside += wrong
            cells.append(f"{figure:.1f}{'*' if wrong else ''}")
        print(f"| {' | '.join(cells)} |", flush=True)


def check_coverage(table: Table, draws: int) -> None:
    """The intervals, those near 100, and those of captions taken as independent."""
    names = [f"{way} {name}" for way in intervals.WAYS for name in ("R@1", "R@5", "R@10", "mean")]
    names += ["ar", "ari", "rsum", "naive t2i R@1"]
    limits = [None if "mean" in name else COVERAGE for name in names[:-1]]
    table.head("Intervals that cover the truth, percent", names)
    for setting in COVERED:
        found = coverage(setting, draws, False)
        table.row(setting, [], [*found["BCa"], *found["naive"]], [*limits, TOO_LOW])
    table.head("The same near 100, by both ways to make an interval", ["interval", *names[:-1]])
    for setting in NEAR_100:
        found = coverage(setting, draws, True)
        for name in ("BCa", "percentile"):
            table.row(setting, [name], found[name], [None] * len(limits))


def check_tests(table: Table, draws: int) -> None:
    """The paired test: false alarms, and differences that it finds."""
    names = [f"{name}{way}" for name in ("", "exact ", "covers ") for way in intervals.WAYS]
    names.append("naive t2i")
    limits = [ALARMS, ALARMS, None, None, None, None, TOO_MANY]
    table.head("Paired test of equal systems: p < 0.05, percent", ["alike", *names])
    for setting in EQUAL:
        found = alarms(setting, draws)
        table.row(setting, [f"{setting.alike:g}"], [found[name] for name in names], limits)
    table.head("Paired test of a better system: p < 0.05, percent", ["points better", *names[:6]])
    for setting in BETTER:
        found = alarms(setting, draws)
        gain = f"{100 * (1 - setting.r1) * setting.gain:g}"
        table.row(setting, [gain], [found[name] for name in names[:6]], [None] * 6)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=COUNT, default=1000, help="test splits per line")
    opt = parser.parse_args(argv)
    intervals.check_scipy()
    table = Table()
    check_coverage(table, opt.draws)
    check_tests(table, opt.draws)
    print(f"\n{table.outside} figures outside their limits")
    sys.exit(1 if table.outside else 0)


if __name__ == "__main__":
    run(main)
