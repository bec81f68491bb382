"""Open and check the arrays of a data set."""

import math
import os
import reprlib  # repr() of a value from a hostile file may be endless

import numpy as np

from util.cli import InputError
from util.file_kinds import NPY, kind_of
from util.fingerprint import sampled_hash
from util.npy_reader import read_header, type_name
from util.plain_pickle import load_objects

# Names of width and height in the files of common programs; the first are ours.
SIZE_NAMES = (
    ("image_w", "image_h"),
    ("width", "height"),
    ("image_width", "image_height"),
    ("img_w", "img_h"),
    ("w", "h"),
)


class MappedArray(np.memmap):
    """A memory-mapped file that is pickled as its path, so that a spawned worker maps it again.

    Only the array that `open_array` returned knows its path. Slices of it and results of arithmetic
    are plain arrays; they and copies of it are pickled with their content.
    """

    source: tuple | None = None  # path, axes, whether integers may be in it, and _state

    def __reduce__(self):
        if self.source is None:
            return np.asarray(self).__reduce__()
        return _open_again, (*self.source[:3], sampled_hash(self))

    def check_file(self) -> None:
        """Raise InputError if the file has become shorter: to read behind its end kills a process.

        The system raises SIGBUS then, which no program can handle.
        """
        if self.source is None:
            return
        path, _, _, (size, _) = self.source
        try:
            found = self._mmap.size()
        except OSError:  # the file is gone from a network drive
            found = 0
        if found < size:
            raise InputError(
                f"{path}: {found:,} bytes, but {size:,} when it was opened: it was cut, or is "
                "being written anew, while this program reads it; put the whole file back and "
                "start again"
            )

    def __getitem__(self, index):
        self.check_file()
        found = super().__getitem__(index)
        return np.asarray(found) if isinstance(found, MappedArray) else found

    def __array_wrap__(self, array, context=None, return_scalar=False):
        array = np.asarray(array)
        return array[()] if array.ndim == 0 else array


def open_array(path: str, ndim: int, integers: bool = False) -> MappedArray:
    """Memory-map an array of floats, or with `integers` of floats or integers, of `ndim` axes.

    Nothing in the file is unpickled. Raises FileNotFoundError, or an InputError that says what the
    file is.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; see docs/data.md")
    start, shape, fortran, dtype = _read_header(path)
    expected = f"a float16 or float32 array of {ndim} axes"
    if integers:
        expected = f"an array of {ndim} axes of floats or integers"
    floats = dtype.kind == "f" and dtype.itemsize <= 8
    if len(shape) != ndim or not (floats or (integers and dtype.kind in "iu")):
        raise InputError(
            f"{path}: expected {expected}, found {_name(dtype)} of shape {reprlib.repr(shape)}"
        )
    if not dtype.isnative:
        native = dtype.newbyteorder("=").str
        raise InputError(
            f"{path}: its numbers ({dtype.str}) have the byte order of another kind of machine, "
            "which PyTorch cannot read; write them anew and put the new file in its place: "
            f'python -c "import numpy as np; '
            f"np.save('native.npy', np.load('{path}').astype('{native}'))\""
        )
    order = "F" if fortran else "C"
    array = MappedArray(path, dtype, mode="r", offset=start, shape=shape, order=order)
    array.source = (os.path.abspath(path), ndim, integers, _state(path))
    return array


def _open_again(path: str, ndim: int, integers: bool, mark: str) -> MappedArray:
    """The array of a file that another process opened; it must not have changed since."""
    array = open_array(path, ndim, integers)
    if sampled_hash(array) != mark:
        raise InputError(
            f"{path}: changed since this program opened it; start the program again, and leave "
            "its files alone while it runs"
        )
    return array


def _state(path: str) -> tuple[int, int]:
    """Size and time of change of a file."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _read_header(path: str) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """Where the numbers of a whole .npy file begin, and what its header says; else an InputError.

    See util.npy_reader.read_header.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(len(NPY))
        if head != NPY and not (head and NPY.startswith(head)):
            raise _not_an_array(path)
        file.seek(0)
        try:
            shape, fortran, dtype = read_header(file)
        except ValueError as error:
            raise InputError(
                f"{path}: not a whole .npy array: its header is cut or damaged ({error}), {size} "
                "bytes are here; copy or make it again"
            ) from None
        start = file.tell()
    if dtype.hasobject:
        raise InputError(
            f"{path}: not a whole .npy array of numbers, but an array of Python objects, as "
            "np.save makes of a list of arrays of different lengths; save one float array, filled "
            "up with zeros, and {split}_num_boxes.npy with the counts (docs/data.md)"
        )
    expected = start + math.prod(shape) * dtype.itemsize
    if size < expected:
        raise InputError(
            f"{path}: not a whole .npy array: truncated, {size} bytes of {expected} are here; copy "
            "or make it again"
        )
    return start, shape, fortran, dtype


