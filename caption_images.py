"""Which image each caption of a split describes, and in which row that image is stored.

`{split}_ims.npy` may hold a row per image or a row per caption. An image may have any number of
captions, and they may stand in any order. What says which image a caption is of, in this order:

1. `{split}_caption_image.txt`: a line per caption, the row of its image (from 0), or an id of
   `{split}_ids.txt`; where each caption has a row of its own, equal lines are one image;
2. a row per caption: captions with equal rows, or with equal lines of `{split}_ids.txt` if that
   file repeats ids, are of one image;
3. a row per image, and `{split}_ids.txt` with a line per caption: its distinct ids, in the order in
   which they first occur, are the rows;
4. else the order: as many captions for each row, row by row. Published programs know only this
   (Q44).
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.arrays import open_array
from util.captions import read_lines
from util.cli import InputError, progress
from util.folders import SPLITS
from util.image_ids import written_key

USUAL = 5  # captions per image in the field's data sets


class CaptionImages(NamedTuple):
    """The distinct images of a split and their captions."""

    rows: Tensor  # (n_images,) the row of each image, ascending
    image_of: Tensor  # (n_captions,) the image of each caption, from 0
    ids: list[str] | None  # of the images

    def with_ids(self, stem: str, rows: int) -> "CaptionImages":
        """With the ids of `{stem}_ids.txt`: a line per image, per row, or per caption."""
        ids = read_ids(stem)
        if ids is None or len(ids) == len(self.rows):
            return self._replace(ids=ids)
        if len(ids) == rows:
            return self._replace(ids=[ids[row] for row in self.rows.tolist()])
        if len(ids) != len(self.image_of) or len(ids) < len(self.rows):
            raise InputError(f"{stem}_ids.txt: {len(ids)} ids for {len(self.rows)} images")
        names = dict(zip(reversed(self.image_of.tolist()), reversed(ids), strict=True))
        return self._replace(ids=[names[image] for image in range(len(self.rows))])

    def first(self, most: int) -> "CaptionImages":
        """The first captions, at most `most` of them, or those of one image; and their images.

        An image whose captions stand together is not cut.
        """
        if len(self.image_of) <= most:
            return self
        ends = (self.image_of.diff() != 0).nonzero().flatten() + 1  # of captions of one image
        ends = [*ends.tolist(), len(self.image_of)]
        last = max([n for n in ends if n <= most], default=ends[0])
        used, image_of = self.image_of[:last].unique(return_inverse=True)
        ids = self.ids and [self.ids[image] for image in used.tolist()]
        return CaptionImages(self.rows[used], image_of, ids)


def caption_images(
    stem: str, images: np.ndarray, text: str, n_captions: int, every_image: bool = False
) -> CaptionImages:
    """The images of the captions of a split; `stem` is its path without `_ims.npy`.

    images (rows, R, F) are its features, `text` is its caption file. With `every_image` images
    without a caption are among them. Raises InputError with the
    first row that does not fit if nothing says which image a caption is of.
    """
    rows, path = len(images), f"{stem}_ids.txt"
    ids = read_ids(stem)
    table = f"{stem}_caption_image.txt"
    if os.path.isfile(table):
        row_of = rows_from_table(table, images, n_captions, ids)
    elif n_captions == rows:
        row_of = rows_from_copies(path, ids, images)
        if len(set(row_of.tolist())) == rows:  # nothing repeats: is the file cut?
            warn_of_count(stem, rows, text, 1)
    elif ids and len(ids) == n_captions and len(set(ids)) < n_captions:
        row_of = rows_from_ids(path, ids, rows)
    else:
        check_order(stem, rows, text, n_captions)
        row_of = np.arange(n_captions) // (n_captions // rows)
    copies = n_captions == rows and (row_of == first_of_each(row_of.tolist())).all()
    if every_image and not copies:
        pairs = CaptionImages(torch.arange(rows), torch.from_numpy(row_of), None)
        return pairs.with_ids(stem, rows)
    used, image_of = np.unique(row_of, return_inverse=True)
    if n_captions != rows and len(used) < rows:
        print(
            f"notice: {stem}_ims.npy: {rows - len(used)} of its {rows} images have no caption and "
            "are left out"
        )
    pairs = CaptionImages(torch.from_numpy(used), torch.from_numpy(image_of), None)
    return pairs.with_ids(stem, rows)


def read_ids(stem: str) -> list[str] | None:
    """The lines of `{stem}_ids.txt`, if it exists."""
    path = f"{stem}_ids.txt"
    return read_table(path) if os.path.isfile(path) else None


def read_table(path: str) -> list[str]:
    """The lines of a file without empty ones at the end."""
    lines = read_lines(path)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def rows_from_table(
    path: str, images: np.ndarray, n_captions: int, ids: Sequence[str] | None
) -> np.ndarray:
    """The row of each caption's image, from a file with a line per caption."""
    lines, rows = [written_key(line) for line in read_table(path)], len(images)
    if len(lines) != n_captions:
        raise InputError(f"{path}: {len(lines)} lines, expected {n_captions}, one per caption")
    first = first_of_each(lines)
    if rows == n_captions > len(set(lines)) and not other_row(first, images):
        return first  # a row per caption: equal lines stand beside copies of one image
    places: dict = {row: row for row in range(rows)}
    if ids and len(ids) == rows and not set(lines) <= places.keys():
        keys = map(written_key, reversed(ids))
        places = dict(zip(keys, range(rows - 1, -1, -1), strict=True))
    for number, line in enumerate(lines, 1):
        if line not in places:
            raise InputError(
                f"{path}: line {number} is {str(line)[:40]!r}, expected a row from 0 to {rows - 1}"
                ", or an id of the file of ids, which then has a line per row"
            )
    return np.array([places[line] for line in lines])


