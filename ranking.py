"""What an evaluation has ranked: the scores, the rank of each query, and what they are of.

intervals.py, exports.py and report.py read it. Shapes: N images, M captions.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from metrics import i2t, t2i
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

    @property
    def own_image(self) -> np.ndarray:
        """The image of each caption (M,); with candidate images, the first of them."""
        if self.image_of is not None:
            return np.asarray(self.image_of)
        n, m = self.scores.shape
        return np.arange(m) * n // m

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
            part = scores[rows][:, columns]
            if self.candidates:  # images and captions exchange their roles
                ways = t2i(part.T, True)[1], i2t(part.T, True)[1]
            else:
                ways = i2t(part, True, of)[1], t2i(part, True, of)[1]
            for k, (where, (rank, first)) in enumerate(zip((rows, columns), ways, strict=True)):
                ranks[k][where] = rank
                ranks[k + 2][where] = columns[first] if k == 0 else first + rows.start
        return Ranks(*ranks, unit)
