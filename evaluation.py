"""Evaluate checkpoints: encode a split once, score it in blocks, print the published Recall@K.

    python evaluation.py runs/x/model_best.pth.tar --data_path data --split test [--fold5]
    python evaluation.py A.pth.tar B.pth.tar ...        # ensemble: the mean of their scores
    python evaluation.py A.npy B.npy [--fold5]          # the same, from matrices of --save_path
    torchrun --nproc_per_node=2 evaluation.py ...       # divided between processes

    import evaluation
    evaluation.evalrank("runs/x/model_best.pth.tar", data_path="data", split="test")

Shapes: N images, M captions.
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import checkpoint as ckpt
import systems
from caption_images import USUAL
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
from ranking import FOLDS, PUBLISHED_FOLD, Ranking
from score_files import check_target, mean_scores, read_mean, save_scores  # noqa: F401
from scoring import (  # noqa: F401
    encode_data,
    encode_split,
    fold_parts,
    fold_slices,
    print_counts,
    rank_by,
    score_matrix,
    split_scores,
)
from util.cli import InputError, run
from util.devices import pick_device
from util.distributed import process_group, rank
from vocab import read_captions

OUTPUTS = "json", "csv", "trec", "report", "images"  # options of the command line: files to write
# Those that encode_split takes.
OF_SPLIT = "data_path data_name split vocab_path batch_size keep_empty_regions".split()
# Those that go with saved score matrices.
OF_FILES = {"checkpoint", "fold5", "paper", "paper_images", *OUTPUTS}


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
    data_name: str | None = None,
    keep_empty_regions: bool = False,
) -> dict:
    """Evaluate a checkpoint, or the mean score of several (Q40), and print the published lines.

    `data_path` holds the folder `data_name`; by default both are those of the checkpoint's options.
    With `fold5`, the metrics are means over five equal parts of the split (COCO 1K, if it is
    testall), and 'folds' holds the metrics of each part (Q1). Without it, testall gives COCO 5K.
    `save_path` is a .npy file for the score matrix (n_images, n_captions), float32, complete even
    with fold5; see score_files.py. `batch_size` only bounds the memory of the encoders.
    `published_boxes` is for GSMN: it scores with the boxes of the published evaluation, to compare
    with its figures. These boxes are divided until they are almost zero and, without fold5, are
    those of other images (Q9). `keep_empty_regions` scores filling too: see PrecompDataset.

    Returns {'i2t': {'r1', 'r5', 'r10', 'medr', 'meanr'}, 't2i': {...}, 'ar', 'ari', 'rsum'}, with
    recalls in percent and ranks from 1. Raises FileNotFoundError or ValueError with the fault.
    """
    where = {"data_path": data_path, "data_name": data_name, "split": split}
    how = {"vocab_path": vocab_path, "device": pick_device(device), "batch_size": batch_size}
    where |= how | {"keep_empty_regions": keep_empty_regions}
    return rank_models(as_list(model_path), fold5, save_path, published_boxes, **where).metrics


def as_list(paths: str | Sequence[str]) -> list[str]:
    """One path or several, with `~` for the home folder."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return [os.path.expanduser(path) for path in paths]


