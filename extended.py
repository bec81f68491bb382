"""Recall@K, ECCV Caption, CxC and PMRP on COCO's 5,000 test images.

    python extended.py runs/coco/model_best.pth.tar --data_path data      # the split testall
    python extended.py A.pth.tar B.pth.tar ...                            # their mean score
    python extended.py a.npy --ids data/coco_precomp                      # a saved score matrix
    python extended.py --embeddings images.npy texts.npy --ids data/coco_precomp
    python extended.py --write_ids data/coco_precomp                      # the ids that it needs

Most captions suit more images than the one they were written for. For ECCV Caption (Chun et al.,
ECCV 2022, arXiv:2204.03359) and Crisscrossed Captions, CxC (Parekh et al., EACL 2021,
arXiv:2004.15020), people judged the other matches. Plausible Match, PMRP (Chun et al., CVPR 2021,
arXiv:2101.05068) derives them from object classes. The package eccv_caption holds the first two.
Shapes: N images, M captions.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import checkpoint as ckpt
import embeddings
import evaluation
import systems
from cxc import CXC, KS, cxc_intra, read_cxc, whole_id
from data import PrecompDataset
from util.arguments import FOLDER, Parser
from util.cli import InputError, progress, run
from util.coco_ids import (  # noqa: F401
    as_ids,
    check_ids,
    read_ids,
    read_pair_of_ids,
    read_pairs,
)
from util.devices import pick_device
from util.image_ids import id_key
from util.json_file import fault_of, read_json

PLAUSIBLE = "pm_image_to_caption.json", "pm_caption_to_image.json"


def package(extra_path: str | None = None):
    """The Metrics of eccv_caption, with Plausible Match if `extra_path` holds both of its files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it recommends ujson
            import eccv_caption
    except ImportError:
        raise InputError(
            "ECCV Caption and CxC are judged by the eccv_caption package: pip install eccv_caption"
        ) from None
    files = [os.path.join(extra_path, name) for name in PLAUSIBLE] if extra_path else []
    there = [path for path in files if os.path.isfile(path)]
    if len(there) == 1:
        (missing,) = set(files) - set(there)
        raise InputError(f"{missing}: no such file, but {there[0]} exists; PMRP needs both")
    for path in there:
        check_plausible(path)
    try:
        return eccv_caption.Metrics(extra_file_dir=extra_path if there else None)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{' or '.join(there)}: expected {{id: [ids]}} ({fault_of(error)}); download it again"
        ) from None


def check_plausible(path: str) -> None:
    """Raise InputError unless a file of PMRP holds ids, and a list of ids for each."""
    form = "{id: [ids]}"
    found = read_json(path, form)
    try:
        whole = all(
            whole_id(key) >= 0 and isinstance(ids, list) and all(whole_id(x) >= 0 for x in ids)
            for key, ids in found.items()
        )
    except (ValueError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path}: expected {form}; download it again")


def top(scores: np.ndarray, queries: Sequence[int], items: Sequence[int], k: int) -> dict:
    """For each row's query id, the ids of the k columns with the highest scores, best first.

    Equal scores come in any order.
    """
    items, ranked = np.asarray(items), {}
    for start in progress(range(0, len(scores), 256), "ranking"):
        rows = torch.as_tensor(np.ascontiguousarray(scores[start : start + 256]))
        order = rows.topk(min(k, rows.size(1)), dim=1).indices  # (256, k)
        ids = items[order.numpy()]
        ranked.update(zip(queries[start : start + 256], ids, strict=True))
    return ranked


