"""The numbers of a report, computed from a Ranking.

Shapes: N images, M captions; of one direction Q queries, C candidates, P right pairs.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from metrics import mean_metrics, metrics_of_ranks, with_sums
from ranking import Ranking, Ranks
from scoring import Split

WAYS = {"i2t": "Image to text", "t2i": "Text to image"}
TOP = 10  # a candidate counts as retrieved if it is among so many
BLOCK = 4_000_000  # scores that are copied at a time
LAST_K = 100  # of the curve of recalls
Z = 1.96  # of a 95 % interval


class Way(NamedTuple):
    """One direction: each query's rank and rivals, and how often each candidate is retrieved."""

    ranks: np.ndarray  # (Q,) from 0
    right: np.ndarray  # (Q,) the best right candidate
    right_score: np.ndarray  # (Q,)
    wrong: np.ndarray  # (Q,) the best wrong candidate; -1: all are right
    wrong_score: np.ndarray  # (Q,) -inf where there is none
    first: np.ndarray  # (C,) how many queries have this candidate first
    top: np.ndarray  # (C,) how many have it among the first TOP

    @property
    def margin(self) -> np.ndarray:
        """How far the right candidate is ahead of the best wrong one (Q,)."""
        return self.right_score - self.wrong_score

    def best(self, most: int) -> np.ndarray:
        """The queries of rank 1 with the largest margins."""
        found = np.flatnonzero(self.ranks == 0)
        return found[np.argsort(-self.margin[found], kind="stable")][:most]

    def worst(self, most: int) -> np.ndarray:
        """The queries of the largest ranks above 1; of equal ranks, the worse margin first."""
        found = np.flatnonzero(self.ranks > 0)
        return found[np.lexsort((self.margin[found], -self.ranks[found]))][:most]


def look(
    ranking: Ranking,
    name: str,
    scores: np.ndarray | None = None,
    ranks: Ranks | None = None,
    chosen: np.ndarray | None = None,
) -> Way:
    """Everything of one direction, `i2t` or `t2i`, by the mean scores, or others and their ranks.

    With `chosen`, only of these queries: then `top` counts these too, and what a Way says of the
    others has no meaning.
    """
    scores = ranking.scores if scores is None else scores
    ranks = ranks or ranking.ranks
    images, captions = ranking.right_pairs
    folds = list(ranking.folds())
    if name == "i2t":
        pairs, rank, first = (images, captions), ranks.i2t, ranks.first_caption
    else:
        pairs, rank, first = (captions, images), ranks.t2i, ranks.first_image
        scores, folds = scores.T, [(captions, images) for images, captions in folds]
    if chosen is not None:
        folds = [(np.intersect1d(queries, chosen), found) for queries, found in folds]
    *found, top = survey(scores, *pairs, folds)
    return Way(rank, *found, np.bincount(first, minlength=scores.shape[1]), top)


def survey(
    scores: np.ndarray,
    query: np.ndarray,
    candidate: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, ...]:
    """The best right and wrong candidate of each query, and how often each candidate is on top.

    scores (Q, C); query and candidate (P,) are the right pairs; `folds` are pairs of queries and
    candidates. Returns (right, right_score, wrong, wrong_score) (Q,) and top (C,). The scores are
    copied block by block, so that a large matrix is never held twice.
    """
    q, c = scores.shape
    right, wrong = np.full((2, q), -1)
    right_score, wrong_score = np.full((2, q), -np.inf)
    own = scores[query, candidate]  # (P,)
    order = np.argsort(own, kind="stable")
    right[query[order]] = candidate[order]  # the last one counts, which has the best score
    right_score[query[order]] = own[order]
    top = np.zeros(c, int)
    for queries, candidates in folds:
        column = np.full(c, -1)  # of a candidate in a block
        column[candidates] = np.arange(len(candidates))
        for chunk in np.array_split(queries, max(1, math.ceil(len(queries) * c / BLOCK))):
            block = scores[chunk]  # a copy
            if len(candidates) < c:
                block = block[:, candidates]
            block = np.ascontiguousarray(block)  # (queries, candidates) of the fold
            best = torch.from_numpy(block).topk(min(TOP, len(candidates)), sorted=False).indices
            top[candidates] += np.bincount(best.flatten(), minlength=len(candidates))
            row = np.full(q, -1)  # of a query in the block
            row[chunk] = np.arange(len(chunk))
            there = row[query] >= 0
            block[row[query[there]], column[candidate[there]]] = -np.inf
            rival = block.argmax(1)
            wrong_score[chunk] = value = block[np.arange(len(chunk)), rival]
            wrong[chunk] = np.where(np.isinf(value), -1, candidates[rival])
    return right, right_score, wrong, wrong_score, top


def metrics_of(ranking: Ranking, ranks: Ranks) -> dict:
    """What evalrank returns, without the folds, by the ranks of another matrix of the split."""
    found = []
    for images, captions in ranking.folds():
        both = {"i2t": ranks.i2t[images], "t2i": ranks.t2i[captions]}
        found.append(with_sums({way: metrics_of_ranks(x) for way, x in both.items()}))
    return mean_metrics(found)


