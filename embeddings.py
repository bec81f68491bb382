"""Rank embeddings of any two-tower model (CLIP, SigLIP, VSE) by their cosines.

    python evaluation.py --embeddings images.npy texts.npy

    import evaluation
    evaluation.rank_embeddings("images.npy", "texts.npy").metrics

A text is a caption. Shapes: N images, M captions, D numbers per embedding; `images` has a row per
image, or a row per caption.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from caption_images import (
    USUAL,
    CaptionImages,
    caption_images,
    first_equal,
    first_of_each,
    rows_from_ids,
)
from data import DEV_CAPTIONS
from ranking import FOLDS, Ranking, rank_scores
from score_files import check_matrix_target, save_scores
from scoring import print_counts
from system import System
from util.arrays import open_array
from util.cli import InputError, progress
from util.image_ids import read_ids, shown, written_key
from vocab import read_captions

Path = str | os.PathLike
BLOCK = 1024  # rows at a time
SAME = 0.99  # the smallest cosine of two embeddings of one image
NEAR = 0.9999  # a cosine that two different images hardly have


class Table(NamedTuple):
    """Embeddings (rows, D) of length 1, float32, and what messages call them."""

    rows: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.rows)


class Pairs(NamedTuple):
    """Which row of the embeddings shows an image, and which image a caption is of."""

    images: CaptionImages
    captions: list[str] | None = None
    folder: str | None = None  # of the data set, and its split
    split: str | None = None


def rank_embeddings(
    images: Path | np.ndarray | Tensor,
    texts: Path | np.ndarray | Tensor,
    ids: Path | None = None,
    data_path: str | None = None,
    data_name: str | None = None,
    split: str = "test",
    fold5: bool = False,
    save_path: str | None = None,
) -> Ranking:
    """Rank by the cosines of embeddings, images (N, D) and texts (M, D), and print as evalrank.

    Both are .npy files of float16, float32 or float64, or arrays. Which image a caption is of says
    the file `ids` or the data set, see pairs_by_ids and pairs_of_data, else the order, see
    pairs_in_order. For the others see evalrank. Raises FileNotFoundError or InputError with the
    fault.
    """
    if save_path:
        save_path = os.path.expanduser(save_path)
        check_matrix_target(save_path)
    names, scores, pairs = score_embeddings(images, texts, ids, data_path, data_name, split)
    if fold5 and len(scores) < FOLDS:
        raise InputError(f"{names[0]}: {len(scores)} images, too few for five folds")
    image_of = pairs.images.image_of.numpy()
    if save_path:
        save_scores(save_path, scores, image_of)
    more = {"captions": pairs.captions, "ids": pairs.images.ids}
    more |= {"folder": pairs.folder, "split": pairs.split}
    return rank_scores(names, scores, image_of, fold5, **more)


def score_embeddings(
    images: Path | np.ndarray | Tensor,
    texts: Path | np.ndarray | Tensor,
    ids: Path | None = None,
    data_path: str | None = None,
    data_name: str | None = None,
    split: str = "test",
) -> tuple[list[str], np.ndarray, Pairs]:
    """The names of two tables of embeddings, their cosines (N, M), and what pairs there are.

    See rank_embeddings.
    """
    if ids is not None and (data_path or data_name):
        raise InputError(
            "--ids or a data set (--data_path, --data_name) says which image a caption is of; give "
            "one of them"
        )
    pair = read_table_of(images, "images"), read_table_of(texts, "texts")
    names, (d, e) = [table.name for table in pair], [table.rows.shape[1] for table in pair]
    if d != e:
        raise InputError(
            f"{names[0]}: {d} numbers per row, but {names[1]}: {e}; images and texts need "
            "embeddings of one model, in one space"
        )
    if data_path or data_name:
        pairs = pairs_of_data(find_folder(data_path, data_name, split), split, *pair)
    elif ids is not None:
        pairs = pairs_by_ids(os.path.expanduser(ids), *pair)
    else:
        pairs = pairs_in_order(*pair)
    rows, image_of = pairs.images.rows.numpy(), pairs.images.image_of.numpy()
    print(f"Embeddings: {names[0]} and {names[1]}")
    print_counts((len(rows), len(image_of)), image_of)
    return names, cosines(pair[0].rows[rows], pair[1].rows[: len(image_of)]), pairs


def read_table_of(x: Path | np.ndarray | Tensor, name: str) -> Table:
    """Embeddings from a file or an array, with rows of length 1; `name` is that of an array."""
    if isinstance(x, (str, os.PathLike)):
        name = os.path.expanduser(x)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{name}: no such file of embeddings")
        x = open_array(name, ndim=2)
    elif isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype.kind != "f" or not x.size:
        raise InputError(
            f"{name}: {x.dtype} of shape {x.shape}, expected embeddings: floats, a row per image "
            "or text"
        )
    return Table(unit_rows(x, name), name)


def unit_rows(x: np.ndarray, name: str) -> np.ndarray:
    """The rows (rows, D) divided by their lengths, float32. Raises InputError that names a row."""
    unit = np.empty(x.shape, np.float32)
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK].astype(np.float64)
        largest = np.abs(block).max(1)
        wrong = ~(np.isfinite(largest) & (largest > 0))
        if wrong.any():
            row = int(wrong.argmax())
            said = "is all zero" if largest[row] == 0 else "holds NaN or Inf"
            raise InputError(
                f"{name}: row {start + row} (from 0) {said}, so it has no cosine; make this "
                "embedding again"
            )
        block /= largest[:, None]  # the squares of very large and very small numbers are no floats
        unit[start : start + BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return unit


def cosines(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The products (N, M), float32, of rows of length 1: images (N, D) and texts (M, D).

    Equal rows get equal scores, so that they tie. A product of matrices alone may round them in
    different ways.
    """
    scores = np.empty((len(images), len(texts)), np.float32)
    for start in progress(range(0, len(images), BLOCK), "scoring"):
        np.matmul(images[start : start + BLOCK], texts.T, out=scores[start : start + BLOCK])
    first = first_equal(images[:, None])  # (N,)
    again = np.flatnonzero(first != np.arange(len(images)))
    scores[again] = scores[first[again]]
    first = first_equal(texts[:, None])  # (M,)
    again = np.flatnonzero(first != np.arange(len(texts)))
    scores[:, again] = scores[:, first[again]]
    return scores


