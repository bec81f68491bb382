"""The ranks and recalls of one score matrix.

Shapes: N images, M = k N captions, image by image. Ties count against the model: a wrong candidate
with the same score ranks first (Q41).
"""

import math

import numpy as np
import torch
from torch import Tensor

from util.cli import InputError

METRICS = ("r1", "r5", "r10", "medr", "meanr")


def _own(scores: np.ndarray) -> tuple[Tensor, Tensor]:
    """The scores as a tensor (N, M), and those of each image with its own k captions (N, k)."""
    scores = torch.as_tensor(np.asarray(scores))
    if scores.ndim != 2 or not len(scores) or scores.shape[1] % len(scores):
        raise InputError(
            f"scores of shape {tuple(scores.shape)}: expected (images, captions) with the same "
            "number of captions for each image"
        )
    if not torch.isfinite(scores).all():  # Q17
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise InputError(
            f"the score of image {row} and caption {column} is NaN or infinite; it has no rank "
            "(compared as a number it would count as perfect recall)"
        )
    n, m = scores.shape
    return scores, scores.view(n, n, m // n).diagonal().mT


def _metrics(ranks: Tensor) -> dict[str, float]:
    """Recall@K in percent, median and mean rank (counted from 1), of ranks counted from 0."""
    metrics = {f"r{k}": 100.0 * int((ranks < k).sum()) / len(ranks) for k in (1, 5, 10)}
    ranks = ranks.numpy()
    return metrics | {
        "medr": float(np.floor(np.median(ranks)) + 1),
        "meanr": float(ranks.mean() + 1),
    }


def i2t(scores: np.ndarray, return_ranks: bool = False):
    """Image to text: the rank of each image's best own caption among all captions.

    scores (N, k N), captions image by image. Returns {'r1', 'r5', 'r10', 'medr', 'meanr'}, and with
    `return_ranks` also (ranks (N,) from 0, top1 (N,) caption indices). Raises InputError on NaN.
    """
    scores, own = _own(scores)
    best = own.amax(1, keepdim=True)  # (N, 1)
    ranks = (scores >= best).sum(1) - (own >= best).sum(1)  # (N,)
    if return_ranks:
        return _metrics(ranks), (ranks.numpy(), scores.argmax(1).numpy())
    return _metrics(ranks)


def t2i(scores: np.ndarray, return_ranks: bool = False):
    """Text to image: the rank of each caption's image among all images; see i2t."""
    scores, own = _own(scores)
    ranks = (scores >= own.reshape(1, -1)).sum(0) - 1  # (M,)
    if return_ranks:
        return _metrics(ranks), (ranks.numpy(), scores.argmax(0).numpy())
    return _metrics(ranks)


def retrieval_metrics(scores: np.ndarray, candidates: bool = False) -> dict:
    """Both directions, their mean recalls `ar` and `ari`, and `rsum`, the sum of the six recalls.

    With `candidates`, each caption has k images, and the scores are (k M, M). The rank of a caption
    is then that of its best image, and each image has one caption.
    """
    if candidates:  # images and captions exchange their roles
        ways = {"i2t": t2i(np.transpose(scores)), "t2i": i2t(np.transpose(scores))}
    else:
        ways = {"i2t": i2t(scores), "t2i": t2i(scores)}
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