def recall_curve(ranks: np.ndarray, candidates: int) -> np.ndarray:
    """Recall@K in percent for K = 1, 2, ... (K,), at most LAST_K and the number of candidates."""
    counts = np.bincount(ranks, minlength=LAST_K)
    return 100 * counts.cumsum()[: min(LAST_K, candidates)] / len(ranks)


def curve_band(
    ranks: np.ndarray, unit: np.ndarray, last: int, resamples: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """The bounds (K,) of 95 % intervals of recall_curve, by a bootstrap over units (Q,)."""
    _, unit = np.unique(unit, return_inverse=True)
    units = unit.max() + 1
    hits = np.zeros((units, last), np.float32)
    within = ranks < last
    np.add.at(hits, (unit[within], ranks[within]), 1)
    hits = hits.cumsum(1)  # (units, K)
    sizes = np.bincount(unit)  # (units,) queries of each
    rng = np.random.default_rng(0)
    times = rng.multinomial(units, np.full(units, 1 / units), resamples).astype(np.float32)
    shares = 100 * (times @ hits) / (times @ sizes)[:, None]  # (resamples, K)
    low, high = np.quantile(shares, (0.025, 0.975), axis=0)
    return low, high


def rank_bins(ranks: np.ndarray, candidates: int) -> list[tuple[str, int]]:
    """How many queries have rank 1, 2-5, 6-10, 11-20, 21-50, ...: a label and a count per bin."""
    ends = [1, 5]
    while ends[-1] < candidates:
        ends += [ends[-1] * 2, ends[-1] * 4, ends[-1] * 10]  # 10, 20, 50
    bins, first = [], 1
    for end in ends:
        if first <= candidates:
            last = min(end, candidates)
            count = int(((ranks >= first - 1) & (ranks < last)).sum())
            bins.append((f"{first:,}" if first == last else f"{first:,}–{last:,}", count))
        first = end + 1
    return bins


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of Wilson, in percent, for `hits` of `n`."""
    share, extra = hits / n, Z * Z / n
    middle, half = share + extra / 2, Z * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    low, high = (100 * x / (1 + extra) for x in (middle - half, middle + half))
    return max(0.0, low), min(100.0, high)


def recall_by(values: np.ndarray, ranks: np.ndarray, ends: Sequence[int]) -> list[dict]:
    """Recalls of the queries in bins of a number of theirs, `values` (Q,).

    A bin reaches from behind the end of the one before it to its own end; `ends` ascend. Returns
    {'label', 'n', 'r1': (recall, low, high), 'r5', 'r10'} for each bin that holds a query.
    """
    bins = []
    for low, high in zip([-1, *ends[:-1]], ends, strict=True):
        inside = (values > low) & (values <= high)
        if not inside.any():
            continue
        least, most, n = values[inside].min(), values[inside].max(), int(inside.sum())
        found = {"label": f"{least}" if least == most else f"{least}–{most}", "n": n}
        for k in (1, 5, 10):
            hits = int((ranks[inside] < k).sum())
            found[f"r{k}"] = (100 * hits / n, *wilson(hits, n))
        bins.append(found)
    return bins


def even_ends(values: np.ndarray, most: int = 7) -> list[int]:
    """The ends of at most `most` bins of whole numbers (Q,) that hold about as many each."""
    distinct = np.unique(values)
    if len(distinct) > most:
        shares = np.arange(1, most + 1) / most
        distinct = np.unique(np.quantile(values, shares, method="inverted_cdf"))
    return distinct.astype(int).tolist()


def words_of(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The number of words of each caption (M,), and how many of them are rare (M,).

    Rare: not in the vocabulary. BERT knows pieces of all words; there it is the words of several
    pieces.
    """
    dataset, vocab = split.dataset, split.vocab
    lengths = dataset.lengths[: dataset.n_captions].numpy()  # (M,) with <start> and <end>
    ids = dataset.words[: lengths.sum()].numpy()
    caption = np.repeat(np.arange(len(lengths)), lengths)  # of each id

    def count(which: np.ndarray) -> np.ndarray:
        return np.bincount(caption[which], minlength=len(lengths))

    if not vocab.pieces:
        return lengths - 2, count(ids == vocab.word2idx[vocab.unknown])
    later = [index for piece, index in vocab.word2idx.items() if piece.startswith("##")]
    begins = ~np.isin(ids, later)
    return count(begins) - 2, count(begins & ~np.append(begins[1:], True))


def skewness(counts: np.ndarray) -> float | None:
    """The third standardised moment of counts; None if all are equal."""
    away = counts - counts.mean()
    spread = np.sqrt((away**2).mean())
    return float((away**3).mean() / spread**3) if spread else None


def labels_of(paths: Sequence[str], least: int = 1) -> list[str]:
    """A short name for each file: the shortest ends of the paths that are distinct.

    They have `least` parts or more, as far as the paths have so many.
    """
    parts = []
    for path in paths:
        *folders, name = os.path.normpath(path).split(os.sep)
        for ending in (".tar", ".pth", ".npy"):
            name = name.removesuffix(ending)
        parts.append([*folders, name])
    most = max(map(len, parts))
    for k in range(min(least, most), most + 1):
        names = ["/".join(part[-k:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({k})" for k, name in enumerate(names, 1)]  # one file several times