# Which image a text is of


def pairs_in_order(images: Table, texts: Table) -> Pairs:
    """The pairs if nothing but the order says them.

    As many texts per image, image by image; or a row of images per text, and equal rows are one
    image.
    """
    if len(images) != len(texts):
        return Pairs(joined(rows_in_order(images, texts)))
    row_of = first_equal(images.rows[:, None])  # (M,)
    own = row_of == np.arange(len(row_of))
    near = (images.rows[1:] * images.rows[:-1]).sum(1) > NEAR  # (M - 1,) it and the row before
    near = np.flatnonzero(near & own[1:])
    if len(near):
        print(
            f"warning: {images.name}: {len(near)} rows are almost those before them, the first is "
            f"row {near[0] + 1} (from 0), and count as images of their own: equal rows are one "
            "image. If these are too, say so: --ids with a line per text"
        )
    return Pairs(joined(row_of))


def rows_in_order(images: Table, texts: Table) -> np.ndarray:
    """The row of each text's image (M,), if there are as many texts for each row, row by row."""
    n, m = len(images), len(texts)
    how = "--ids FILE with a line per text, the id of its image"
    if n > m:
        raise InputError(
            f"{images.name}: {n} rows, but {texts.name}: {m}; there are at least as many texts as "
            f"images. Is it the other way round? --embeddings {texts.name} {images.name}"
        )
    k, left = divmod(m, n)
    if left:
        row, there = divmod(m, USUAL)
        said = f"with {USUAL} per image, row {row} (from 0) gets only {there}"
        if row >= n:
            said = f"with {USUAL} per image, text {n * USUAL} (from 0) has no row"
        raise InputError(
            f"{texts.name}: {m} texts for the {n} rows of {images.name}: {said}; add what is "
            f"missing, or give {how}"
        )
    if k not in (1, USUAL):
        print(
            f"warning: {texts.name}: {m} texts for {n} images are taken as {k} per image, image "
            f"by image (usually {USUAL}). If rows are missing, texts stand beside the wrong "
            f"images. If it is meant, say so: {how}"
        )
    return np.arange(m) // k


