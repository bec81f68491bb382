"""Write .npy files row by row, so that memory does not grow with them."""

import contextlib
import os
from collections.abc import Sequence

import numpy as np


class NpyWriter:
    """Writes a .npy file row by row; the header gets the number of rows at the end."""

    def __init__(self, path: str, row_shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.row_shape, self.dtype = path, row_shape, np.dtype(dtype)
        self.rows = 0
        self.file = open(path, "wb")
        self._header()
        self.start = self.file.tell()

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

    def write(self, row: np.ndarray, place: int | None = None) -> None:
        """Write a row at the end, or over the row at `place`, which may be the end too."""
        content = np.ascontiguousarray(row, self.dtype).tobytes()
        if place in (None, self.rows):
            self.rows += 1
            self.file.write(content)
        else:
            self.file.seek(self.start + place * len(content))
            self.file.write(content)
            self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


def reorder(path: str, order: Sequence[int]) -> None:
    """Rewrite a .npy so that row i is the old row order[i], one row in memory at a time."""
    array = np.load(path, mmap_mode="r")
    with contextlib.closing(NpyWriter(f"{path}.ordered", array.shape[1:], array.dtype)) as writer:
        for row in order:
            writer.write(array[row])
    del array
    os.replace(writer.path, path)
