"""Evaluate checkpoints: encode a split once, score it in blocks, print the published Recall@K.

    python evaluation.py runs/x/model_best.pth.tar --data_path data --split test [--fold5]
    python evaluation.py A.pth.tar B.pth.tar ...        # ensemble: the mean of their scores
    python evaluation.py A.npy B.npy [--fold5]          # the same, from matrices of --save_path
    python evaluation.py --embeddings images.npy texts.npy   # of CLIP or another two-tower model
    torchrun --nproc_per_node=2 evaluation.py ...       # divided between processes

    import evaluation
    evaluation.evalrank("runs/x/model_best.pth.tar", data_path="data", split="test")

Shapes: N images, M captions.
"""

import argparse
import os
from collections.abc import Sequence

import torch
from torch import Tensor

import checkpoint as ckpt
import embeddings
import exports
import outputs
import rerank
import systems
from caption_images import USUAL
from embeddings import rank_embeddings
from metrics import (  # noqa: F401  (people import i2t and t2i from here)
    METRICS,
    i2t,
    mean_metrics,
    print_beside_paper,
    print_metrics,
    retrieval_metrics,
    t2i,
)
from ranking import FOLDS, Ranking, rank_and_print, rank_scores  # noqa: F401
from score_files import (  # noqa: F401
    beside,
    check_matrix_target,
    check_target,
    mean_scores,
    read_mean,
    save_scores,
)
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
from util.arguments import Parser
from util.cli import InputError, run
from util.devices import pick_device
from util.distributed import process_group, rank
from vocab import read_captions

