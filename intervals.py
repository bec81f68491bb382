"""How sure is a recall, and is one system better: 95 % intervals, and a paired test.

The captions of an image are not independent: a hard image is hard for all of them. So images are
drawn, each with its captions. docs/statistics.md says how, and how well it holds. Needs scipy.

Shapes: U images, Q queries of one direction, S resamples.
"""

from collections.abc import Callable

import numpy as np

from metrics import METRICS
from ranking import Ranks
from util.cli import InputError

WAYS = ("i2t", "t2i")
KS = (1, 5, 10)
PER_WAY = [*METRICS[:3], "meanr"]  # the median of whole ranks has no useful bootstrap
# The least and the most that each figure of recalls() can be; the largest rank is not known.
LIMITS = [[0, 100], [0, 100], [0, 100], [np.nan, np.nan]] * 2 + [[0, 100], [0, 100], [0, 600]]
DRAWN = 2**16  # numbers of images at a time: they fit into the cache of a processor


def check_scipy() -> None:
    """Raise InputError if scipy is not installed, or too old: call it before hours of work."""
    try:
        import scipy.stats
    except ImportError:
        raise InputError("intervals and paired tests need scipy: pip install scipy") from None
    version = scipy.__version__
    if [int(x) for x in version.split(".")[:2]] < [1, 15]:  # its generators have other names
        raise InputError(
            f"intervals and paired tests need scipy 1.15 or newer, found {version}: "
            "pip install --upgrade scipy"
        )


def recall_intervals(
    ranks: Ranks, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict:
    """The interval [low, high] of each recall and mean rank, by bootstrap (BCa) over images.

    Returns {'i2t': {'r1', 'r5', 'r10', 'meanr'}, 't2i': {...}, 'ar', 'ari', 'rsum'} as evalrank,
    with a list [low, high] for each number. Raises InputError if all queries are of one image, or
    without scipy.
    """
    found = bootstrap(image_table(ranks), recalls, LIMITS, confidence, resamples, seed).tolist()
    ways = {way: dict(zip(PER_WAY, found[4 * k :], strict=False)) for k, way in enumerate(WAYS)}
    return ways | dict(zip(("ar", "ari", "rsum"), found[8:], strict=True))


def of_one_image(ranks: Ranks) -> bool:
    """Whether all queries are of one image: then nothing can be drawn, and nothing compared."""
    return len(np.unique(np.concatenate([*ranks.unit.values()]))) < 2


def intervals_or_none(ranks: Ranks, confidence: float = 0.95) -> dict | None:
    """recall_intervals; None if all queries are of one image."""
    return None if of_one_image(ranks) else recall_intervals(ranks, confidence)


def image_table(ranks: Ranks) -> np.ndarray:
    """A row per image (U, 10): hits at 1, 5 and 10, the sum of ranks, and queries, each way."""
    rows, columns = _rows_of_images(ranks), []
    for way in WAYS:
        rank = getattr(ranks, way)
        for values in (*(rank < k for k in KS), rank, np.ones_like(rank)):
            columns.append(np.bincount(rows[way], values))
    return np.stack(columns, 1)


def recalls(sums: np.ndarray) -> np.ndarray:
    """Recalls and mean rank each way, 'ar', 'ari', 'rsum' (11, ...), of summed rows (..., 10)."""
    figures, means = [], []
    for part in np.split(sums, 2, axis=-1):
        *hits, ranks, queries = np.moveaxis(part, -1, 0)
        shares = [100 * x / queries for x in hits]
        figures += [*shares, ranks / queries + 1]
        means.append(sum(shares) / 3)
    return np.stack([*figures, *means, 3 * sum(means)])


def paired_test(
    a: Ranks,
    b: Ranks,
    k: int = 1,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """Is the difference in R@k between two systems real? By exchange of their results.

    Returns for 'i2t' and 't2i': 'difference' (points of R@k, b minus a), its bootstrap 'interval'
    over images, 'p' (see sign_flip_p), and the numbers of queries that 'only_a' or 'only_b' finds.
    Image to text, this is McNemar's test; text to image, it is that test over captions clustered by
    image. Raises InputError if the two have not ranked the same queries, or have one image.
    """
    check_same_queries(a, b)
    rows, columns, tests = _rows_of_images(a), [], {}
    for way in WAYS:
        found_a, found_b = getattr(a, way) < k, getattr(b, way) < k
        won = np.bincount(rows[way], found_b & ~found_a)
        lost = np.bincount(rows[way], found_a & ~found_b)
        columns += [won - lost, np.bincount(rows[way])]
        tests[way] = {"p": sign_flip_p(won - lost)}
        tests[way] |= {"only_a": int(lost.sum()), "only_b": int(won.sum())}

    def points(sums: np.ndarray) -> np.ndarray:  # of sums over images (..., 4)
        return np.stack([100 * sums[..., j] / sums[..., j + 1] for j in (0, 2)])

    table = np.stack(columns, 1)
    found = bootstrap(table, points, [[-100, 100]] * 2, confidence, resamples, seed).tolist()
    for way, difference, interval in zip(WAYS, points(table.sum(0)).tolist(), found, strict=True):
        tests[way] |= {"difference": difference, "interval": interval}
    return tests


def sign_flip_p(differences: np.ndarray, mid: bool = True) -> float:
    """The p value, from both sides, of the sum of whole differences (U,), one per image.

    Without a real difference, the results of the two systems for an image could as well be
    exchanged, so each difference could have the other sign. The distribution of the sum over all
    2^U signs is computed, not sampled. With `mid`, an outcome as extreme as the observed one counts
    half; without, in full, and there are fewer false alarms than the p value says.
    """
    from scipy.stats import binom

    differences = np.asarray(differences).astype(int)
    chances = np.ones(1)  # of each sum of the differences that count for b
    for size, n in zip(*np.unique(np.abs(differences), return_counts=True), strict=True):
        if size:  # n images each add `size` or nothing
            step = np.zeros(size * n + 1)
            step[::size] = binom.pmf(np.arange(n + 1), n, 0.5)
            chances = np.convolve(chances, step)
    total, observed = np.abs(differences).sum(), abs(differences.sum())
    at = (total + observed) // 2
    p = 2 * (chances[at + 1 :].sum() + chances[at] * (0.5 if mid else 1))
    return min(1.0, float(p))


def holm(p: list[float]) -> list[float]:
    """P values after Holm's correction: how sure is each, given that there are several tests?"""
    corrected, largest = list(p), 0.0
    for place, k in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - place) * p[k]))
        corrected[k] = largest
    return corrected


