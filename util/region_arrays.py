"""Read region features from .npz files, one per image, and from HDF5 files.

Shapes: R regions, F numbers per region.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from util.arrays import SIZE_NAMES
from util.cli import InputError
from util.file_kinds import kind_of
from util.region_values import Image, Row, check_finite, whole_image

# Names in .npz and HDF5 files, as public extractors write them.
FEATURES = ("features", "x", "image_features", "obj_features")
BOXES = ("boxes", "bbox", "bboxes", "image_bb")
COUNTS = ("num_boxes", "num_bbox")
ID = ("image_id", "img_id")
IDS = (*ID, "image_ids", "ids")  # of all images of an HDF5 file
ZIP = zipfile.BadZipFile, zlib.error  # what reading a damaged archive raises
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
            with np.load(path, allow_pickle=False) as archive:
                return read(lambda names: next((archive[x] for x in names if x in archive), None))
        except InputError:
            raise
        except (ValueError, OSError, EOFError, KeyError, RuntimeError, *ZIP) as error:
            fault = "an array is pickled" if "allow_pickle" in str(error) else error
            raise InputError(
                f"{path}: not a whole .npz file of arrays of numbers ({fault})"
            ) from None

    try:
        image_id = load(lambda get: as_text(get(ID)))
    except InputError:  # damaged, or an id that is pickled
        image_id = None
    return Row(
        path,
        image_id or os.path.splitext(name or os.path.basename(path))[0],
        lambda width, max_boxes: load(lambda get: array_image(get, path, width)),
    )


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
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: not a whole HDF5 file ({error}); copy it again") from None
    with file:
        ids = next((file[name] for name in IDS if name in file), None)
        stacked = [file[x] for x in FEATURES if isinstance(file.get(x), h5py.Dataset)]
        if stacked:
            if ids is None:
                raise InputError(
                    f"{path}: no image ids in it; expected a dataset {' or '.join(IDS)} beside "
                    f"the datasets {', '.join(file)}"
                )
            ids, n = np.reshape(ids[()], -1), (stacked[0].shape or (1,))[0]
            if len(ids) != n:
                raise InputError(f"{path}: {len(ids)} image ids for {n} rows of features")
            for place, image_id in enumerate(ids):
                yield hdf5_row(f"{path}: row {place} (from 0)", as_text(image_id), file, place)
            return
        found = False
        for row in group_rows(path, file, h5py.Group):
            found = True
            yield row
        if not found:
            raise InputError(
                f"{path}: no features in it, expected one of {', '.join(FEATURES)}, but found "
                f"{', '.join(sorted(file)[:10]) or 'nothing'}"
            )


def group_rows(path: str, group, group_type: type, prefix: str = "") -> Iterator[Row]:
    """The images of a group without a dataset of all features: see hdf5_rows."""
    for name in group:
        image_id = name.removesuffix("_features")
        if image_id != name:
            yield hdf5_row(f"{path}: {prefix}{name}", image_id, group, f"{image_id}_")
        elif isinstance(member := group.get(name), group_type):
            if any(x in member for x in FEATURES):
                yield hdf5_row(f"{path}: {prefix}{name}", f"{prefix}{name}", member)
            else:
                yield from group_rows(path, member, group_type, f"{prefix}{name}/")


def hdf5_row(where: str, image_id: str | None, group, key: int | str = "") -> Row:
    """An image of a group. Its datasets are those of all images, and it is at the number `key`; or
    its datasets have the text `key` before their names. Attributes count as datasets.
    """

    def get(names: Iterable[str]) -> np.ndarray | None:
        for name in names:
            if isinstance(key, int) and name in group and group[name].shape:
                return np.asarray(group[name][key])
            if isinstance(key, str) and f"{key}{name}" in group:
                return np.asarray(group[f"{key}{name}"][()])
            if key == "" and name in group.attrs:
                return np.asarray(group.attrs[name])
        return None

    def read(width: int | None, max_boxes: int) -> Image:
        try:
            return array_image(get, where, width)
        except InputError:
            raise
        except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{where}: damaged, or no array of numbers ({error})") from None

    return Row(where, image_id, read)


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
        raise InputError(f"{where}: {names[0]} of type {values.dtype}, expected numbers")
    while values.ndim > 2 and len(values) == 1:
        values = values[0]
    with np.errstate(over="ignore"):  # too large for float32: Inf, which is refused
        return values.astype(np.float32)


def array_image(get: Get, where: str, width: int | None) -> Image:
    """The image of arrays with the names above. Features (F, R) are turned if only that fits.

    The arrays may be longer than the number of boxes. Arrays of one axis hold region by region.
    """
    features, boxes = as_numbers(get, FEATURES, where), as_numbers(get, BOXES, where)
    count = as_numbers(get, COUNTS, where)
    if features is None:
        raise InputError(f"{where}: no features in it, expected one of {', '.join(FEATURES)}")
    if boxes is not None:
        if boxes.size % 4 or (boxes.ndim > 1 and boxes.shape[1:] != (4,)):
            raise InputError(f"{where}: boxes of shape {boxes.shape}, expected (R, 4)")
        boxes = boxes.reshape(-1, 4)
        check_finite(boxes, where, "boxes")
    n = None if count is None else int(count.reshape(-1)[0])
    if n is None and boxes is not None:
        n = len(boxes)
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
    size = None
    for names in SIZE_NAMES:
        if size is None and all(get((name,)) is not None for name in names):
            size = tuple(float(as_numbers(get, (name,), where).reshape(-1)[0]) for name in names)
    return whole_image(features[:n], None if boxes is None else boxes[:n], size, where)
