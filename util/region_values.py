"""Images as files hold them, and the type of the numbers of tsv files.

A tsv file does not say whether its numbers are float16, float32 or float64. The bytes of the boxes
do, since each has four numbers. Those of the features do if it is known how many numbers a region
has. Shapes: R regions, F numbers per region.
"""

import base64
import binascii
import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from util.cli import InputError

ITEM_SIZES = (2, 4, 8)  # bytes of float16, float32, float64
USUAL_WIDTHS = (2048, 1024)  # of features, in the field's data sets
LARGEST_PIXEL = 1e6
LONGEST_ID = 200  # characters


class Image(NamedTuple):
    """What a file says of an image. A tsv file always has boxes and size."""

    features: np.ndarray  # (R, F), float32
    boxes: np.ndarray | None  # (R, 4), float32: left, top, right, bottom in pixels
    size: tuple[int, int] | None  # width and height
    filled: bool  # whether regions that are all zero were cut off at the end
    types: tuple[int, int] | None = None  # in tsv files, the bytes of a number of boxes, features


class Row(NamedTuple):
    """An image in a file. `read` decodes it: see util/region_files.py."""

    where: str
    image_id: str | None  # None: the row is too damaged to tell
    read: Callable[[int | None, int], Image]


def is_readable(image_id: str) -> bool:
    """Whether a text can be an id: a line of {out}_ids.txt."""
    return 0 < len(image_id.strip()) <= len(image_id) <= LONGEST_ID and image_id.isprintable()


def whole_number(count: float, where: str) -> int:
    """The number of boxes. Raises InputError if it is none, such as 2.9 or NaN."""
    if not float(count).is_integer():
        raise InputError(f"{where}: num_boxes is {count:g}, expected a whole number")
    return int(count)


def whole_image(
    features: np.ndarray,
    boxes: np.ndarray | None,
    size: tuple[float, float] | None,
    where: str,
) -> Image:
    """The checked image, without the regions at the end whose features are all zero."""
    check_finite(features, where, "features")
    if size is not None and not all(1 <= x < 2**31 for x in size):
        raise InputError(f"{where}: an image of {size[0]:g} x {size[1]:g} pixels")
    regions = int(np.flatnonzero(features.any(1)).max(initial=-1)) + 1
    if not regions:
        raise InputError(f"{where}: the features are all zero; extract that image again")
    return Image(
        features[:regions],
        None if boxes is None else boxes[:regions],
        size and (int(size[0]), int(size[1])),
        regions < len(features),
    )


class Kind(NamedTuple):
    """What an image has: numbers per region, boxes, a size; and the types of the numbers."""

    width: int
    boxes: bool
    size: bool
    types: tuple[int, int] | None


def first_kinds(rows: Iterable[Row], width: int | None = None, count: int = 20) -> list[Kind]:
    """The kinds of the first whole images, read without knowing what the others are like."""
    kinds = []
    for row in rows:
        with contextlib.suppress(InputError):
            image = row.read(width, sys.maxsize)
            has = (x is not None for x in (image.boxes, image.size))
            kinds.append(Kind(image.features.shape[1], *has, image.types))
        if len(kinds) == count:
            break
    return kinds