def rank_models(
    paths: Sequence[str],
    fold5: bool,
    save_path: str | None,
    published_boxes: bool,
    keep_parts: bool = False,
    **where,
) -> Ranking:
    """Rank by the mean scores of checkpoints.

    `where` are arguments of encode_split. `keep_parts`: keep the scores of each checkpoint too. For
    the others see evalrank.
    """
    if not paths:
        raise InputError("no checkpoint to evaluate")
    if save_path:
        save_path = os.path.expanduser(save_path)
        check_target(save_path)
    for path in paths if published_boxes else []:
        system = systems.of(ckpt.load(path)["opt"])
        if system.published_dataset is None:
            raise InputError(f"{path}: a {system.name} model; published_boxes is for GSMN")
    published = {"fold5": fold5} if published_boxes else None
    folds = FOLDS if fold5 else 1
    scores = image_of = None
    parts, splits = [], []
    for path in paths:
        encoded = encode_split(path, folds=folds, published=published, **where)
        part, split = split_scores(*encoded, 1 if save_path else folds), encoded[1]
        of = rank_by(split.dataset)
        if scores is not None and (part.shape != scores.shape or not same(of, image_of)):
            raise InputError(
                f"{path}: scores {part.shape} images x captions, the models before it "
                f"{scores.shape}; an ensemble needs one dataset"
            )
        scores, image_of = part if scores is None else scores + part, of
        splits.append(split)
        if keep_parts and len(paths) > 1:
            parts.append(part)
    if len(paths) > 1:
        scores /= len(paths)
    if save_path and rank() == 0:
        save_scores(save_path, scores, image_of)
    image_of = None if image_of is None else image_of.numpy()
    # More images than captions: several candidate images per caption; see WholeDataset.
    candidates, dataset = scores.shape[0] > scores.shape[1], splits[0].dataset
    more = {"ids": dataset.ids, "parts": parts, "splits": splits}
    more["captions"] = read_captions(dataset.caption_path)[: dataset.n_captions]
    return rank_scores(list(paths), scores, image_of, fold5, candidates, **more)


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


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def eval_ensemble(
    paths: str | Sequence[str], fold5: bool = False, candidates: bool = False
) -> dict:
    """Rank by the mean of saved score matrices, and print the published lines.

    See score_files.py for the files, and retrieval_metrics for `candidates`. Returns the same dict
    as evalrank.
    """
    return rank_files(as_list(paths), fold5, candidates).metrics


def rank_files(
    paths: Sequence[str], fold5: bool, candidates: bool = False, keep_parts: bool = False
) -> Ranking:
    """As rank_models, by the mean of saved score matrices; see eval_ensemble."""
    scores, image_of = read_mean(paths)
    if fold5 and min(scores.shape) < FOLDS:
        raise InputError(f"scores of shape {scores.shape}, too few for five folds")
    for path in paths:
        print(f"Scores: {path}")
    print_counts(scores.shape, image_of)
    several = keep_parts and len(paths) > 1
    parts = [mean_scores(path) for path in paths] if several else []
    return rank_scores(list(paths), scores, image_of, fold5, candidates, parts=parts)


