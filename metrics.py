"""The ranks and recalls of one score matrix.

Shapes: N images, M captions. `image_of` (M,) holds the image of each caption, from 0. None: the
captions stand image by image, M / N of each. Ties count against the model: a wrong candidate with
the same score ranks first (Q41).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from util.cli import InputError

METRICS = ("r1", "r5", "r10", "medr", "meanr")


def _own(scores: np.ndarray, image_of: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """The scores (N, M), the images of the captions (M,), and the captions' own scores (M,)."""
    scores = torch.as_tensor(np.asarray(scores))
    if scores.ndim != 2 or not scores.numel():
        raise InputError(f"scores of shape {tuple(scores.shape)}: expected (images, captions)")
    if not torch.isfinite(scores).all():  # Q17
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise InputError(
            f"the score of image {row} and caption {column} is NaN or infinite; it has no rank "
            "(compared as a number it would count as perfect recall)"
        )
    n, m = scores.shape
    if image_of is None:
        if m % n:
            raise InputError(
                f"scores of shape {tuple(scores.shape)}: expected (images, captions) with the same "
                "number of captions for each image, or the image of each caption"
            )
        image_of = torch.arange(m) // (m // n)
    image_of = torch.as_tensor(np.asarray(image_of)).long()  # (M,)
    if image_of.shape != (m,) or not torch.equal(image_of.unique(), torch.arange(n)):
        raise InputError(
            f"{len(image_of)} captions of {len(image_of.unique())} images, but scores of shape "
            f"{(n, m)}: expected the image, from 0, of each caption, and a caption for each image"
        )
    return scores, image_of, scores[image_of, torch.arange(m)]


def metrics_of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """Recall@K in percent, median and mean rank (counted from 1), of ranks counted from 0."""
    metrics = {f"r{k}": 100.0 * int((ranks < k).sum()) / len(ranks) for k in (1, 5, 10)}
    return metrics | {
        "medr": float(np.floor(np.median(ranks)) + 1),
        "meanr": float(ranks.mean() + 1),
    }


def i2t(scores: np.ndarray, return_ranks: bool = False, image_of: Sequence[int] | None = None):
    """Image to text: the rank of each image's best own caption among all captions.

    scores (N, M). Returns {'r1', 'r5', 'r10', 'medr', 'meanr'}, and with `return_ranks` also (ranks
    (N,) from 0, top1 (N,) caption indices). Raises InputError on NaN.
    """
    scores, image_of, own = _own(scores, image_of)
    best = own.new_full((len(scores),), -torch.inf).scatter_reduce(0, image_of, own, "amax")  # (N,)
    equal = torch.zeros(len(scores), dtype=torch.long)  # own captions with that score
    equal.index_add_(0, image_of, (own >= best[image_of]).long())  # (N,)
    ranks = (scores >= best[:, None]).sum(1) - equal  # (N,)
    metrics = metrics_of_ranks(ranks.numpy())
    if return_ranks:
        return metrics, (ranks.numpy(), scores.argmax(1).numpy())
    return metrics


def t2i(scores: np.ndarray, return_ranks: bool = False, image_of: Sequence[int] | None = None):
    """Text to image: the rank of each caption's image among all images; see i2t."""
    scores, _, own = _own(scores, image_of)
    ranks = (scores >= own).sum(0) - 1  # (M,)
    metrics = metrics_of_ranks(ranks.numpy())
    if return_ranks:
        return metrics, (ranks.numpy(), scores.argmax(0).numpy())
    return metrics


def retrieval_metrics(
    scores: np.ndarray, candidates: bool = False, image_of: Sequence[int] | None = None
) -> dict:
    """Both directions, their mean recalls `ar` and `ari`, and `rsum`, the sum of the six recalls.

    With `candidates`, each caption has k images, and the scores are (k M, M). The rank of a caption
    is then that of its best image, and each image has one caption.
    """
    if candidates:  # images and captions exchange their roles
        ways = {"i2t": t2i(np.transpose(scores)), "t2i": i2t(np.transpose(scores))}
    else:
        ways = {way: f(scores, image_of=image_of) for way, f in (("i2t", i2t), ("t2i", t2i))}
    return with_sums(ways)


def with_sums(ways: dict[str, dict[str, float]]) -> dict:
    """The metrics of both directions, and `ar`, `ari` and `rsum`; see retrieval_metrics."""
    recalls = {way: [m["r1"], m["r5"], m["r10"]] for way, m in ways.items()}
    return ways | {
        "ar": sum(recalls["i2t"]) / 3,
        "ari": sum(recalls["t2i"]) / 3,
        "rsum": sum(recalls["i2t"]) + sum(recalls["t2i"]),
    }


def mean_metrics(folds: list[dict]) -> dict:
    """The mean of each metric over folds (Q1)."""
    return {
        name: mean_metrics([fold[name] for fold in folds])
        if isinstance(value, dict)
        else sum(fold[name] for fold in folds) / len(folds)
        for name, value in folds[0].items()
    }


def numbers(metrics: dict[str, float], separator: str) -> str:
    """The five numbers of one direction, in the published order and precision."""
    return separator.join(f"{metrics[name]:.1f}" for name in METRICS)


def print_metrics(metrics: dict) -> None:
    """Print the published lines."""
    print(f"rsum: {metrics['rsum']:.1f}")
    print(f"Average i2t Recall: {metrics['ar']:.1f}")
    print(f"Image to text: {numbers(metrics['i2t'], ' ')}")
    print(f"Average t2i Recall: {metrics['ari']:.1f}")
    print(f"Text to image: {numbers(metrics['t2i'], ' ')}")


def print_beside_paper(metrics: dict, paper: list[float]) -> None:
    """Print a table: the paper's six recalls (NaN: not known), and our six recalls below them."""
    ours = [metrics[way][name] for way in ("i2t", "t2i") for name in METRICS[:3]]
    head = [f"{way} R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    print(" " * 8 + "".join(f"{name:>10}" for name in head))
    for name, row in (("paper", paper), ("ours", ours)):
        cells = ("-" if math.isnan(value) else f"{value:.1f}" for value in row)
        print(f"{name:<8}" + "".join(f"{cell:>10}" for cell in cells))
