"""Encode once, score in blocks, rank: the published Recall@K tables.

    python evaluation.py runs/x/model_best.pth.tar --data_path data --split test [--fold5]
    python evaluation.py A.pth.tar B.pth.tar ...        # ensemble: the mean of their score matrices
    python evaluation.py A.npy B.npy [--fold5]          # the same of matrices saved by --save_path
    torchrun --nproc_per_node=2 evaluation.py ...       # shared among processes

    import evaluation
    evaluation.evalrank("runs/x/model_best.pth.tar", data_path="data", split="test")

Letters: N images, M = k N captions. A wrong candidate that scores the same ranks first: ties cost
the model.
"""

import argparse
import math
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint as ckpt
from data import PrecompDataset, collate_fn, open_split
from pairs import length_groups
from util.cli import InputError, progress, run
from util.distributed import add_up, joined, rank, world
from util.plain_pickle import load_objects

METRICS = ("r1", "r5", "r10", "medr", "meanr")
FOLDS = 5


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of a name; 'auto' or None is CUDA where there is one, its own to each process."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
                raise InputError(
                    f"--device {name}: each process takes a GPU of its own; give --device cuda"
                )
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on the device; lengths stay on the host, where packing and grouping read them."""
    return {
        name: x if name == "lengths" else x.to(device, non_blocking=True)
        for name, x in batch.items()
    }


@torch.inference_mode()
def encode_data(
    model: nn.Module, dataset: PrecompDataset, batch_size: int = 128
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Encode each image and each caption of a dataset once, on the model's device.

    Returns the images, a dict of tensors with N rows, and the captions, a list of such dicts, one
    for each length (so no padding), each with the captions' positions as 'index'. Of several
    processes each encodes all images, which is little work, and its share of the captions.
    """
    model.eval()
    device = next(model.parameters()).device

    def encode(encoder, item, parts: list[Tensor]) -> dict[str, Tensor]:
        encoded = []
        for some in parts:
            batch = collate_fn([item(number) for number in some.tolist()])
            encoded.append(encoder(to_device(batch, device)))
        return {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}

    parts = progress(torch.arange(dataset.n_images).split(batch_size), "encoding images")
    images = encode(model.encode_images, dataset.image_item, parts)

    captions, dealt = [], 0
    groups = list(length_groups(dataset.lengths[: dataset.n_captions]))
    for _, where in progress(groups, "encoding captions"):
        parts = where.split(batch_size)
        # The batches are dealt out in turn, so that each process gets captions of all lengths.
        mine = parts[(rank() - dealt) % world() :: world()]
        dealt += len(parts)
        if mine:
            encoding = encode(model.encode_captions, dataset.caption_item, mine)
            captions.append(encoding | {"index": torch.cat(mine)})
    return images, captions


@torch.inference_mode()
def score_matrix(
    model: nn.Module,
    images: dict[str, Tensor],
    captions: list[dict[str, Tensor]],
    folds: int = 1,
    n_captions: int | None = None,
) -> np.ndarray:
    """Scores (N, M), float32, of all encoded images and captions.

    With `folds` > 1 only the pairs inside each of that many equal parts are scored, the rest are 0;
    so are those of captions that another process holds, where `n_captions` M counts them too.
    """
    n_images = len(next(iter(images.values())))
    n_captions = n_captions or sum(len(group["index"]) for group in captions)
    scores = np.zeros((n_images, n_captions), dtype=np.float32)
    for fold in range(folds):
        rows, columns = fold_slices(n_images, n_captions, fold, folds)
        some_images = {name: x[rows] for name, x in images.items()}
        for group in progress(captions, "scoring"):
            inside = (group["index"] >= columns.start) & (group["index"] < columns.stop)
            if not inside.any():
                continue
            index = group["index"][inside]
            some = {name: x[inside.to(x.device)] for name, x in group.items() if name != "index"}
            block = model.similarity(some_images, some)  # (n, c)
            scores[rows, index.numpy()] = block.cpu().numpy()
    return scores