# Options of the command line: files to write, and what belongs to them.
OUTPUTS = "json csv trec report images seeds".split()
# Those that encode_split takes.
OF_SPLIT = "data_path data_name split vocab_path batch_size keep_empty_regions".split()
# Those that go with saved score matrices, and with embeddings.
OF_FILES = {"fold5", "paper", "paper_images", *OUTPUTS}
OF_EMBEDDINGS = OF_FILES | {"ids", "data_path", "data_name", "split", "save_path"}


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
        check_matrix_target(save_path)
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
        if scores.shape[0] > scores.shape[1]:
            print("notice: rank these scores with eval_ensemble(..., candidates=True) only")
    image_of = None if image_of is None else image_of.numpy()
    # More images than captions: several candidate images per caption; see WholeDataset.
    candidates, dataset = scores.shape[0] > scores.shape[1], splits[0].dataset
    more = {"ids": dataset.ids, "parts": parts, "splits": splits}
    more |= {"folder": splits[0].folder, "split": splits[0].name}
    if dataset.text_path:
        more["captions"] = read_captions(dataset.text_path)[: dataset.n_captions]
    return rank_scores(list(paths), scores, image_of, fold5, candidates, **more)


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
    parts: list = []
    scores, image_of = read_mean(paths, parts if keep_parts and len(paths) > 1 else None)
    if fold5 and min(scores.shape) < FOLDS:
        raise InputError(f"scores of shape {scores.shape}, too few for five folds")
    for path in paths:
        print(f"Scores: {path}")
    print_counts(scores.shape, image_of)
    try:
        return rank_scores(list(paths), scores, image_of, fold5, candidates, parts=parts)
    except InputError as error:
        turned = "" if scores.shape[0] <= scores.shape[1] else "; is the matrix transposed?"
        raise InputError(f"{', '.join(paths)}: {error}{turned}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Recall@K of a checkpoint, or of the mean score of several.")
    parser.add_argument(
        "checkpoint",
        nargs="*",
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
    add_embeddings(parser.add_argument_group("embeddings of other models, instead of a checkpoint"))
    add_outputs(parser.add_argument_group("files for other tools, and a page to read"))
    rerank.add_options(parser.add_argument_group("a search in two stages"))
    return parser


def add_embeddings(group) -> None:
    group.add_argument(
        "--embeddings",
        nargs=2,
        metavar=("IMAGES", "TEXTS"),
        help="what any two-tower model (CLIP, SigLIP, VSE) makes of images and captions (.npy, a "
        "row for each), ranked by their cosines; captions stand image by image, unless --ids, or "
        "--data_path and --data_name, say which image each is of",
    )
    group.add_argument(
        "--ids", metavar="FILE", help="a line per caption, the id of its image; or a line per image"
    )


def add_outputs(group) -> None:
    group.add_argument("--json", metavar="FILE", help="figures, their 95 %% intervals, versions")
    group.add_argument(
        "--csv",
        metavar="FILE",
        help="a line per direction with figures and intervals; more lines are added to an older "
        "table",
    )
    group.add_argument(
        "--trec",
        metavar="PREFIX",
        help="PREFIX.i2t.run, PREFIX.i2t.qrels, and those of t2i, for ranx and ir-measures: the "
        f"first {exports.TOP} of each query",
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
    group.add_argument(
        "--seeds",
        metavar="FILE",
        help="curves.json of scripts/compare.py for the report: how far seeds lie apart",
    )


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    outputs.check(opt)
    device = torch.device("cpu") if opt.embeddings else pick_device(opt.device)
    with process_group(device):
        if opt.rerank:
            where = {name: getattr(opt, name) for name in OF_SPLIT} | {"device": device}
            found = rerank.rerank(opt.checkpoint[0], opt.rerank, opt.first_stage, **where)
            print_paper(opt, *found)
            return
        ranking = rank_what_is_given(opt, device)
        if rank() > 0:
            return
    print_paper(opt, ranking.metrics, ranking.scores.shape)
    outputs.write(opt, ranking)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; ends the program if they do not go together."""
    parser = build_parser()
    opt = parser.parse_args(argv)
    opt.checkpoint = as_list(opt.checkpoint)
    matrices = [path.endswith(".npy") for path in opt.checkpoint]
    given = {n for n, x in vars(opt).items() if x != parser.get_default(n)}
    given -= {"checkpoint", "embeddings"}
    rerank.check(opt, given)
    if opt.embeddings and (matrices or given - OF_EMBEDDINGS):
        parser.error(
            "--embeddings takes no checkpoints beside it, and only --"
            f"{', --'.join(sorted(OF_EMBEDDINGS))}"
        )
    if opt.embeddings and "split" in given and not {"data_path", "data_name"} & given:
        parser.error("--split: of which data set? Give --data_path and --data_name")
    if not opt.embeddings and not matrices:
        parser.error("name a checkpoint, or score matrices (.npy), or --embeddings IMAGES TEXTS")
    if opt.ids and not opt.embeddings:
        parser.error("--ids: the ids are for --embeddings")
    if any(matrices) and (not all(matrices) or given - OF_FILES):
        parser.error(
            "score matrices (.npy) cannot be mixed with checkpoints, and take only --"
            f"{', --'.join(sorted(OF_FILES))}"
        )
    return opt


def rank_what_is_given(opt: argparse.Namespace, device: torch.device) -> Ranking | None:
    """Rank checkpoints, score matrices or embeddings; process 0 alone has the last two."""
    paths, compared = opt.checkpoint, bool(opt.report)
    if paths and not paths[0].endswith(".npy"):
        where = {name: getattr(opt, name) for name in OF_SPLIT} | {"device": device}
        how = opt.fold5, opt.save_path, opt.published_boxes, compared
        return rank_models(paths, *how, **where)
    if rank() > 0:
        return None
    if opt.embeddings:
        where = opt.ids, opt.data_path, opt.data_name, opt.split
        return rank_embeddings(*opt.embeddings, *where, opt.fold5, opt.save_path)
    try:
        return rank_files(paths, opt.fold5, keep_parts=compared)
    except InputError as error:
        raise InputError(f"{error}{embeddings.hint(paths)}") from None


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
