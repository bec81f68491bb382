"""Open and check the arrays of a data set."""

import os
import reprlib  # repr() of a value from a hostile file may be endless

import numpy as np

from util.cli import InputError
from util.plain_pickle import load_objects


def open_array(path: str, ndim: int) -> np.ndarray:
    """Memory-map a float array of `ndim` axes; nothing in the file is unpickled."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; see docs/data.md")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except PermissionError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path}: not a whole .npy array ({error}); it may be truncated "
            f"({os.path.getsize(path)} bytes here): copy or make it again"
        ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive of arrays (.npz); expected one array (.npy)")
    if array.ndim != ndim or array.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{path}: expected a float16 or float32 array of {ndim} axes, "
            f"found {array.dtype} of shape {array.shape}"
        )
    return array


def read_sizes(path: str, rows: int) -> np.ndarray:
    """The images' widths and heights (rows, 2), float32, from `{split}_ims_size.npy`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such file; it holds the images' sizes, one row per image, with image_w "
            "and image_h (util/convert_data.py writes it)"
        )
    sizes = load_objects(path)
    if sizes.shape != (rows,):
        raise InputError(f"{path}: sizes of shape {sizes.shape}, expected {rows}, one per image")
    try:
        pairs = [(float(size["image_w"]), float(size["image_h"])) for size in sizes]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        found = reprlib.repr(sizes[0])
        raise InputError(
            f"{path}: expected rows with numbers image_w and image_h, found {found}"
        ) from None
    sizes = np.array(pairs, np.float32)
    wrong = ~(np.isfinite(sizes) & (sizes > 0)).all(1)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"{path}: row {row} (from 0): an image of {pairs[row]} pixels")
    return sizes
