"""Rank a score matrix: print the published lines, and keep the rank of each query and its source.

intervals.py, exports.py and report.py read a Ranking. Shapes: N images, M captions.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from metrics import i2t, mean_metrics, numbers, print_metrics, retrieval_metrics, t2i
from scoring import Split, fold_parts

FOLDS, PUBLISHED_FOLD = 5, 1000  # COCO 1K: five folds of 1,000 images of testall


class Ranks(NamedTuple):
    """The rank of each query, from 0, and what came first; with five folds, within its fold.

    `unit` says which image a query belongs to: the captions of an image are not independent, so
    intervals and tests draw images. (Where captions have several candidate images, it is the
    caption that a query belongs to, and captions are drawn.)
    """

    i2t: np.ndarray  # (N,) of each image's best own caption
    t2i: np.ndarray  # (M,) of each caption's image
    first_caption: np.ndarray  # (N,)
    first_image: np.ndarray  # (M,)
    unit: dict[str, np.ndarray]  # of the queries: 'i2t' (N,), 't2i' (M,)


@dataclasses.dataclass
class Ranking:
    """An evaluation: what `evaluation.py` has printed, and all that the other outputs need."""

    sources: list[str]  # checkpoints, or files of scores or embeddings
    scores: np.ndarray  # (N, M): the mean over the sources
    image_of: np.ndarray | None  # (M,) the image of each caption; None: they are in order
    metrics: dict  # as evalrank returns them
    fold5: bool = False
    candidates: bool = False  # captions have several candidate images; see retrieval_metrics
    captions: list[str] | None = None  # (M,) as they stand in their file
    ids: list[str] | None = None  # (N,) of the images
    parts: list[np.ndarray] = dataclasses.field(default_factory=list)  # each source's own scores
    splits: list[Split] = dataclasses.field(default_factory=list)  # one per checkpoint
    folder: str | None = None  # of the data set, if one is known, and which split of it
    split: str | None = None

    @property
    def own_image(self) -> np.ndarray:
        """The image of each caption (M,); with candidate images, the first of them."""
        if self.image_of is not None:
            return np.asarray(self.image_of)
        n, m = self.scores.shape
        return np.arange(m) * n // m

    @property
    def right_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The image (P,) and the caption (P,) of each right pair."""
        n, m = self.scores.shape
        if self.candidates:
            return np.arange(n), np.arange(n) * m // n
        return self.own_image, np.arange(m)

    def folds(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The images (n,) and the captions (m,) of each fold; of all, if there are no folds."""
        n, _ = self.scores.shape
        folds = FOLDS if self.fold5 else 1
        for fold in range(folds):
            rows, columns, _ = fold_parts(self.scores.shape, fold, folds, self.image_of)
            yield np.arange(n)[rows], columns.numpy()

    @functools.cached_property
    def ranks(self) -> Ranks:
        return self.ranks_of(self.scores)

    def ranks_of(self, scores: np.ndarray) -> Ranks:
        """The ranks by scores (N, M) of the same split."""
        n, m = scores.shape
        folds = FOLDS if self.fold5 else 1
        if self.candidates:
            unit = {"i2t": np.arange(n) * m // n, "t2i": np.arange(m)}
        else:
            unit = {"i2t": np.arange(n), "t2i": self.own_image}
        ranks = [np.empty(size, int) for size in (n, m, n, m)]
        for fold in range(folds):
            rows, columns, of = fold_parts(scores.shape, fold, folds, self.image_of)
            columns = columns.numpy()
            part = scores if folds == 1 else scores[rows][:, columns]
            if self.candidates:  # images and captions exchange their roles
                ways = t2i(part.T, True)[1], i2t(part.T, True)[1]
            else:
                ways = i2t(part, True, of)[1], t2i(part, True, of)[1]
            for k, (where, (rank, first)) in enumerate(zip((rows, columns), ways, strict=True)):
                ranks[k][where] = rank
                ranks[k + 2][where] = columns[first] if k == 0 else first + rows.start
        return Ranks(*ranks, unit)


def rank_scores(
    sources: list[str],
    scores: np.ndarray,
    image_of: np.ndarray | None,
    fold5: bool,
    candidates: bool = False,
    **more,
) -> Ranking:
    """Rank by scores (N, M), print the published lines, and put all into a Ranking."""
    metrics = rank_and_print(scores, fold5, candidates, image_of)
    return Ranking(sources, scores, image_of, metrics, fold5, candidates, **more)


def rank_and_print(
    scores: np.ndarray,
    fold5: bool,
    candidates: bool,
    image_of: Sequence[int] | None = None,
) -> dict:
    """Print and return the metrics of scores (N, M), or their means over five parts of them (Q1).

    `image_of` (M,) is the image of each caption; None: they stand image by image.
    """
    if not fold5:
        metrics = retrieval_metrics(scores, candidates, image_of)
        print_metrics(metrics)
        return metrics

    results = []
    for fold in range(FOLDS):
        rows, columns, of = fold_parts(scores.shape, fold, FOLDS, image_of)
        metrics = retrieval_metrics(scores[rows][:, columns.numpy()], candidates, of)
        print(f"Image to text: {numbers(metrics['i2t'], ', ')}")
        print(f"Text to image: {numbers(metrics['t2i'], ', ')}")
        print(f"rsum: {metrics['rsum']:.1f} ar: {metrics['ar']:.1f} ari: {metrics['ari']:.1f}")
        results.append(metrics)
    n = len(scores) // FOLDS
    size = f"{n:,}" if len(scores) == n * FOLDS else f"{n:,} or {n + 1:,}"
    print(f"Five folds of {size} images each")
    if len(scores) != PUBLISHED_FOLD * FOLDS:
        print(
            f"notice: this is not the published protocol (COCO 1K), whose folds are "
            f"{PUBLISHED_FOLD:,} images of testall: recalls among {size} images do not compare"
        )
    print("-----------------------------------")
    print("Mean metrics: ")
    metrics = mean_metrics(results)
    print_metrics(metrics)
    return metrics | {"folds": results}
