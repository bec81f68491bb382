"""Plain loops straight from the papers: what the fast routes are tested against."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def normalise(s: Tensor, how: str, dim: int = 0) -> Tensor:
    """Dots s (Q, K), normalised over the Q queries (dimension `dim`) of each key."""
    if how.startswith("clipped"):
        s = torch.where(s > 0, s, 0.1 * s)
    if how.endswith("l2norm"):
        return s / (s**2).sum(dim, keepdim=True).sqrt().add(1e-8)
    if how.endswith("l1norm"):
        return s / (s.abs().sum(dim, keepdim=True) + 1e-8)
    if how == "softmax":
        return s.softmax(dim)
    return s


def pair_score(
    queries: Tensor, keys: Tensor, norm: str, agg: str, lambda_softmax: float, lambda_lse: float
) -> Tensor:
    """Score of one pair: queries (Q, D) attend to keys (K, D), one query at a time."""
    weights = normalise(queries @ keys.T, norm)  # (Q, K)
    cosines = []
    for query, row in zip(queries, weights, strict=True):
        attention = torch.softmax(lambda_softmax * row, 0)  # (K,)
        attended = (attention[:, None] * keys).sum(0)  # (D,)
        cosines.append(query @ attended / (query.norm() * attended.norm()).clamp_min(1e-8))
    x = torch.stack(cosines)  # (Q,)
    return {
        "LogSumExp": lambda: (lambda_lse * x).exp().sum().log() / lambda_lse,
        "Mean": lambda: x.sum() / len(x),
        "Max": lambda: max(x),
        "Sum": lambda: x.sum(),
    }[agg]()


def xattn_score(
    direction: str,
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    norm: str = "clipped_l2norm",
    agg: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
) -> Tensor:
    """All pairs, one after the other: (I, C)."""
    scores = []
    for image in images:
        for caption, length in zip(captions, cap_lens, strict=True):
            words = caption[:length]
            q, k = (words, image) if direction == "t2i" else (image, words)
            scores.append(pair_score(q, k, norm, agg, lambda_softmax, lambda_lse))
    return torch.stack(scores).view(len(images), len(captions))


def caption_loop(
    direction: str,
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    norm: str = "clipped_l2norm",
    agg: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
) -> Tensor:
    """All images at once, one caption after the other: (I, C). What the benchmark runs against.

    The order of operations is that of the published programs: the caption is copied beside every
    image, the dots are normalised with a row a key and laid out anew for the softmax over the keys,
    and the attended vectors come out as columns.
    """
    scores = []
    for caption, length in zip(captions, cap_lens, strict=True):
        words = caption[:length].repeat(len(images), 1, 1)  # (I, W, D)
        queries, keys = (words, images) if direction == "t2i" else (images, words)
        weights = normalise(keys @ queries.mT, norm, 2).mT.contiguous()  # (I, Q, K)
        attention = torch.softmax(lambda_softmax * weights, 2).mT.contiguous()  # (I, K, Q)
        attended = (keys.mT @ attention).mT  # (I, Q, D)
        lengths = queries.norm(dim=2) * attended.norm(dim=2)  # (I, Q)
        x = (queries * attended).sum(2) / lengths.clamp_min(1e-8)  # (I, Q)
        if agg == "LogSumExp":
            scores.append(torch.logsumexp(lambda_lse * x, 1) / lambda_lse)
        else:
            scores.append({"Mean": x.mean, "Sum": x.sum, "Max": x.amax}[agg](1))
    return torch.stack(scores, 1)


def hinge(scores: Tensor, margin: float, max_violation: bool) -> Tensor:
    """The ranking loss, one negative at a time."""
    n = len(scores)
    total = scores.new_zeros(())
    for i in range(n):
        caption_costs = [F.relu(margin + scores[i, j] - scores[i, i]) for j in range(n) if j != i]
        image_costs = [F.relu(margin + scores[j, i] - scores[i, i]) for j in range(n) if j != i]
        for costs in (caption_costs, image_costs):
            if costs:
                total = total + (max(costs) if max_violation else sum(costs))
    return total


def ranks(scores: np.ndarray) -> tuple[list[int], list[int]]:
    """0-based ranks of both directions by counting; a tie with a wrong candidate costs a rank."""
    n, m = scores.shape
    k = m // n
    i2t, t2i = [], []
    for i in range(n):
        own = range(k * i, k * i + k)
        best = max(scores[i, j] for j in own)
        i2t.append(sum(scores[i, j] >= best for j in range(m) if j not in own))
    for j in range(m):
        t2i.append(sum(scores[i, j] >= scores[j // k, j] for i in range(n) if i != j // k))
    return i2t, t2i