def pairs_by_ids(path: str, images: Table, texts: Table) -> Pairs:
    """The pairs that a file of ids says; equal ids are one image.

    It has a line per text, the id of its image: the distinct ids, in the order in which they first
    occur, are the rows of images; if all are numbers below N, they are the rows. Or it has a line
    per row of images, and the texts stand in order, or each text has a row.
    """
    ids, n, m = read_ids(path), len(images), len(texts)
    keys = list(map(written_key, ids))
    if len(ids) == n:
        first = first_of_each(keys)  # (N,)
        check_copies(path, images, first, ids)
        row_of = first[np.arange(m) if n == m else rows_in_order(images, texts)]  # (M,)
        found = joined(row_of)
        return Pairs(found._replace(ids=[ids[row] for row in found.rows.tolist()]))
    if len(ids) != m:
        raise InputError(
            f"{path}: {len(ids)} lines, expected {m}, one per text of {texts.name}, or {n}, one "
            f"per row of {images.name}"
        )
    if all(isinstance(key, int) and 0 <= key < n for key in keys):
        found = joined(np.array(keys))
        if len(found.rows) < n:
            left = n - len(found.rows)
            print(f"notice: {images.name}: {left} of its {n} images have no text and are left out")
        return Pairs(found)
    found = joined(rows_from_ids(path, ids, n))
    names = [ids[line] for line in np.unique(first_of_each(keys))]
    return Pairs(found._replace(ids=names))


def check_copies(path: str, images: Table, first: np.ndarray, ids: Sequence[str]) -> None:
    """Raise InputError if rows of images with one id are far apart; `first` (N,) is the first."""
    cosine = (images.rows * images.rows[first]).sum(1)  # (N,)
    if (cosine < SAME).any():
        row = int((cosine < SAME).argmax())
        raise InputError(
            f"{path}: rows {first[row]} and {row} (from 0) of {images.name} have the id "
            f"{shown(ids[row])}, but their cosine is {cosine[row]:.2f}; the ids are in another "
            "order than the rows, or not of images"
        )


def joined(row_of: np.ndarray) -> CaptionImages:
    """The images of captions whose rows are (M,)."""
    used, image_of = np.unique(row_of, return_inverse=True)
    return CaptionImages(torch.from_numpy(used), torch.from_numpy(image_of), None)


def find_folder(data_path: str | None, data_name: str | None, split: str) -> str:
    """The folder of a data set; `data_path` alone may be that folder itself."""
    data_path = os.path.expanduser(data_path or "data")
    if data_name:
        return System().find_data(data_path, data_name)
    if not os.path.isfile(os.path.join(data_path, f"{split}_caps.txt")):
        raise FileNotFoundError(
            f"{data_path}: no {split}_caps.txt in it; give --data_path and --data_name, or the "
            "folder of the data set"
        )
    return data_path


def pairs_of_data(folder: str, split: str, images: Table, texts: Table) -> Pairs:
    """The pairs and the captions of a data set's split; of dev, its first 5,000 captions (Q2).

    `images` has a row per image of the split or per row of its features; if there are no features,
    the rows of `images` take their place, see caption_images.py.
    """
    stem = os.path.join(folder, split)
    text, path = f"{stem}_caps.txt", f"{stem}_ims.npy"
    captions, there = read_captions(text), os.path.isfile(path)
    features = open_array(path, ndim=3) if there else images.rows[:, None]
    try:
        whole = caption_images(stem, features, text, len(captions))
    except InputError as error:
        raise InputError(str(error).replace(path, path if there else images.name)) from None
    cut = whole.first(DEV_CAPTIONS) if split == "dev" else whole
    counts = sorted({len(captions), len(cut.image_of)})
    if len(texts) not in counts:
        raise InputError(
            f"{texts.name}: {len(texts)} texts, but {text} holds "
            f"{' captions, and split dev is the first '.join(f'{n}' for n in counts[::-1])}"
            f"{' captions' if len(counts) == 1 else ''}"
        )
    if len(images) == len(features):
        rows = cut.rows
    elif len(images) == len(whole.rows):
        rows = torch.searchsorted(whole.rows, cut.rows)
    elif len(images) == len(cut.rows):
        rows = torch.arange(len(cut.rows))
    else:
        raise InputError(
            f"{images.name}: {len(images)} rows, but the split {split} of {folder} has "
            f"{len(whole.rows)} images, in {len(features)} rows of features"
        )
    found = cut._replace(rows=rows)
    return Pairs(found, captions[: len(cut.image_of)], folder, split)


def hint(paths: Sequence[str]) -> str:
    """What to add to an error about two score matrices whose shapes are those of embeddings."""
    try:
        shapes = {path: open_array(path, ndim=2).shape for path in paths}
    except (InputError, OSError):  # not plain arrays
        return ""
    if len(paths) != 2 or len({d for _, d in shapes.values()}) > 1:
        return ""
    images, texts = sorted(paths, key=lambda path: shapes[path][0])
    return f". Are these embeddings of images and texts? Then: --embeddings {images} {texts}"