def raw_bytes(text: str, where: str, field: str) -> bytes:
    """The bytes of base64, which may be broken into lines."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: {field} is not base64 ({error}); the file may be cut") from None


def decode(text: str, columns: int | None, boxes: int, where: str, field: str) -> np.ndarray:
    """Decode float32 in base64 to (boxes, columns); columns None: as many as the length gives."""
    raw = raw_bytes(text, where, field)
    per_box = columns * 4 if columns else 4
    expected = f"float32 for {boxes} boxes"
    if columns:
        expected = f"{boxes} boxes x {columns} float32, {boxes * per_box} bytes"
    if len(raw) % (boxes * per_box) or (columns and len(raw) != boxes * per_box) or not raw:
        raise InputError(f"{where}: {field} holds {len(raw)} bytes; expected {expected}")
    values = np.frombuffer(raw, "<f4").reshape(boxes, -1)
    check_finite(values, where, field)
    return values


def check_finite(values: np.ndarray, where: str, field: str) -> None:
    """Raise InputError if a number is NaN or Inf."""
    if not np.isfinite(values).all():
        raise InputError(f"{where}: NaN or Inf among {field}; extract that image again")


def item_size(raw: bytes, boxes: int, columns: int, where: str, field: str) -> int:
    """The bytes of a number, if there are `columns` of them for each box."""
    size, left = divmod(len(raw), boxes * columns)
    if left or size not in ITEM_SIZES:
        raise InputError(
            f"{where}: {field} holds {len(raw)} bytes; expected {boxes} boxes x {columns} numbers: "
            f"{boxes * columns * 4} bytes of float32, or half or twice as many of float16 or "
            "float64"
        )
    return size


def boxes_of(raw: bytes, size: int, where: str) -> np.ndarray:
    """The boxes (R, 4), float32, of numbers of some bytes. Integers are told by their values.

    Read as floats, small integers are nearly zero: the largest of a box is below 0.001.
    """
    with np.errstate(invalid="ignore"):  # NaN is refused below
        values = np.frombuffer(raw, f"<f{size}").astype(np.float64).reshape(-1, 4)
    check_finite(values, where, "boxes")
    if 0 < np.abs(values).max() < 1e-3:
        values = np.frombuffer(raw, f"<i{size}").astype(np.float64).reshape(-1, 4)
    if np.abs(values).max() > LARGEST_PIXEL:
        raise InputError(
            f"{where}: boxes holds {len(raw)} bytes, {len(values)} boxes x 4 float{8 * size}, but "
            f"then a number is {np.abs(values).max():.3g}, not in pixels; is num_boxes wrong?"
        )
    return values.astype(np.float32)


def features_of(raw: bytes, boxes: int, size: int, where: str) -> np.ndarray:
    """The features (boxes, F), float32, of numbers of some bytes."""
    # NaN, and Inf of a float64 that is too large for a float32, are refused below.
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.frombuffer(raw, f"<f{size}").reshape(boxes, -1).astype(np.float32)
    check_finite(values, where, "features")
    return values


def likely_size(raw: bytes, boxes: int, where: str, like: int) -> int:
    """The bytes of a number for which the values look most like features.

    `like` is that of the boxes. The features usually have the same type.
    """
    sizes = [size for size in ITEM_SIZES if raw and len(raw) % (boxes * size) == 0]
    if not sizes:
        raise InputError(
            f"{where}: features holds {len(raw)} bytes; expected a multiple of {boxes}, the number "
            "of boxes, in float16, float32 or float64"
        )
    if not any(raw):
        return like  # all zero, which is refused later
    # Few values that come again and again look alike in each type.
    alike = has_few_values(raw, like)
    spreads = {size: spread(raw, size) for size in sizes}
    spreads = {size: x for size, x in spreads.items() if x is not None or size == like or alike}
    least = min((x for x in spreads.values() if x is not None), default=0)
    likely = [size for size, x in spreads.items() if x is None or x <= 3 * least + 0.01]
    if like in likely and not alike:
        return like
    if len(likely) > 1:
        likely = [x for x in likely if len(raw) // (boxes * x) in USUAL_WIDTHS] or likely
    if len(likely) == 1:
        return likely[0]
    found = " or ".join(f"{len(raw) // (boxes * x)} float{8 * x}" for x in likely)
    raise InputError(
        f"{where}: features holds {len(raw)} bytes, {boxes} boxes x {found}, and boxes are of "
        f"float{8 * like}: the type is not clear; give --img_dim, the numbers of a region"
    )


def has_few_values(raw: bytes, size: int) -> bool:
    """Whether the numbers are few different ones, such as a constant, or zeros and ones."""
    values = np.frombuffer(raw[: len(raw) // size * size], f"<u{size}")
    return len(np.unique(values)) <= min(32, len(values) // 8)


def spread(raw: bytes, size: int) -> float | None:
    """How far the magnitudes of the values lie apart: the deviation of their exponents of 2.

    It is about 1 or 2 for features. Numbers of twice the right size take their exponents from
    mantissas, and it is several times as large. Of numbers of half the right size, every second
    one is random bits, or zero: it is infinite if the places differ so. None: too few numbers.
    """
    with np.errstate(invalid="ignore"):
        values = np.abs(np.frombuffer(raw, f"<f{size}").astype(np.float64))
    values[~np.isfinite(values)] = 0
    if np.count_nonzero(values) < 8:
        return None
    if size < ITEM_SIZES[-1] and not values[::2].any():
        return np.inf  # the lower halves of round numbers
    parts = ITEM_SIZES[-1] // size  # of the largest number
    if parts > 1 and np.count_nonzero(values) >= 16 * parts:
        places = [values[place::parts] for place in range(parts)]
        each = [np.log2(x[x > 0]).std() if x.any() else np.inf for x in places]
        if max(each) > 4 * min(each) + 0.01:
            return np.inf
    return float(np.log2(values[values > 0]).std())
