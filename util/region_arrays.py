"""Read region features from .npz files, one per image, and from HDF5 files.

Shapes: R regions, F numbers per region.
"""

import contextlib
import math
import os
import reprlib  # what repr() says of a hostile file may have no end
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from util.arrays import SIZE_NAMES
from util.cli import InputError
from util.file_kinds import kind_of
from util.image_ids import shown
from util.json_file import first_line
from util.npy_reader import LARGEST_MEMBER, ZIP_ERRORS, NpzFile, PickledArray, type_name
from util.region_values import Image, Row, check_finite, is_readable, whole_image, whole_number

# Names in .npz and HDF5 files, as public extractors write them.
FEATURES = ("features", "x", "image_features", "obj_features")
BOXES = ("boxes", "bbox", "bboxes", "image_bb")
COUNTS = ("num_boxes", "num_bbox")
ID = ("image_id", "img_id")
IDS = (*ID, "image_ids", "ids")  # of all images of an HDF5 file
# What h5py raises for a damaged file.
HDF5_ERRORS = OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError
Get = Callable[[Iterable[str]], np.ndarray | None]  # the first of some names that is there


def folder_rows(path: str) -> Iterator[Row]:
    """The .npz files in a folder and the folders in it, by name.

    If some have equal names, the path from the folder is the id, so they stay apart.
    """
    found = []
    for folder, folders, files in os.walk(path):
        folders.sort()
        names = [name for name in sorted(files) if name.lower().endswith(".npz")]
        found += [os.path.join(folder, name) for name in names]
    distinct = len({os.path.basename(file) for file in found}) == len(found)
    for file in found:
        name = os.path.basename(file) if distinct else os.path.relpath(file, path)
        yield npz_row(file, name.replace(os.sep, "/"))
    if not found:
        raise InputError(
            f"{path}: no .npz files in this folder; name tsv and HDF5 files themselves"
        )


def npz_row(path: str, name: str | None = None) -> Row:
    """The image of a .npz file. Its id is in the file, or `name`; None: the file's name."""

    def load(read: Callable[[Get], Image | str | None]):
        try:
            with open(path, "rb") as file:
                if file.read(2) != b"PK":
                    kind = kind_of(path) or "bytes of another kind"
                    raise InputError(f"{path}: expected a .npz file, found {kind}")
            with NpzFile(path) as archive:
                return read(lambda names: first_of(map(archive.get, names)))
        except InputError:
            raise
        except (OSError, *ZIP_ERRORS) as error:
            raise InputError(
                f"{path}: not a whole .npz file of arrays of numbers ({first_line(str(error))})"
            ) from None

    image_id, fault = os.path.splitext(name or os.path.basename(path))[0], None
    try:
        image_id = load(own_id) or image_id
    except InputError as error:
        fault = error

    def image(width: int | None, max_boxes: int) -> Image:
        if fault:  # it may be of another image than its name says
            raise fault
        return load(lambda get: array_image(get, path, width))

    return Row(path, image_id if is_readable(image_id) else None, image)


def first_of(values: Iterable):
    """The first value that is not None, if there is one."""
    return next((value for value in values if value is not None), None)


def own_id(get: Get) -> str | None:
    """The id that an archive holds; None: none, or a pickled one."""
    with contextlib.suppress(PickledArray):
        return as_text(get(ID))