def _not_an_array(path: str) -> InputError:
    """The error about a file without the mark of .npy."""
    kind = kind_of(path)
    if kind is None:
        with open(path, "rb") as file:
            kind = f"a file that begins with {file.read(40)!r}"
    if kind.startswith("a Python pickle"):
        kind += ", as array.dump writes it: save the array with np.save"
    if kind.startswith("an archive of arrays"):
        kind += "; expected one array (.npy): save the one that belongs here with np.save"
    return InputError(f"{path}: not a whole .npy array, but {kind}")


def _name(dtype: np.dtype) -> str:
    """A dtype in words, and how to make floats of its numbers."""
    if dtype.names:
        return f"a structured array (fields {reprlib.repr(', '.join(dtype.names))})"
    if dtype.kind in "SU":
        return f"text ({dtype})"
    if dtype.kind == "V":
        made = "as np.save makes of bfloat16; save x.astype(np.float32)"
        return f"raw bytes ({type_name(dtype)}, {made})"
    if dtype.kind == "c":
        return f"{dtype} (save real numbers, x.real.astype(np.float32))"
    return str(dtype)


def read_sizes(path: str, rows: int) -> np.ndarray:
    """The images' widths and heights (rows, 2), float32, from `{split}_ims_size.npy`.

    The file holds a structured array (rows,) or a pickled array of dicts, with image_w and image_h
    or another pair of SIZE_NAMES, or a plain array (rows, 2) of numbers, width and height. Raises
    FileNotFoundError, or an InputError that names the row.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such file; it holds the images' sizes, one row per image, with image_w "
            "and image_h (util/convert_data.py writes it)"
        )
    with open(path, "rb") as file:
        if not file.read(6).startswith((NPY, b"\x80", b"c")):  # load_objects reads pickles too
            raise _not_an_array(path)
    sizes = load_objects(path)
    if sizes.shape[:1] != (rows,) or sizes.shape[1:] not in ((), (2,)):
        raise InputError(
            f"{path}: sizes of shape {sizes.shape}, expected {rows}, one per image, of shape "
            f"({rows},) or ({rows}, 2){_other_count(sizes.shape, rows)}"
        )
    pairs = [_pair(size, path, row) for row, size in enumerate(sizes)]
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        sizes = np.array(pairs, np.float32).reshape(rows, 2)
    wrong = ~(np.isfinite(sizes) & (sizes > 0)).all(1)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"{path}: row {row} (from 0): an image of {pairs[row]} pixels")
    return sizes


def _other_count(shape: tuple[int, ...], rows: int) -> str:
    """A hint if the sizes have one row per caption and the boxes one per image, or the reverse."""
    found = shape[0] if shape[1:] in ((), (2,)) and shape else 0
    if found > rows > 0 and found % rows == 0:
        k = found // rows
        return (
            f"; {k} rows of sizes for each image: one per caption? The boxes and features have one "
            f"row per image, so keep every {k}th"
        )
    if rows > found > 0 and rows % found == 0:
        k = rows // found
        return (
            f"; the boxes and features have {k} rows for each row of sizes: one per caption? Then "
            f"repeat each size {k} times, np.repeat(sizes, {k}, 0)"
        )
    return ""


def _pair(size, path: str, row: int) -> tuple[float, float]:
    """Width and height of a row of sizes."""
    try:
        if isinstance(size, (np.ndarray, list, tuple)):
            width, height = size
        else:
            names = size.keys() if isinstance(size, dict) else size.dtype.names
            known = [pair for pair in SIZE_NAMES if set(pair) <= set(names)]
            if len(known) > 1 and known[0] != SIZE_NAMES[0]:
                raise ValueError("two pairs of names")
            width, height = (size[name] for name in known[0])
        return float(width), float(height)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, OverflowError):
        raise InputError(
            f"{path}: row {row} (from 0): expected rows with numbers image_w and image_h, or an "
            f"array (N, 2) of width and height, found {reprlib.repr(size)}"
        ) from None