def rows_from_copies(path: str, ids: Sequence[str] | None, images: np.ndarray) -> np.ndarray:
    """The row of each caption's image if each caption has a row: the first of the equal rows."""
    if not ids or len(ids) != len(images) or len(set(ids)) == len(ids):
        return first_equal(images)
    first = first_of_each(list(map(written_key, ids)))
    if row := other_row(first, images):
        raise InputError(
            f"{path}: rows {first[row]} and {row} (from 0) have the id {ids[row][:40]!r}, but not "
            "the same features; the ids are in another order than the rows, or not of images"
        )
    return first


def other_row(first: np.ndarray, images: np.ndarray) -> int | None:
    """The first row that does not begin with the same region as the row that it should equal."""
    for row, other in enumerate(first.tolist()):
        if row != other and not np.array_equal(images[row, :1], images[other, :1]):
            return row
    return None


def rows_from_ids(path: str, ids: Sequence[str], rows: int) -> np.ndarray:
    """The row of each caption's image, from ids with a line per caption: see the file's head."""
    ids = list(map(written_key, ids))
    names = {name: row for row, name in enumerate(dict.fromkeys(ids))}
    if len(names) != rows:
        least = min(len(names), rows)
        said = f"row {least} (from 0) has no caption"
        if len(names) > rows:
            said = f"line {ids.index(list(names)[least]) + 1} names an image that has no row"
        raise InputError(
            f"{path}: a line per caption, which name {len(names)} images, but there are {rows} "
            f"rows of features: {said}"
        )
    return np.array([names[name] for name in ids])


def check_order(stem: str, rows: int, text: str, n_captions: int) -> None:
    """Refuse captions that are not as many for each row; warn of unusual numbers of them."""
    path = f"{stem}_ims.npy"
    how = f"{stem}_caption_image.txt with a line per caption, the row of its image (docs/data.md)"
    k, left = divmod(n_captions, max(rows, 1))
    if not k or left:
        k = USUAL if n_captions > rows else 1
        row, there = divmod(n_captions, k)
        said = f"row {row} (from 0) gets only {there}"
        if row >= rows:
            said = f"line {rows * k + 1} has no row"
        raise InputError(
            f"{text}: {n_captions} captions for the {rows} rows of {path}: with {k} per image, "
            f"{said}; add what is missing, or write {how}"
        )
    warn_of_count(stem, rows, text, k)


def warn_of_count(stem: str, rows: int, text: str, k: int) -> None:
    """Warn if k captions per image are unusual, or not as many as in other splits."""
    others = {split: number for split, number in counts_by_order(stem, text).items() if number != k}
    if k in (1, USUAL) and not others:  # a row per caption is one caption per image
        return
    how = f"{stem}_caption_image.txt with a line per caption, the row of its image (docs/data.md)"
    said = "".join(f", but {number} in {split}" for split, number in others.items())
    print(
        f"warning: {text}: {k * rows} captions for {rows} images are taken as {k} per image, "
        f"image by image{said or f' (usually {USUAL})'}. If lines are missing, captions stand "
        f"beside the wrong images. If it is meant, say so: {how}"
    )


def counts_by_order(stem: str, text: str) -> dict[str, int]:
    """Captions per image in the other splits of the folder, where only the order says so."""
    folder, split = os.path.split(stem)
    kind, counts = text.removeprefix(stem), {}
    for other in SPLITS:
        path = os.path.join(folder, other)
        needed = f"{path}_ims.npy", f"{path}{kind}"
        if other == split or not all(map(os.path.isfile, needed)):
            continue
        if os.path.isfile(f"{path}_caption_image.txt"):
            continue
        try:
            rows, lines = len(open_array(needed[0], ndim=3)), count_lines(needed[1])
        except (InputError, OSError):  # its own reader says what is wrong with it
            continue
        ids = f"{path}_ids.txt"
        if os.path.isfile(ids) and count_lines(ids) == lines:
            continue
        if lines > rows and lines % max(rows, 1) == 0:
            counts[other] = lines // rows
    return counts


def count_lines(path: str) -> int:
    with open(path, "rb") as lines:
        return sum(1 for _ in lines)


def first_of_each(names: Sequence) -> np.ndarray:
    """For each name, the place where it first occurs."""
    first: dict = {}
    return np.array([first.setdefault(name, place) for place, name in enumerate(names)])


def first_equal(images: np.ndarray) -> np.ndarray:
    """For each row of images (rows, R, F), the first row that is equal to it (rows,).

    A row is read whole only if another one has the same first region.
    """

    def key(x: np.ndarray) -> int:
        return hash(np.ascontiguousarray(x).tobytes())  # 64 bits

    start = [key(images[row, :1]) for row in progress(range(len(images)), "comparing images")]
    times = Counter(start)
    rows = progress(enumerate(start), "comparing images", len(start))
    return first_of_each([x if times[x] == 1 else (x, key(images[row])) for row, x in rows])
