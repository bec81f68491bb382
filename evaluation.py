"""Evaluate checkpoints: encode a split once, score it in blocks, print the published Recall@K.

    python evaluation.py runs/x/model_best.pth.tar --data_path data --split test [--fold5]
    python evaluation.py A.pth.tar B.pth.tar ...        # ensemble: the mean of their scores
    python evaluation.py A.npy B.npy [--fold5]          # the same, from matrices of --save_path
    torchrun --nproc_per_node=2 evaluation.py ...       # divided between processes

    import evaluation
    evaluation.evalrank("runs/x/model_best.pth.tar", data_path="data", split="test")

Shapes: N images, M = k N captions.
"""

import argparse
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint as ckpt
import systems
from data import PrecompDataset, collate_fn
from metrics import (  # noqa: F401  (people import i2t and t2i from here)
    METRICS,
    i2t,
    mean_metrics,
    numbers,
    print_beside_paper,
    print_metrics,
    retrieval_metrics,
    t2i,
)
from pairs import Encoding, length_groups
from util.cli import InputError, progress, run
from util.devices import pick_device, to_device
from util.distributed import all_reduce_sum, process_group, rank, world_size
from util.plain_pickle import load_objects

FOLDS = 5


@torch.inference_mode()
def encode_data(
    model: nn.Module, dataset: PrecompDataset, batch_size: int = 128
) -> tuple[Encoding, list[Encoding]]:
    """Encode each image and each caption of a dataset once, on the model's device (Q6).

    Returns the images, with N rows, and the captions as a list with one encoding per length, so
    that there is no padding. Each encoding holds the positions of its captions as 'index'. With
    several processes, each encodes all images, which is little work, and its share of the captions.
    """
    model.eval()
    device = next(model.parameters()).device

    def encode(encoder, item, parts: list[Tensor]) -> Encoding:
        encoded = []
        for part in parts:
            batch = collate_fn([item(number) for number in part.tolist()])
            encoded.append(encoder(to_device(batch, device)))
        return {name: torch.cat([x[name] for x in encoded]) for name in encoded[0]}

    parts = progress(torch.arange(dataset.n_images).split(batch_size), "encoding images")
    images = encode(model.encode_images, dataset.image_item, parts)

    captions, dealt = [], 0
    groups = list(length_groups(dataset.lengths[: dataset.n_captions]))
    for _, where in progress(groups, "encoding captions"):
        parts = where.split(batch_size)
        # The batches are dealt out in turn, so that each process gets captions of all lengths.
        mine = parts[(rank() - dealt) % world_size() :: world_size()]
        dealt += len(parts)
        if mine:
            encoding = encode(model.encode_captions, dataset.caption_item, mine)
            captions.append(encoding | {"index": torch.cat(mine)})
    return images, captions


@torch.inference_mode()
def score_matrix(
    model: nn.Module,
    images: Encoding,
    captions: list[Encoding],
    folds: int = 1,
    n_captions: int | None = None,
) -> np.ndarray:
    """Scores (N, M), float32, of all encoded images and captions.

    With `folds` > 1, only the pairs within each of `folds` equal parts are scored; the other scores
    are 0. The scores of captions that another process holds are 0 too; `n_captions`, M, counts
    these captions as well.
    """
    n_images = len(next(iter(images.values())))
    n_captions = n_captions or sum(len(group["index"]) for group in captions)
    scores = np.zeros((n_images, n_captions), dtype=np.float32)
    for fold in range(folds):
        rows, columns = fold_slices(n_images, n_captions, fold, folds)
        of_fold = {name: x[rows] for name, x in images.items()}
        for group in progress(captions, "scoring"):
            mask = (group["index"] >= columns.start) & (group["index"] < columns.stop)  # (c,)
            if not mask.any():
                continue
            index = group["index"][mask]
            chosen = {name: x[mask.to(x.device)] for name, x in group.items() if name != "index"}
            block = model.similarity(of_fold, chosen)  # (n, c)
            scores[rows, index.numpy()] = block.cpu().numpy()
    return scores


