"""Convert bottom-up-attention tsv files to the arrays that data.py reads.

    python util/convert_data.py train.tsv --out data/my_precomp/train
    python util/convert_data.py a.tsv b.tsv --ids dev_ids.txt --out data/my_precomp/dev

A row holds image_id, image_w, image_h, num_boxes, boxes and features, separated by tabs; boxes and
features are float32 in base64. The script writes {out}_ims.npy (N, R, F), {out}_ims_bbx.npy
(N, R, 4) in pixels, {out}_ims_size.npy and {out}_ids.txt. It writes one row at a time, so memory
does not grow with the files. If an image has fewer than R = --max_boxes boxes, zeros follow.
"""

import argparse
import base64
import binascii
import csv
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # when run by path

from util.cli import InputError, progress, run  # noqa: E402
from vocab import read_captions as read_lines  # noqa: E402

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
SIZE = np.dtype([("image_w", "<i8"), ("image_h", "<i8")])


class NpyWriter:
    """Writes a .npy file row by row; the header gets the number of rows at the end."""

    def __init__(self, path: str, row_shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.row_shape, self.dtype = path, row_shape, np.dtype(dtype)
        self.rows = 0
        self.file = open(path, "wb")
        self._header()

    def _header(self) -> None:
        # numpy pads a header so that the first axis can grow without moving the data.
        np.lib.format.write_array_header_1_0(
            self.file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.rows, *self.row_shape),
            },
        )

    def write(self, row: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(row, self.dtype).tobytes())
        self.rows += 1

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