def fold_slices(n_images: int, n_captions: int, fold: int, folds: int) -> tuple[slice, slice]:
    """Images, and their captions, of one of `folds` equal parts (published: 1,000 of 5,000)."""
    n = min(n_images, n_captions)
    first, last = fold * n // folds, (fold + 1) * n // folds
    return tuple(slice(many // n * first, many // n * last) for many in (n_images, n_captions))


def _own(scores: np.ndarray) -> tuple[Tensor, Tensor]:
    """Scores as a tensor (N, M), and those of each image with its own k captions (N, k)."""
    scores = torch.as_tensor(np.asarray(scores))
    if scores.ndim != 2 or not len(scores) or scores.shape[1] % len(scores):
        raise InputError(
            f"scores of shape {tuple(scores.shape)}: expected (images, captions) with the same "
            "number of captions for each image"
        )
    if not torch.isfinite(scores).all():
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise InputError(
            f"the score of image {row} and caption {column} is NaN or infinite; it has no rank "
            "(compared as a number it would count as perfect recall)"
        )
    n, m = scores.shape
    return scores, scores.view(n, n, m // n).diagonal().mT


def _metrics(ranks: Tensor) -> dict[str, float]:
    """Recall@K in percent, median and mean rank (from 1) of 0-based ranks."""
    metrics = {f"r{k}": 100.0 * int((ranks < k).sum()) / len(ranks) for k in (1, 5, 10)}
    ranks = ranks.numpy()
    return metrics | {
        "medr": float(np.floor(np.median(ranks)) + 1),
        "meanr": float(ranks.mean() + 1),
    }


def i2t(scores: np.ndarray, return_ranks: bool = False):
    """Image to text: rank of the best of each image's captions among all captions.

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
    """Text to image: rank of each caption's image among all images; see i2t."""
    scores, own = _own(scores)
    ranks = (scores >= own.reshape(1, -1)).sum(0) - 1  # (M,)
    if return_ranks:
        return _metrics(ranks), (ranks.numpy(), scores.argmax(0).numpy())
    return _metrics(ranks)


def retrieval_metrics(scores: np.ndarray, candidates: bool = False) -> dict:
    """Both directions, their mean recalls `ar` and `ari`, and `rsum`, the sum of the six.

    With `candidates` each caption has several images, scores (k M, M): then a caption's rank is
    that of the best of its images, and an image has one caption.
    """
    if candidates:  # captions are to images what images are to captions otherwise
        ways = {"i2t": t2i(np.transpose(scores)), "t2i": i2t(np.transpose(scores))}
    else:
        ways = {"i2t": i2t(scores), "t2i": t2i(scores)}
    recalls = {way: [m["r1"], m["r5"], m["r10"]] for way, m in ways.items()}
    return ways | {
        "ar": sum(recalls["i2t"]) / 3,
        "ari": sum(recalls["t2i"]) / 3,
        "rsum": sum(recalls["i2t"]) + sum(recalls["t2i"]),
    }


def average_precision(
    scores: Sequence[Sequence[float]],
    relevant: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 2, 3),
) -> dict[str, float]:
    """MAP@k and A@k of queries with judged candidates, as published for Tencent-News.

    For each query the scores of its candidates, and 1 where a candidate is relevant, else 0. For
    the queries that have at least k relevant candidates AP@k = (1 / k) sum_{i <= k} (relevant among
    the first i) / i, and 'map@k' is its mean; 'a@k' is the part of their first k that is relevant,
    all these queries taken together; 'queries@k' is how many they are. Beside them 'map', the usual
    one: the mean, over queries with a relevant candidate, of the precision at each relevant one.
    All from 0 to 1 (NaN where there is no such query). Of equal scores, irrelevant candidates rank
    first. Raises InputError on NaN and on flags not 0 or 1.
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
    """Mean scores of several models' candidates, query by query, for average_precision.

    A model gives a dict of scores by candidate for each query. A candidate that not all models
    score gets the mean of those that do. Published weights: 1, 1 and 1.5.
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"{len(models)} models with weights {weights}: expected one above 0 each")
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


def mean_metrics(folds: list[dict]) -> dict:
    """Metrics averaged by name over folds."""
    return {
        name: mean_metrics([fold[name] for fold in folds])
        if isinstance(value, dict)
        else sum(fold[name] for fold in folds) / len(folds)
        for name, value in folds[0].items()
    }


def numbers(metrics: dict[str, float], separator: str) -> str:
    """One direction's five numbers in the published order and precision."""
    return separator.join(f"{metrics[name]:.1f}" for name in METRICS)


def print_metrics(metrics: dict) -> None:
    """The published lines."""
    print(f"rsum: {metrics['rsum']:.1f}")
    print(f"Average i2t Recall: {metrics['ar']:.1f}")
    print(f"Image to text: {numbers(metrics['i2t'], ' ')}")
    print(f"Average t2i Recall: {metrics['ari']:.1f}")
    print(f"Text to image: {numbers(metrics['t2i'], ' ')}")


def find_data(data_path: str, data_name: str, system: str = "scan") -> str:
    """The folder of a dataset: `data_path`/`data_name` from here, or from the project's folder.

    CHAN's, as published: `data_path` is itself the dataset's folder, of the name `data_name`, and
    holds precomp/, or there is a folder `data_path`_precomp beside it. And as SCAN's data is laid
    out, `data_path`/`data_name`_precomp.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    names = [data_name, f"{data_name}_precomp"] if system == "chan" else [data_name]
    tried = [os.path.join(root, data_path, name) for root in ("", here) for name in names]
    bare = os.path.normpath(data_path)
    if system == "chan" and os.path.basename(bare) == data_name:
        tried += [os.path.join(bare, "precomp"), f"{bare}_precomp"]
    for place in tried:
        if os.path.isdir(place):
            return place
    raise FileNotFoundError(f"{tried[0]}: no such data folder; give --data_path its parent")


def encode_split(
    model_path: str,
    data_path: str | None,
    split: str,
    vocab_path: str | None,
    device: torch.device,
    batch_size: int | None,
    folds: int = 1,
    **published,
) -> tuple[nn.Module, PrecompDataset, dict[str, Tensor], list[dict[str, Tensor]]]:
    """A checkpoint's model, and a split in its encoding; see evalrank and encode_data."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected at least 1")
    model, vocab, opt = ckpt.load_model(model_path, vocab_path, device)
    print("Loading dataset")
    folder = find_data(data_path or opt.data_path, opt.data_name, opt.model)
    if published:
        published["published_boxes"] = opt.batch_size
    dataset = open_split(folder, split, vocab, opt, **published)
    fewest = min(dataset.n_images, dataset.n_captions)
    if folds > fewest:
        raise InputError(
            f"{folder}: {fewest} images or captions of {split}, too few for five folds"
        )
    print("Computing results...")
    images, captions = encode_data(model, dataset, batch_size or opt.batch_size)
    print(f"Images: {dataset.n_images}, Captions: {dataset.n_captions}")
    return model, dataset, images, captions


def split_scores(
    model: nn.Module,
    dataset: PrecompDataset,
    images: dict[str, Tensor],
    captions: list[dict[str, Tensor]],
    folds: int = 1,
) -> np.ndarray:
    """Score matrix (N, M) of an encoded split, of all processes; see score_matrix."""
    start = time.time()
    scores = score_matrix(model, images, captions, folds, dataset.n_captions)
    add_up(torch.from_numpy(scores))
    print(f"calculate similarity time: {time.time() - start:.1f}")
    return scores


def evalrank(
    model_path: str | Sequence[str],
    data_path: str | None = None,
    split: str = "dev",
    fold5: bool = False,
    vocab_path: str | None = None,
    save_path: str | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    published_boxes: bool = False,
) -> dict:
    """Evaluate a checkpoint, or the mean score of several, and print the published lines.

    `data_path` holds the folder `data_name` of the checkpoint's options and defaults to theirs.
    With `fold5` the metrics are means over five equal parts of the split (COCO 1K of testall), and
    the parts stand under 'folds'; without it testall is COCO 5K. `save_path` writes the score
    matrix (n_images, n_captions), whole even with fold5, as float32 .npy. `batch_size` only bounds
    the encoders' memory. `published_boxes` gives GSMN the boxes that its published evaluation uses,
    divided until they are all but zero and, without fold5, those of other images, to compare with
    figures taken so.

    Returns {'i2t': {'r1', 'r5', 'r10', 'medr', 'meanr'}, 't2i': {...}, 'ar', 'ari', 'rsum'},
    recalls in percent, ranks from 1. Raises FileNotFoundError or ValueError naming what is wrong.
    """
    paths = [model_path] if isinstance(model_path, (str, os.PathLike)) else list(model_path)
    if not paths:
        raise InputError("no checkpoint to evaluate")
    if save_path and (
        os.path.isdir(save_path) or not os.path.isdir(os.path.dirname(save_path) or ".")
    ):
        raise InputError(f"{save_path}: not a file in a folder that exists; nothing was scored")
    for path in map(os.fspath, paths if published_boxes else []):
        system = ckpt.load(path)["opt"].model
        if system != "gsmn":
            raise InputError(f"{path}: a {system} model; published_boxes is for GSMN")
    published = {"published_folds": fold5} if published_boxes else {}
    folds = FOLDS if fold5 else 1
    device = pick_device(device)
    scores = None
    for path in map(os.fspath, paths):
        where = path, data_path, split, vocab_path, device, batch_size, folds
        part = split_scores(*encode_split(*where, **published), 1 if save_path else folds)
        if scores is not None and part.shape != scores.shape:
            raise InputError(
                f"{path}: scores {part.shape} images x captions, the models before it "
                f"{scores.shape}; an ensemble needs one dataset"
            )
        scores = part if scores is None else scores + part
    scores /= len(paths)
    if save_path and rank() == 0:
        with open(save_path, "wb") as file:  # np.save would append .npy to another name
            np.save(file, scores)
    # Only a split that says so has several images a caption; see WholeDataset.
    return rank_and_print(scores, fold5, scores.shape[0] > scores.shape[1])


def mean_scores(paths: str | Sequence[str]) -> np.ndarray:
    """The mean of saved score matrices (images, captions).

    Files as `save_path` of evalrank writes them, or as the published programs dumped them. Raises
    FileNotFoundError or ValueError naming the file that does not fit.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    scores = None
    for path in map(os.fspath, paths):
        part = load_objects(path)
        if part.dtype == object and part.shape == ():  # CHAN's: {'npts': images, 'sims': scores}
            whole = part.item()
            part = np.asarray(whole.get("sims") if isinstance(whole, dict) else None)
        if part.ndim != 2 or part.dtype.kind != "f" or 0 in part.shape:
            raise InputError(
                f"{path}: {part.dtype} of shape {part.shape}, expected scores (images, captions)"
            )
        if scores is not None and part.shape != scores.shape:
            raise InputError(
                f"{path}: scores {part.shape} images x captions, the files before it {scores.shape}"
            )
        scores = part.astype(np.float64) if scores is None else scores + part
    if scores is None:
        raise InputError("no score matrix to evaluate")
    return scores / len(paths)


def eval_ensemble(
    paths: str | Sequence[str], fold5: bool = False, candidates: bool = False
) -> dict:
    """Rank by the mean of saved score matrices, and print the published lines.

    See mean_scores for the files, and retrieval_metrics for `candidates`. Returns what evalrank
    does.
    """
    scores = mean_scores(paths)
    if fold5 and min(scores.shape) < FOLDS:
        raise InputError(f"scores of shape {scores.shape}, too few for five folds")
    return rank_and_print(scores, fold5, candidates)


def rank_and_print(scores: np.ndarray, fold5: bool, candidates: bool) -> dict:
    """Metrics of a score matrix, or the mean over five parts of it, in the published lines."""
    if not fold5:
        metrics = retrieval_metrics(scores, candidates)
        print_metrics(metrics)
        return metrics

    results = []
    for fold in range(FOLDS):
        metrics = retrieval_metrics(scores[fold_slices(*scores.shape, fold, FOLDS)], candidates)
        print(f"Image to text: {numbers(metrics['i2t'], ', ')}")
        print(f"Text to image: {numbers(metrics['t2i'], ', ')}")
        print(f"rsum: {metrics['rsum']:.1f} ar: {metrics['ar']:.1f} ari: {metrics['ari']:.1f}")
        results.append(metrics)
    print("-----------------------------------")
    print("Mean metrics: ")
    metrics = mean_metrics(results)
    print_metrics(metrics)
    return metrics | {"folds": results}


def print_beside_paper(metrics: dict, paper: list[float]) -> None:
    """Ours under the paper's six recalls, NaN where one is not known, as a table."""
    ours = [metrics[way][name] for way in ("i2t", "t2i") for name in METRICS[:3]]
    head = [f"{way} R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    print(" " * 8 + "".join(f"{name:>10}" for name in head))
    for name, row in (("paper", paper), ("ours", ours)):
        cells = ("-" if math.isnan(value) else f"{value:.1f}" for value in row)
        print(f"{name:<8}" + "".join(f"{cell:>10}" for cell in cells))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Recall@K of a checkpoint, or of the mean score of several.", allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="one model, or the models of an ensemble; or their saved score matrices (.npy)",
    )
    parser.add_argument("--data_path", help="folder that holds the data; default: as in training")
    parser.add_argument("--split", default="test", help="dev | test (default) | testall")
    parser.add_argument("--fold5", action="store_true", help="mean over five parts (COCO 1K)")
    parser.add_argument("--vocab_path", help="folder of the vocabulary; default: as in training")
    parser.add_argument("--save_path", help="write the score matrix here (.npy)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--batch_size", type=int, help="of the encoders; default: as in training")
    parser.add_argument(
        "--published_boxes",
        action="store_true",
        help="GSMN: score with the boxes of the published evaluation, to compare with its figures",
    )
    parser.add_argument(
        "--paper",
        type=float,
        nargs=6,
        metavar="R",
        help="a paper's six recalls to print beside ours",
    )
    opt = vars(parser.parse_args(argv))
    paper = opt.pop("paper")
    matrices = [path.endswith(".npy") for path in opt["checkpoint"]]
    if any(matrices):
        given = {n for n, x in opt.items() if x != parser.get_default(n)} - {"checkpoint", "fold5"}
        if not all(matrices) or given:
            parser.error(
                "score matrices (.npy) go with each other and with --fold5 and --paper only"
            )
        metrics = eval_ensemble(opt["checkpoint"], opt["fold5"])
        if paper:
            print_beside_paper(metrics, paper)
        return
    opt["device"] = pick_device(opt["device"])
    with joined(opt["device"]):
        metrics = evalrank(opt.pop("checkpoint"), **opt)
        if paper:
            print_beside_paper(metrics, paper)


if __name__ == "__main__":
    run(main)
