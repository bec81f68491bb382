"""MAP@k and A@k of judged candidates, as published for Tencent-News (PFAN with whole images)."""

import math
from collections.abc import Sequence

import numpy as np

from util.cli import InputError


def average_precision(
    scores: Sequence[Sequence[float]],
    relevant: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 2, 3),
) -> dict[str, float]:
    """MAP@k and A@k of queries with judged candidates, as published for Tencent-News.

    For each query, `scores` holds the scores of its candidates, and `relevant` holds 1 for each
    relevant candidate, else 0. 'queries@k' is the number of queries with at least k relevant
    candidates. For each of them, AP@k = (1 / k) sum_{i <= k} (relevant among the first i) / i, and
    'map@k' is the mean of AP@k. 'a@k' is the fraction of relevant candidates among the first k of
    all these queries. 'map' is the usual MAP: for each query with a relevant candidate, the mean
    precision at its relevant candidates; then the mean over these queries. 'map@k', 'a@k' and 'map'
    lie between 0 and 1; they are NaN if there is no such query. If scores are equal, irrelevant
    candidates rank first. Raises InputError if a score is not finite or a flag is not 0 or 1.
    """
    ranked = []
    for query, (x, flags) in enumerate(zip(scores, relevant, strict=True)):
        x, flags = np.asarray(x, np.float64), np.asarray(flags)
        if x.shape != flags.shape or not np.isin(flags, (0, 1)).all() or not np.isfinite(x).all():
            raise InputError(
                f"query {query} (from 0): expected as many finite scores as flags 0 or 1, found "
                f"{len(x)} scores, {len(flags)} flags"
            )
        ranked.append(flags[np.lexsort((flags, -x))].astype(int))
    metrics = {}
    for k in ks:
        tops = [flags[:k] for flags in ranked if len(flags) and flags.sum() >= k]
        precisions = [np.mean(top.cumsum() / np.arange(1, len(top) + 1)) for top in tops]
        metrics[f"map@{k}"] = float(np.mean(precisions)) if tops else float("nan")
        hits, judged = sum(int(top.sum()) for top in tops), sum(map(len, tops))
        metrics[f"a@{k}"] = hits / judged if judged else float("nan")
        metrics[f"queries@{k}"] = len(tops)
    usual = [
        np.mean((flags.cumsum() / np.arange(1, len(flags) + 1))[flags == 1])
        for flags in ranked
        if flags.any()
    ]
    return metrics | {"map": float(np.mean(usual)) if usual else float("nan")}


def weighted_scores(
    models: Sequence[Sequence[dict[str, float]]], weights: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """The weighted means of several models' scores, query by query, for average_precision.

    For each query, a model gives a dict from candidate to score. If only some models score a
    candidate, it gets their mean. The published weights are 1, 1 and 1.5.
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or not all(0 < weight < math.inf for weight in weights):
        raise InputError(
            f"{len(models)} models with weights {weights}: expected one weight above 0 per model"
        )
    if len({len(model) for model in models}) > 1:
        raise InputError(f"models that score {[len(m) for m in models]} queries: expected the same")
    means = []
    for query in zip(*models, strict=True):
        total: dict[str, list[float]] = {}
        for weight, scores in zip(weights, query, strict=True):
            for name, score in scores.items():
                sums = total.setdefault(name, [0.0, 0.0])
                sums[0] += weight * score
                sums[1] += weight
        means.append({name: score / weight for name, (score, weight) in total.items()})
    return means
