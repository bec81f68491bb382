"""Recalls of a search in two stages: `evaluation.py CHECKPOINT --rerank 100`.

Each caption gets a shortlist of K images by the vectors of the first stage, and each image one of
K captions. The model scores only these pairs. A query ranks its shortlist by these scores; behind
it stand the others, in the order of the first stage. docs/search.md has an example.

Shapes: N images, M captions, D joint dimension.
"""

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from first_stage import pooled_captions, pooled_images
from metrics import i2t, metrics_of_ranks, print_metrics, t2i, with_sums
from pairs import Encoding
from scoring import encode_split, rank_by
from util.arguments import COUNT
from util.cli import InputError, progress
from util.distributed import world_size

NOT_SCORED = -1e30  # below all scores; metrics.py refuses infinities
# The options of evaluation.py that go with --rerank.
TAKEN = {"rerank", "first_stage", "data_path", "data_name", "split", "vocab_path", "device"}
TAKEN |= {"batch_size", "keep_empty_regions", "paper", "paper_images"}


def add_options(group) -> None:
    group.add_argument(
        "--rerank",
        type=COUNT,
        metavar="K",
        help="the recalls of a search in two stages (search.py): the exact score orders only a "
        "shortlist of K for each query",
    )
    group.add_argument(
        "--first_stage",
        metavar="CHECKPOINT",
        help="a model whose vectors make the shortlists; default: the model itself",
    )


def check(opt: argparse.Namespace, given: set[str]) -> None:
    """Raise InputError if options do not go with --rerank; `given` are the names of those given."""
    if opt.first_stage is not None and opt.rerank is None:
        raise InputError("--first_stage makes shortlists: give their length, --rerank K")
    if opt.rerank is None:
        return
    if len(opt.checkpoint) != 1 or opt.checkpoint[0].endswith(".npy") or opt.embeddings:
        raise InputError("--rerank: give one checkpoint; an ensemble or a matrix has no shortlist")
    others = sorted(given - TAKEN)
    if others:
        raise InputError(
            f"--rerank does not go with --{', --'.join(others)}: it scores only some pairs, and "
            "prints the recalls of the whole split"
        )


@torch.inference_mode()
def rerank(
    model_path: str, k: int, first_stage: str | None = None, **where
) -> tuple[dict, tuple[int, int]]:
    """Print and return the metrics of two stages, as evalrank returns them, and (N, M).

    `k` is the length of the shortlists, `first_stage` another checkpoint that makes them; `where`
    are arguments of scoring.encode_split. If k is at least N and M, the metrics are those of
    evalrank. Raises InputError.
    """
    if world_size() > 1:
        raise InputError("--rerank: it works in one process; start it without torchrun")
    if k < 1:
        raise InputError(f"--rerank {k}: expected at least 1")
    model, split, images, captions = encode_split(model_path, **where)
    image_of, dataset = rank_by(split.dataset), split.dataset
    if image_of is None:
        raise InputError("--rerank: captions with several candidate images are not supported")
    own = images, captions
    if first_stage is not None:
        _, other, *own = encode_split(first_stage, **where)
        same = torch.equal(other.dataset.rows, dataset.rows)
        if not same or other.dataset.n_captions != dataset.n_captions:
            raise InputError(
                f"{first_stage}: its model reads other images or captions than {model_path}"
            )
    first = first_scores(*own)  # (N, M)
    lists = first_of(first, k, 1), first_of(first, k, 0)  # (N, M) each: i2t, t2i
    scores = listed_scores(model, images, captions, lists[0] | lists[1])  # (N, M)
    pairs = image_of.numpy(), np.arange(dataset.n_captions)
    ways, said = {}, []
    for way, rank, listed in zip(("i2t", "t2i"), (i2t, t2i), lists, strict=True):
        exact, alone = (
            rank(x, True, image_of)[1][0] for x in (np.where(listed, scores, NOT_SCORED), first)
        )
        found = listed[pairs]  # (M,) whether the right pair is in the shortlist
        if way == "i2t":  # (N,) whether that of any caption is
            found = np.bincount(pairs[0], found, dataset.n_images) > 0
        ways[way] = metrics_of_ranks(np.where(found, exact, alone))
        said.append(f"{way} {100 * found.mean():.1f} %")
    share = 100 * (lists[0] | lists[1]).mean()
    print(f"Two stages: shortlists of {k}, {share:.1f} % of all pairs scored")
    print(f"Queries with a right one in the shortlist: {', '.join(said)}")
    metrics = with_sums(ways)
    print_metrics(metrics)
    return metrics, first.shape


def first_scores(images: Encoding, captions: list[Encoding]) -> np.ndarray:
    """The scores (N, M) of the first stage."""
    index = torch.cat([group["index"] for group in captions])  # (M,)
    vectors = torch.cat([pooled_captions(group) for group in captions])  # (M, D), as in index
    vectors = vectors[index.argsort().to(vectors.device)]  # (M, D)
    return (pooled_images(images) @ vectors.mT).cpu().numpy()  # (N, M)


def first_of(scores: np.ndarray, k: int, axis: int) -> np.ndarray:
    """Which of the scores (N, M) are among the k highest along an axis."""
    x = torch.from_numpy(scores)
    best = x.topk(min(k, x.size(axis)), axis).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(axis, best, True).numpy()


def listed_scores(
    model: nn.Module, images: Encoding, captions: list[Encoding], listed: np.ndarray
) -> np.ndarray:
    """The model's scores (N, M) of the pairs `listed` (N, M); 0 for the others."""
    scores = np.zeros(listed.shape, np.float32)
    total = sum(len(group["index"]) for group in captions)
    for caption, column in progress(one_by_one(captions), "scoring", total):
        rows = torch.from_numpy(listed[:, column].nonzero()[0])  # (n,)
        some = {name: x[rows.to(x.device)] for name, x in images.items()}
        scores[rows.numpy(), column] = model.similarity(some, caption)[:, 0].cpu().numpy()
    return scores


def one_by_one(captions: list[Encoding]):
    """Each caption's encoding, with one row, and its number."""
    for group in captions:
        tensors: dict[str, Tensor] = {name: x for name, x in group.items() if name != "index"}
        for place, column in enumerate(group["index"].tolist()):
            yield {name: x[place : place + 1] for name, x in tensors.items()}, column