def decode(text: str, columns: int | None, boxes: int, where: str, field: str) -> np.ndarray:
    """Decode float32 in base64 to (boxes, columns); columns None: as many as the length gives."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: {field} is not base64 ({error}); the file may be cut") from None
    per_box = columns * 4 if columns else 4
    expected = f"float32 for {boxes} boxes"
    if columns:
        expected = f"{boxes} boxes x {columns} float32, {boxes * per_box} bytes"
    if len(raw) % (boxes * per_box) or (columns and len(raw) != boxes * per_box) or not raw:
        raise InputError(f"{where}: {field} holds {len(raw)} bytes; expected {expected}")
    values = np.frombuffer(raw, "<f4").reshape(boxes, -1)
    if not np.isfinite(values).all():
        raise InputError(f"{where}: NaN or Inf among {field}; extract that image again")
    return values


def read_rows(
    paths: Iterable[str], max_boxes: int
) -> Iterator[tuple[str, int, int, np.ndarray, np.ndarray]]:
    """Yield (image_id, width, height, boxes (n, 4), features (n, F)) for each row of each file."""
    csv.field_size_limit(2**31 - 1)  # a row of 100 boxes holds over a megabyte of base64
    feature_dim = None
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such tsv file")
        with open(path, encoding="utf-8", errors="replace", newline="") as lines:
            for number, row in enumerate(csv.reader(lines, delimiter="\t"), 1):
                where = f"{path}: row {number}"
                if len(row) != len(FIELDS):
                    raise InputError(
                        f"{where}: {len(row)} fields, expected {len(FIELDS)}: {', '.join(FIELDS)}"
                    )
                image_id, *counts, boxes, features = row
                try:
                    width, height, n = (int(float(x)) for x in counts)
                except (ValueError, OverflowError):
                    raise InputError(
                        f"{where}: image_w, image_h, num_boxes are {counts}, expected numbers"
                    ) from None
                if not 1 <= n <= max_boxes:
                    raise InputError(
                        f"{where}: {n} boxes, expected 1 to {max_boxes}; see --max_boxes"
                    )
                boxes = decode(boxes, 4, n, where, "boxes")
                features = decode(features, feature_dim, n, where, "features")
                feature_dim = features.shape[1]
                yield image_id, width, height, boxes, features


def write_rows(
    paths: list[str], folder: str, wanted: set[str] | None, max_boxes: int, dtype: str
) -> tuple[dict[str, int], list[NpyWriter]]:
    """Write the wanted images (None: all) to `folder`, in file order.

    Returns the row of each image id, and the open writers of the three arrays.
    """
    largest = np.finfo(dtype).max
    seen: dict[str, int] = {}
    writers: list[NpyWriter] = []
    for image_id, width, height, boxes, features in progress(read_rows(paths, max_boxes), "rows"):
        if image_id in seen or (wanted is not None and image_id not in wanted):
            continue
        if np.abs(features).max() > largest:
            raise InputError(
                f"image {image_id}: a feature above {largest:g}, too large for {dtype}"
            )
        if not writers:
            shapes = {
                "ims": ((max_boxes, features.shape[1]), dtype),
                "ims_bbx": ((max_boxes, 4), np.float32),
                "ims_size": ((), SIZE),
            }
            writers = [
                NpyWriter(os.path.join(folder, f"{name}.npy"), *kind)
                for name, kind in shapes.items()
            ]
        seen[image_id] = len(seen)
        empty = ((0, max_boxes - len(boxes)), (0, 0))
        rows = np.pad(features, empty), np.pad(boxes, empty), np.array((width, height), SIZE)
        for writer, row in zip(writers, rows, strict=True):
            writer.write(row)
    return seen, writers


def convert(
    paths: list[str],
    out: str,
    ids: list[str] | None = None,
    max_boxes: int = 36,
    dtype: str = "float32",
) -> int:
    """Write the arrays of `out`; return the number of images.

    Without `ids`, all images are written in file order; if an id occurs twice, its first row is
    used. With `ids`, these images are written in this order, which must be that of the captions.
    Raises InputError or FileNotFoundError with the file and the row.
    """
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    if ids is not None and len(set(ids)) != len(ids):
        raise InputError(f"{len(ids) - len(set(ids))} ids occur twice in the list of ids")
    wanted = None if ids is None else set(ids)
    # The files are written beside their targets and renamed at the very end. So an interrupted run
    # leaves no files that look complete, and no rows in another order than their ids.
    with tempfile.TemporaryDirectory(
        prefix=f"{os.path.basename(out)}_",
        suffix=".part",
        dir=os.path.dirname(os.path.abspath(out)),
    ) as scratch:
        seen, writers = write_rows(paths, scratch, wanted, max_boxes, dtype)
        if not seen:
            raise InputError(f"{', '.join(paths)}: none of the requested images")
        order = list(seen) if ids is None else ids
        absent = [image_id for image_id in order if image_id not in seen]
        if absent:
            raise InputError(
                f"{len(absent)} of {len(ids)} ids are in no tsv file, the first {absent[0]!r}"
            )
        for writer in writers:
            writer.close()
            if order != list(seen):
                reorder(writer.path, [seen[image_id] for image_id in order])
        with open(os.path.join(scratch, "ids.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{image_id}\n" for image_id in order)
        for name in ("ims.npy", "ims_bbx.npy", "ims_size.npy", "ids.txt"):
            os.replace(os.path.join(scratch, name), f"{out}_{name}")
    return len(order)


def reorder(path: str, order: list[int]) -> None:
    """Rewrite a .npy so that row i is the old row order[i], one row in memory at a time."""
    array = np.load(path, mmap_mode="r")
    writer = NpyWriter(f"{path}.ordered", array.shape[1:], array.dtype)
    for row in order:
        writer.write(array[row])
    writer.close()
    os.replace(writer.path, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("tsv", nargs="+", help="tsv files that generate_tsv.py wrote, in order")
    parser.add_argument("--out", required=True, help="folder and split, e.g. data/my_precomp/train")
    parser.add_argument("--ids", help="file of image ids, one per line: write these, in this order")
    parser.add_argument("--max_boxes", type=int, default=36, help="boxes per image, R")
    parser.add_argument("--dtype", default="float32", choices=("float16", "float32"))
    opt = parser.parse_args(argv)
    ids = read_lines(opt.ids) if opt.ids else None
    n = convert(opt.tsv, opt.out, ids, opt.max_boxes, opt.dtype)
    print(f"{opt.out}_ims.npy: {n} images")


if __name__ == "__main__":
    run(main)
