"""Read the region features that extractors write: tsv, .npz and HDF5 files."""

import os
from collections.abc import Iterable, Iterator

from util.region_arrays import folder_rows, hdf5_rows, npz_row
from util.region_tsv import tsv_rows
from util.region_values import Row


def read_rows(paths: Iterable[str]) -> Iterator[Row]:
    """Yield the images of tsv files, .npz files, folders of .npz files, and HDF5 files, in order.

    `row.read(columns, max_boxes)` gives the Image, with `columns` numbers per region; None: as many
    as the shape or the values say. It raises InputError, which names file and row, if the row is
    damaged. max_boxes is for that message only. Call it before the next row is taken.
    """
    paths = list(paths)
    for path in paths:  # the last is not to be missed after an hour
        if not os.path.isfile(path) and not os.path.isdir(path):
            raise FileNotFoundError(f"{path}: no such tsv file, nor .npz or HDF5 file")
    for path in paths:
        if os.path.isdir(path):
            yield from folder_rows(path)
            continue
        with open(path, "rb") as file:
            head = file.read(8)
        if head.startswith(b"PK"):
            yield npz_row(path)
        elif head == b"\x89HDF\r\n\x1a\n":
            yield from hdf5_rows(path)
        else:
            yield from tsv_rows(path)