def rank_and_print(
    scores: np.ndarray,
    fold5: bool,
    candidates: bool,
    image_of: Sequence[int] | None = None,
) -> dict:
    """Print and return the metrics of scores (N, M), or their means over five parts of them.

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
    print(f"Five folds of {n:,} images each")
    if n != PUBLISHED_FOLD:
        print(
            f"notice: this is not the published protocol (COCO 1K), whose folds are "
            f"{PUBLISHED_FOLD:,} images of testall: recalls among {n:,} images do not compare"
        )
    print("-----------------------------------")
    print("Mean metrics: ")
    metrics = mean_metrics(results)
    print_metrics(metrics)
    return metrics | {"folds": results}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Recall@K of a checkpoint, or of the mean score of several.", allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="a model, the models of an ensemble, or saved score matrices (.npy)",
    )
    parser.add_argument("--data_path", help="folder that holds the data; default: as in training")
    parser.add_argument(
        "--data_name", help="another data set than that of the training, e.g. coco_precomp"
    )
    parser.add_argument("--split", default="test", help="dev | test (default) | testall")
    parser.add_argument("--fold5", action="store_true", help="mean over five parts (COCO 1K)")
    parser.add_argument(
        "--vocab_path", help="folder of the vocabulary, or its file; default: as in training"
    )
    parser.add_argument("--save_path", help="write the score matrix here (.npy)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--batch_size", type=int, help="for the encoders; default: as in training")
    parser.add_argument(
        "--published_boxes",
        action="store_true",
        help="GSMN: score with the boxes of the published evaluation, to compare with its figures",
    )
    parser.add_argument(
        "--keep_empty_regions",
        action="store_true",
        help="score the regions that only fill up an image, as the published programs do",
    )
    parser.add_argument(
        "--paper",
        type=float,
        nargs=6,
        metavar="R",
        help="a paper's six recalls, to print above those of the checkpoint",
    )
    parser.add_argument(
        "--paper_images",
        type=int,
        metavar="N",
        help="images among which the paper ranks, with 5 captions each; where others are ranked, "
        "--paper is not printed",
    )
    group = parser.add_argument_group("files for other tools, and a page to read")
    group.add_argument("--json", metavar="FILE", help="figures, their 95 %% intervals, versions")
    group.add_argument("--csv", metavar="FILE", help="a line per direction with the figures")
    group.add_argument(
        "--trec", metavar="PREFIX", help="PREFIX.i2t.run, PREFIX.i2t.qrels, and those of t2i"
    )
    group.add_argument(
        "--report",
        metavar="FILE",
        help="one HTML page: intervals, curves, best and worst queries; of several checkpoints, "
        "also the differences between them",
    )
    group.add_argument(
        "--images", metavar="FOLDER", help="photos for the report, named by {split}_ids.txt"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    opt = parser.parse_args(argv)
    paths, matrices = as_list(opt.checkpoint), [path.endswith(".npy") for path in opt.checkpoint]
    given = {n for n, x in vars(opt).items() if x != parser.get_default(n)}
    if any(matrices) and (not all(matrices) or given - OF_FILES):
        parser.error(
            "score matrices (.npy) cannot be mixed with checkpoints, and take only --"
            f"{', --'.join(sorted(OF_FILES - {'checkpoint'}))}"
        )
    check_outputs(opt)
    device, compared = pick_device(opt.device), bool(opt.report)
    if any(matrices):
        ranking = rank_files(paths, opt.fold5, keep_parts=compared)
    else:
        where = {name: getattr(opt, name) for name in OF_SPLIT} | {"device": device}
        with process_group(device):
            how = opt.fold5, opt.save_path, opt.published_boxes, compared
            ranking = rank_models(paths, *how, **where)
            if rank() > 0:
                return
    print_paper(opt, ranking.metrics, ranking.scores.shape)
    write_outputs(opt, ranking)


def check_outputs(opt: argparse.Namespace) -> None:
    """Raise InputError, before hours of scoring, if an output cannot be written."""
    for name in OUTPUTS:
        if name != "images" and getattr(opt, name):
            check_target(os.path.expanduser(getattr(opt, name)))
    if opt.images and not opt.report:
        raise InputError("--images: the photos are for --report")
    if opt.images and not os.path.isdir(opt.images):
        raise InputError(f"--images {opt.images}: no such folder")


def write_outputs(opt: argparse.Namespace, ranking: Ranking) -> None:
    """Write the files that the command line asks for."""
    import exports  # these need packages that an evaluation does not

    for name in ("json", "csv", "trec"):
        if getattr(opt, name):
            getattr(exports, f"write_{name}")(os.path.expanduser(getattr(opt, name)), ranking)
    if opt.report:
        import report

        report.write(os.path.expanduser(opt.report), ranking, opt.images)


def print_paper(opt: argparse.Namespace, metrics: dict, shape: tuple[int, int]) -> None:
    """Print the recalls of --paper beside ours, if both rank among as many images and captions."""
    n, m = (total // (FOLDS if opt.fold5 else 1) for total in shape)
    images, has = opt.paper_images, "has folds of" if opt.fold5 else "has"
    if not opt.paper:
        return
    if images not in (None, n):
        print(
            f"The paper's row is not printed: it ranks among {images:,} images, this split {has} "
            f"{n:,}"
        )
    elif images and m != USUAL * images:
        print(
            f"The paper's row is not printed: it ranks {USUAL} captions per image, this split "
            f"{has} {m:,} captions of {n:,} images"
        )
    else:
        print_beside_paper(metrics, opt.paper)


if __name__ == "__main__":
    run(main)