def fold_slices(n_images: int, n_captions: int, fold: int, folds: int) -> tuple[slice, slice]:
    """Slices of images and captions for one of `folds` equal parts (published: 1,000 of 5,000)."""
    n = min(n_images, n_captions)
    first, last = fold * n // folds, (fold + 1) * n // folds
    return tuple(slice(total // n * first, total // n * last) for total in (n_images, n_captions))


def encode_split(
    model_path: str,
    data_path: str | None,
    split: str,
    vocab_path: str | None,
    device: torch.device,
    batch_size: int | None,
    folds: int = 1,
    published: dict | None = None,
) -> tuple[nn.Module, PrecompDataset, Encoding, list[Encoding]]:
    """Load a checkpoint, and encode a split with its model; see evalrank and encode_data."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected at least 1")
    model, vocab, opt = ckpt.load_model(model_path, vocab_path, device)
    print("Loading dataset")
    folder = systems.of(opt).find_data(data_path or opt.data_path, opt.data_name)
    dataset = systems.open_split(folder, split, vocab, opt, published)
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
    images: Encoding,
    captions: list[Encoding],
    folds: int = 1,
) -> np.ndarray:
    """The score matrix (N, M) of an encoded split, summed over all processes."""
    start = time.time()
    scores = score_matrix(model, images, captions, folds, dataset.n_captions)
    all_reduce_sum(torch.from_numpy(scores))
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
    """Evaluate a checkpoint, or the mean score of several (Q40), and print the published lines.

    `data_path` holds the folder `data_name` of the checkpoint's options; by default it is the
    `data_path` of these options. With `fold5`, the metrics are means over five equal parts of the
    split (COCO 1K, if it is testall), and 'folds' holds the metrics of each part (Q1). Without it,
    testall gives COCO 5K. `save_path` is a .npy file for the score matrix (n_images, n_captions),
    float32, complete even with fold5. `batch_size` only bounds the memory of the encoders.
    `published_boxes` is for GSMN: it scores with the boxes of the published evaluation, to compare
    with its figures. These boxes are divided until they are almost zero and, without fold5, are
    those of other images (Q9).

    Returns {'i2t': {'r1', 'r5', 'r10', 'medr', 'meanr'}, 't2i': {...}, 'ar', 'ari', 'rsum'}, with
    recalls in percent and ranks from 1. Raises FileNotFoundError or ValueError with the fault.
    """
    paths = [model_path] if isinstance(model_path, (str, os.PathLike)) else list(model_path)
    if not paths:
        raise InputError("no checkpoint to evaluate")
    if save_path and (
        os.path.isdir(save_path) or not os.path.isdir(os.path.dirname(save_path) or ".")
    ):
        raise InputError(f"{save_path}: expected a file in an existing folder; nothing was scored")
    for path in map(os.fspath, paths if published_boxes else []):
        system = systems.of(ckpt.load(path)["opt"])
        if system.published_dataset is None:
            raise InputError(f"{path}: a {system.name} model; published_boxes is for GSMN")
    published = {"fold5": fold5} if published_boxes else None
    folds = FOLDS if fold5 else 1
    device = pick_device(device)
    scores = None
    for path in map(os.fspath, paths):
        where = path, data_path, split, vocab_path, device, batch_size, folds
        part = split_scores(*encode_split(*where, published), 1 if save_path else folds)
        if scores is not None and part.shape != scores.shape:
            raise InputError(
                f"{path}: scores {part.shape} images x captions, the models before it "
                f"{scores.shape}; an ensemble needs one dataset"
            )
        scores = part if scores is None else scores + part
    scores /= len(paths)
    if save_path and rank() == 0:
        with open(save_path, "wb") as file:  # np.save would append .npy to any other name
            np.save(file, scores)
    # More images than captions: several candidate images per caption; see WholeDataset.
    return rank_and_print(scores, fold5, scores.shape[0] > scores.shape[1])


def mean_scores(paths: str | Sequence[str]) -> np.ndarray:
    """The mean of saved score matrices (images, captions).

    The files are those that evalrank writes to `save_path`, or those that the published programs
    dumped. Raises FileNotFoundError or ValueError that names the file that does not fit.
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

    See mean_scores for the files, and retrieval_metrics for `candidates`. Returns the same dict as
    evalrank.
    """
    scores = mean_scores(paths)
    if fold5 and min(scores.shape) < FOLDS:
        raise InputError(f"scores of shape {scores.shape}, too few for five folds")
    return rank_and_print(scores, fold5, candidates)


def rank_and_print(scores: np.ndarray, fold5: bool, candidates: bool) -> dict:
    """Print and return the metrics of a score matrix, or their means over five parts of it."""
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Recall@K of a checkpoint, or of the mean score of several.", allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="a model, the models of an ensemble, or saved score matrices (.npy)",
    )
    parser.add_argument("--data_path", help="folder that holds the data; default: as in training")
    parser.add_argument("--split", default="test", help="dev | test (default) | testall")
    parser.add_argument("--fold5", action="store_true", help="mean over five parts (COCO 1K)")
    parser.add_argument("--vocab_path", help="folder of the vocabulary; default: as in training")
    parser.add_argument("--save_path", help="write the score matrix here (.npy)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--batch_size", type=int, help="for the encoders; default: as in training")
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
        help="a paper's six recalls, to print above those of the checkpoint",
    )
    opt = vars(parser.parse_args(argv))
    paper = opt.pop("paper")
    matrices = [path.endswith(".npy") for path in opt["checkpoint"]]
    if any(matrices):
        given = {n for n, x in opt.items() if x != parser.get_default(n)} - {"checkpoint", "fold5"}
        if not all(matrices) or given:
            parser.error(
                "score matrices (.npy) cannot be mixed with checkpoints, and take only --fold5 "
                "and --paper"
            )
        metrics = eval_ensemble(opt["checkpoint"], opt["fold5"])
        if paper:
            print_beside_paper(metrics, paper)
        return
    opt["device"] = pick_device(opt["device"])
    with process_group(opt["device"]):
        metrics = evalrank(opt.pop("checkpoint"), **opt)
        if paper:
            print_beside_paper(metrics, paper)


if __name__ == "__main__":
    run(main)