def hdf5_rows(path: str) -> Iterator[Row]:
    """The images of an HDF5 file, in any of these layouts:

    - a group per image, called by its id, with the datasets of an image;
    - datasets {id}_features and {id}_boxes;
    - datasets of all images, and their ids: the first axis is the image. Arrays of variable length
      hold the numbers of all regions.
    """
    try:
        import h5py
    except ImportError:
        raise InputError(
            f"{path}: an HDF5 file, which needs h5py, which is not installed: pip install h5py"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            yield from rows_of(path, file, h5py.Group, h5py.Dataset)
    except InputError:
        raise
    except HDF5_ERRORS as error:
        raise InputError(
            f"{path}: not a whole HDF5 file ({first_line(str(error))}); copy it again"
        ) from None


def rows_of(path: str, file, group_type: type, dataset_type: type) -> Iterator[Row]:
    """The images of an open HDF5 file; it may raise HDF5_ERRORS."""
    ids = first_of(file.get(name) for name in IDS)
    stacked = first_of(x for name in FEATURES if isinstance(x := file.get(name), dataset_type))
    if stacked is None:
        found = False
        for row in group_rows(path, file, group_type, {file}):
            found = True
            yield row
        if not found:
            raise InputError(
                f"{path}: no features in it, expected one of {', '.join(FEATURES)}, but found "
                f"{', '.join(sorted(file)[:10])[:200] or 'nothing'}"
            )
        return
    if ids is None:
        raise InputError(
            f"{path}: no image ids in it; expected a dataset {' or '.join(IDS)} beside the "
            f"datasets {', '.join(sorted(file)[:10])[:200]}"
        )
    ids, n = np.reshape(content(ids), -1), (stacked.shape or (1,))[0]
    if len(ids) != n:
        raise InputError(f"{path}: {len(ids)} image ids for {n} rows of features")
    for place, image_id in enumerate(ids):
        yield hdf5_row(f"{path}: row {place} (from 0)", as_text(image_id), file, place)


def group_rows(path: str, group, group_type: type, seen: set, prefix: str = "") -> Iterator[Row]:
    """The images of a group without a dataset of all features: see hdf5_rows.

    Groups may hold each other: what is in those of `seen` is not looked for again.
    """
    for name in group:
        image_id = name.removesuffix("_features")
        where = f"{path}: {shown(prefix + name)}"
        if image_id != name:
            yield hdf5_row(where, image_id, group, f"{image_id}_")
        elif isinstance(member := group.get(name), group_type):
            if any(x in member for x in FEATURES):
                yield hdf5_row(where, f"{prefix}{name}", member)
            elif member not in seen:
                seen.add(member)
                yield from group_rows(path, member, group_type, seen, f"{prefix}{name}/")


def content(dataset, row: int | None = None) -> np.ndarray:
    """What an HDF5 dataset holds, or its row. Raises ValueError if it is larger than an image's."""
    shape = dataset.shape if row is None else dataset.shape[1:]
    if math.prod(shape) * dataset.dtype.itemsize > LARGEST_MEMBER:
        raise ValueError(f"shape {shape}, more than an image has")
    return np.asarray(dataset[()] if row is None else dataset[row])


def hdf5_row(where: str, image_id: str | None, group, key: int | str = "") -> Row:
    """An image of a group. Its datasets are those of all images, and it is at the number `key`; or
    its datasets have the text `key` before their names. Attributes count as datasets.
    """

    def get(names: Iterable[str]) -> np.ndarray | None:
        for name in names:
            if isinstance(key, int) and name in group and group[name].shape:
                return content(group[name], key)
            if isinstance(key, str) and f"{key}{name}" in group:
                return content(group[f"{key}{name}"])
            if key == "" and name in group.attrs:
                return np.asarray(group.attrs[name])
        return None

    def read(width: int | None, max_boxes: int) -> Image:
        try:
            return array_image(get, where, width)
        except InputError:
            raise
        except HDF5_ERRORS as error:
            said = first_line(str(error))
            raise InputError(f"{where}: damaged, or no array of numbers ({said})") from None

    return Row(where, image_id if image_id and is_readable(image_id) else None, read)


def as_text(value: np.ndarray | None) -> str | None:
    """An id as text: a number, a text, or an array of one of these."""
    if value is None or np.size(value) != 1:
        return None
    value = np.asarray(value).reshape(-1)[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def as_numbers(get: Get, names: tuple[str, ...], where: str) -> np.ndarray | None:
    """The array with the first of some names that is there, without axes of length 1 in front."""
    values = get(names)
    if values is None:
        return None
    if values.dtype.kind not in "fiu":
        raise InputError(f"{where}: {names[0]} of type {type_name(values.dtype)}, expected numbers")
    while values.ndim > 2 and len(values) == 1:
        values = values[0]
    with np.errstate(over="ignore"):  # too large for float32: Inf, which is refused
        return values.astype(np.float32)


def as_number(get: Get, names: tuple[str, ...], where: str) -> float | None:
    """The number with the first of some names that is there; of several, the first."""
    values = as_numbers(get, names, where)
    if values is None:
        return None
    if not values.size or not np.isfinite(values.flat[0]):
        raise InputError(f"{where}: {names[0]} is {reprlib.repr(values)}, expected a number")
    return float(values.flat[0])


def array_image(get: Get, where: str, width: int | None) -> Image:
    """The image of arrays with the names above. Features (F, R) are turned if only that fits.

    The arrays may be longer than the number of boxes. Arrays of one axis hold region by region.
    """
    features, boxes = as_numbers(get, FEATURES, where), as_numbers(get, BOXES, where)
    count = as_number(get, COUNTS, where)
    if features is None:
        raise InputError(f"{where}: no features in it, expected one of {', '.join(FEATURES)}")
    if boxes is not None:
        if boxes.size % 4 or (boxes.ndim > 1 and boxes.shape[1:] != (4,)):
            raise InputError(f"{where}: boxes of shape {boxes.shape}, expected (R, 4)")
        boxes = boxes.reshape(-1, 4)
        check_finite(boxes, where, "boxes")
    n = None if count is None else whole_number(count, where)
    if n is None and boxes is not None:
        n = len(boxes)
    features = np.atleast_1d(features)
    if features.ndim == 1 and n and features.size % n == 0:
        features = features.reshape(n, -1)
    rows = {n, None if boxes is None else len(boxes)} - {None}
    if features.ndim == 2 and len(features) not in rows and features.shape[1] in rows:
        features = features.T
    n = len(features) if n is None else n
    known = features.ndim == 2 and (boxes is None or len(features) in rows)
    if (
        not known
        or not 1 <= n <= min([len(features), *rows])
        or width not in (None, features.shape[1])
    ):
        raise InputError(
            f"{where}: features of shape {features.shape} for {n} boxes, expected "
            f"({n}, {width or 'F'})"
        )
    sizes = ([as_number(get, (name,), where) for name in names] for names in SIZE_NAMES)
    size = next((size for size in sizes if None not in size), None)
    return whole_image(features[:n], None if boxes is None else boxes[:n], size, where)