def _rows_of_images(ranks: Ranks) -> dict[str, np.ndarray]:
    """The row of the image of each query (Q,), by direction; the rows count from 0 without gaps."""
    check_scipy()
    names, row = np.unique(np.concatenate([ranks.unit[way] for way in WAYS]), return_inverse=True)
    if len(names) < 2:
        raise InputError("all queries are of one image: an interval needs at least 2 images")
    return dict(zip(WAYS, np.split(row, [len(ranks.unit["i2t"])]), strict=True))


def check_same_queries(a: Ranks, b: Ranks) -> None:
    """Raise InputError if two systems have not ranked the same split."""
    sizes = [f"{len(x.unit['i2t']):,} images and {len(x.unit['t2i']):,} captions" for x in (a, b)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"ranks of {sizes[0]}, and of {sizes[1]}: a paired test needs the same split for both"
        )
    if not all(np.array_equal(a.unit[way], b.unit[way]) for way in WAYS):
        raise InputError(
            "the captions of the two systems are of other images: a paired test needs the same "
            "split for both"
        )


def bootstrap(
    table: np.ndarray,
    figures: Callable[[np.ndarray], np.ndarray],
    limits: list[list[float]],
    confidence: float,
    resamples: int,
    seed: int,
    method: str = "BCa",
) -> np.ndarray:
    """The intervals (F, 2) of F figures, by scipy.stats.bootstrap over images.

    `table` (U, C) holds whole numbers per image. `figures` makes the figures (F, ...) of sums of
    its rows (..., C). `limits` holds the least and the most that each figure can be; NaN: not
    known. A figure that is the same for every image, as a recall of 100, has no spread to draw. Its
    interval then says what share of all images could be otherwise, and none among these U (Clopper
    and Pearson's bound).
    """
    from scipy import stats

    n = len(table)
    alone = figures(table)  # (F, U) of each image alone
    low, high = alone.min(1), alone.max(1)
    spread = low < high
    unseen = 1 - ((1 - confidence) / 2) ** (1 / n)
    least, most = np.where(np.isnan(limits), low[:, None], limits).T
    low, high = low - unseen * (low - least), high + unseen * (most - high)

    def statistic(images: np.ndarray, axis: int) -> np.ndarray:  # (..., n): the images drawn
        drawn = images.reshape(-1, images.shape[-1])  # (S, n)
        of_resample = drawn + n * np.arange(len(drawn))[:, None]
        times = np.bincount(of_resample.ravel(), minlength=n * len(drawn)).reshape(-1, n)
        sums = times.astype(float) @ table  # (S, C)
        return figures(sums.reshape(*images.shape[:-1], -1))[spread]

    if spread.any():
        how = {"method": method, "confidence_level": confidence, "n_resamples": resamples}
        how |= {"vectorized": True, "batch": max(1, DRAWN // n), "rng": np.random.default_rng(seed)}
        found = stats.bootstrap((np.arange(n),), statistic, **how).confidence_interval
        low[spread], high[spread] = found
    return np.stack([low, high], 1)