def coco_metrics(
    scores: np.ndarray,
    image_ids: Sequence[int],
    caption_ids: Sequence[int],
    extra_path: str | None = None,
    judge=None,
    image_of: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of eccv_caption, in percent, for scores (N, M) of COCO's 5,000 test images.

    `image_ids` holds one id per image (N,) or per caption (M,); `caption_ids` holds one id per
    caption (M,); `image_of` (M,) the image of each caption, None: image by image. Returns
    {'eccv_map_at_r': {'i2t', 't2i'}, 'eccv_rprecision', 'eccv_r1', 'cxc_r1', 'cxc_r5', 'cxc_r10'},
    and 'pmrp' if `extra_path` holds its two files. `judge` is the result of package(extra_path), if
    it was read before. Raises InputError on other ids and on NaN.
    """
    judge = judge or package(extra_path)
    image_ids, caption_ids = as_ids(image_ids, caption_ids)
    check_ids(image_ids, caption_ids, judge, image_of)
    if np.shape(scores) != (len(image_ids), len(caption_ids)):
        raise InputError(
            f"scores of shape {np.shape(scores)}, but ids of {len(image_ids)} images and "
            f"{len(caption_ids)} captions"
        )
    if not np.isfinite(scores).all():
        raise InputError("a score is NaN or infinite; it has no rank")
    truths = [judge.eccv_gts, judge.cxc_gts, *([judge.pm_gts] if judge.pm_gts else [])]
    most = {way: max(len(x) for gts in truths for x in gts[way].values()) for way in ("i2t", "t2i")}
    ranked = {
        "i2t": top(scores, image_ids, caption_ids, max(most["i2t"], KS[-1])),
        "t2i": top(np.transpose(scores), caption_ids, image_ids, max(most["t2i"], KS[-1])),
    }
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be turned off
            metrics = judge.eccv_metrics(ranked, "all")
            metrics |= {f"cxc_r{k}": judge.cxc_recalls(ranked, "all", K=k) for k in KS}
            if judge.pm_gts:
                metrics["pmrp"] = judge.pmrp(ranked, "all")
    except KeyError as error:
        raise InputError(f"id {error} is judged, but not among those given") from None
    return {
        name: {way: 100 * float(x) for way, x in both.items()} for name, both in metrics.items()
    }


def write_ids(folder: str | os.PathLike) -> None:
    """Write testall_ids.txt and testall_capids.txt from the package, in Karpathy's order."""
    judge = package()
    captions = [int(x) for x in judge.coco_ids]
    images = [judge.coco_gts["t2i"][x][0] for x in captions]
    files = {"testall_ids.txt": images, "testall_capids.txt": captions}
    for name, ids in files.items():
        path = Path(folder) / name
        text = "".join(f"{x}\n" for x in ids)
        if path.exists() and path.read_text() != text:
            raise InputError(f"{path}: exists with other content; move it away first")
    for name, ids in files.items():
        (Path(folder) / name).write_text("".join(f"{x}\n" for x in ids))
        print(f"{Path(folder) / name}: {len(ids)} ids, in Karpathy's order, as packed for SCAN")


def evaluate(
    paths: str | Sequence[str],
    data_path: str | None = None,
    split: str = "testall",
    ids_path: str | None = None,
    extra_path: str | None = None,
    vocab_path: str | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    data_name: str | None = None,
) -> dict:
    """Print and return all figures of checkpoints, or of saved score matrices, by their mean score.

    Returns the figures of coco_metrics, those of evalrank under 'coco_5k' and 'coco_1k' (mean of
    five folds), and those of cxc_intra under 'cxc'. The ids are read from `ids_path`, by default
    the folder of the data. The files cxc_i2i.json and cxc_t2t.json (used for a single checkpoint
    only) and those of PMRP are read from `extra_path`, by default the folder of the ids. Raises
    FileNotFoundError or ValueError with the fault.
    """
    paths = evaluation.as_list(paths)
    matrices = [path.endswith(".npy") for path in paths]
    if not paths or any(matrices) != all(matrices):
        raise InputError("expected checkpoints, or score matrices (.npy), not both")
    if matrices[0] and not ids_path:
        raise InputError("a score matrix needs the folder of its ids: --ids")
    opt = None if matrices[0] else ckpt.load(paths[0])["opt"]
    folder = ids_path or systems.of(opt).find_data(
        data_path or opt.data_path, data_name or opt.data_name
    )
    ids, judge = read_checked_ids(folder, split, extra_path)
    if matrices[0]:
        try:
            scores, image_of = evaluation.read_mean(paths)
        except InputError as error:
            raise InputError(f"{error}{embeddings.hint(paths)}") from None
        print(f"Scores: {', '.join(paths)}")
        evaluation.print_counts(scores.shape, image_of)
    else:
        where = data_path, split, vocab_path, pick_device(device), batch_size
        scores, encoded, dataset = score_models(paths, where, data_name, ids)
        image_of = evaluation.rank_by(dataset)
        if dataset.ids and not ids_path:  # the same ids, in the order of the images
            ids[0] = [int(id_key(x)) for x in dataset.ids]
    alike = read_cxc(extra_path or folder, *ids, image_of)
    metrics = rank_and_print(scores, ids, judge, image_of)
    if alike and len(paths) == 1 and not matrices[0]:
        if systems.of(opt).interchangeable:
            metrics["cxc"] = cxc_intra(*encoded, alike)
        else:
            print("CxC i2i, t2t: not available for this model, which reads more than both kinds")
        for way, recalls in metrics.get("cxc", {}).items():
            print(f"CxC {way} R@1 / 5 / 10: {' / '.join(f'{x:.1f}' for x in recalls.values())}")
    return metrics


def evaluate_embeddings(
    images: str | np.ndarray,
    texts: str | np.ndarray,
    data_path: str | None = None,
    split: str = "testall",
    ids_path: str | None = None,
    extra_path: str | None = None,
    data_name: str | None = None,
) -> dict:
    """As evaluate, by the cosines of embeddings; see embeddings.rank_embeddings.

    Which image a caption is of say the data set, or the files in `ids_path`.
    """
    known = data_path or data_name
    if not known and not ids_path:
        raise InputError("embeddings need the folder of COCO's ids: --ids, or a data set with them")
    folder = ids_path or embeddings.find_folder(data_path, data_name, split)
    ids, judge = read_checked_ids(folder, split, extra_path)
    where: tuple = (None, data_path, data_name)
    if not known:
        whole = os.path.isfile(os.path.join(folder, f"{split}_caps.txt"))
        where = (None, folder, None) if whole else (os.path.join(folder, f"{split}_ids.txt"),)
    _, scores, pairs = embeddings.score_embeddings(images, texts, *where, split=split)
    if pairs.images.ids and not (known and ids_path):  # the same ids, in the order of the images
        ids[0] = [int(id_key(x)) for x in pairs.images.ids]
    return rank_and_print(scores, ids, judge, pairs.images.image_of.numpy())


def read_checked_ids(
    folder: str | os.PathLike, split: str, extra_path: str | None
) -> tuple[list[list[int]], object]:
    """The ids of images and captions, and who judges them: faults are said before hours of work."""
    *ids, image_of = read_pairs(folder, split)
    judge = package(extra_path or folder)
    # Where a table says which image a caption is of, the ids are checked when it is read.
    if not os.path.isfile(os.path.join(folder, f"{split}_caption_image.txt")):
        check_ids(*ids, judge, image_of)
    return ids, judge


def rank_and_print(
    scores: np.ndarray, ids: list[list[int]], judge, image_of: Sequence[int] | None
) -> dict:
    """Print and return the figures of coco_metrics, and those of evalrank for COCO 5K and 1K."""
    metrics = coco_metrics(scores, *ids, judge=judge, image_of=image_of)
    print("COCO 5K")
    metrics["coco_5k"] = evaluation.rank_and_print(scores, False, False, image_of)
    print("COCO 1K")
    metrics["coco_1k"] = evaluation.rank_and_print(scores, True, False, image_of)
    print_coco(metrics)
    return metrics


def score_models(
    paths: list[str], where: tuple, data_name: str | None, ids: list[list[int]]
) -> tuple[np.ndarray, tuple, PrecompDataset]:
    """The mean scores of checkpoints; the last model with its encodings, and its split.

    `where` are arguments of encode_split, `ids` those of the split's images and captions.
    """
    scores = 0
    for path in paths:
        encoded = evaluation.encode_split(path, *where, data_name=data_name)
        model, split, images, captions = encoded
        check_sizes(split.dataset, ids, path)
        scores = scores + evaluation.split_scores(*encoded) / len(paths)
    return scores, (model, images, captions), split.dataset


def check_sizes(dataset: PrecompDataset, ids: list[list[int]], path: str) -> None:
    """Raise InputError unless a split has as many images and captions as there are ids."""
    images, captions = map(len, ids)
    if (images, captions) != (dataset.n_images, dataset.n_captions):
        raise InputError(
            f"{dataset.path}: {dataset.n_images} images and {dataset.n_captions} captions for "
            f"{path}, but ids of {images} and {captions}"
        )


def print_coco(metrics: dict[str, dict[str, float]]) -> None:
    """Print the figures of coco_metrics."""
    for name, title in (("map_at_r", "mAP@R"), ("rprecision", "R-Precision"), ("r1", "R@1")):
        print_both(f"ECCV Caption {title}", [metrics[f"eccv_{name}"]])
    print_both("CxC R@1 / 5 / 10", [metrics[f"cxc_r{k}"] for k in KS])
    if "pmrp" in metrics:
        print_both("PMRP", [metrics["pmrp"]])


def print_both(title: str, metrics: list[dict[str, float]]) -> None:
    """Print a line with both directions."""
    ways = [f"{way} {' / '.join(f'{x[way]:.1f}' for x in metrics)}" for way in ("i2t", "t2i")]
    print(f"{title}: {', '.join(ways)}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Recall@K, ECCV Caption, CxC and PMRP on COCO's 5,000 test images.")
    parser.add_argument("paths", nargs="*", help="checkpoints, or score matrices (.npy)")
    parser.add_argument(
        "--embeddings",
        nargs=2,
        metavar=("IMAGES", "TEXTS"),
        help="instead of them: embeddings of any two-tower model (.npy), ranked by their cosines; "
        "see evaluation.py",
    )
    parser.add_argument("--data_path", help="folder that holds the data; default: as in training")
    parser.add_argument("--data_name", help="another data set than that of the training")
    parser.add_argument("--split", default="testall", help="default: testall")
    parser.add_argument(
        "--ids",
        metavar="FOLDER",
        type=FOLDER,
        help="folder of {split}_ids.txt and {split}_capids.txt; default: that of the data",
    )
    parser.add_argument(
        "--extra",
        metavar="FOLDER",
        type=FOLDER,
        help=f"folder of {', '.join(name for name, _ in CXC.values())}, {', '.join(PLAUSIBLE)}; "
        "default: as --ids",
    )
    parser.add_argument("--vocab_path", help="folder of the vocabulary; default: as in training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--batch_size", type=int, help="for the encoders; default: as in training")
    parser.add_argument(
        "--write_ids",
        metavar="FOLDER",
        type=FOLDER,
        help="only write the ids of testall to this folder, in Karpathy's order",
    )
    opt = parser.parse_args(argv)
    if opt.write_ids:
        if opt.paths or opt.embeddings:
            parser.error("--write_ids takes no checkpoints, matrices or embeddings")
        write_ids(opt.write_ids)
        return
    where = opt.data_path, opt.split, opt.ids, opt.extra
    if opt.embeddings:
        if opt.paths or opt.vocab_path or opt.batch_size or opt.device != "auto":
            parser.error(
                "--embeddings takes only --data_path, --data_name, --split, --ids, --extra"
            )
        evaluate_embeddings(*opt.embeddings, *where, opt.data_name)
        return
    if not opt.paths:
        parser.error("name a checkpoint, score matrices (.npy), or --embeddings IMAGES TEXTS")
    evaluate(opt.paths, *where, opt.vocab_path, opt.device, opt.batch_size, opt.data_name)


if __name__ == "__main__":
    run(main)
