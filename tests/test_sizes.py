"""Sizes of images: the forms in which they are read, and those that are refused."""

import numpy as np
import pytest

from util.arrays import read_sizes
from util.cli import InputError

SIZES = [(640, 480), (333, 500), (1, 1024)]


def records(names, dtype="i8"):
    return np.array(SIZES, [(name, dtype) for name in names])


def dicts(names):
    return np.array([dict(zip(names, size, strict=True)) for size in SIZES], dtype=object)


@pytest.mark.parametrize(
    "sizes",
    [
        *(np.array(SIZES, dtype) for dtype in ("i2", "u2", "i8", "f2", "f4", "f8", ">i4", object)),
        records(("image_w", "image_h")),
        records(("width", "height"), "f4"),
        records(("image_width", "image_height")),
        records(("img_w", "img_h"), "u2"),
        records(("w", "h")),
        dicts(("image_w", "image_h")),
        dicts(("width", "height")),
        np.array([{"w": w, "h": h, "id": 7} for w, h in SIZES], dtype=object),
        np.array([{"w": 0, "h": 0, "image_h": h, "image_w": w} for w, h in SIZES], dtype=object),
    ],
)
def test_sizes_are_read_in_their_common_forms(tmp_path, sizes):
    path = str(tmp_path / "train_ims_size.npy")
    np.save(path, sizes, allow_pickle=True)
    got = read_sizes(path, 3)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, SIZES)


@pytest.mark.parametrize("make", [records, dicts])
def test_the_names_say_which_is_the_width(tmp_path, make):
    path = str(tmp_path / "train_ims_size.npy")
    for names in (("image_h", "image_w"), ("height", "width"), ("h", "w")):
        np.save(path, make(names), allow_pickle=True)
        np.testing.assert_array_equal(read_sizes(path, 3), np.array(SIZES)[:, ::-1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (np.array(SIZES[:2]), r"sizes of shape \(2, 2\), expected 3, .* \(3,\) or \(3, 2\)$"),
        (np.array(SIZES * 5), r"sizes of shape \(15, 2\).*5 rows of sizes for each image.*5th"),
        (records(("w", "h"))[:1], r"sizes of shape \(1,\).* 3 rows for each row .*np.repeat"),
        (np.array([*SIZES, (3, 3)]).T, r"sizes of shape \(2, 4\), expected 3"),
        (np.ones((3, 3)), r"sizes of shape \(3, 3\), expected 3"),
        (np.ones((3, 2, 2)), r"sizes of shape \(3, 2, 2\), expected 3"),
        (np.array([*SIZES[:2], (5, 0)]), r"row 2 \(from 0\): an image of \(5.0, 0.0\) pixels"),
        (np.array([*SIZES[:2], (-5, 9)]), r"row 2 \(from 0\): an image of \(-5.0, 9.0\)"),
        (np.array([(np.nan, 5), *SIZES[:2]]), r"row 0 \(from 0\): an image of \(nan, 5.0\)"),
        (np.array([SIZES[0], (5, 1e39), SIZES[1]]), r"row 1 \(from 0\): an image of \(5.0, 1e\+39"),
        (np.array([("a", "b")] * 3), r"row 0 \(from 0\): expected rows with numbers image_w"),
        (np.arange(1, 4), r"row 0 \(from 0\): expected rows with numbers image_w"),
        (records(("x", "y")), "row 0 .*expected rows with numbers image_w"),
        (
            np.array([{"w": 1, "h": 1}, {"w": 1, "height": 1}, {}], dtype=object),
            "row 1 .*expected rows with numbers image_w.*found {.*'height'",
        ),
        (
            np.array([{"w": 1, "h": 1, "width": 5, "height": 5}] * 3, dtype=object),
            "row 0 .*expected rows with numbers image_w",
        ),
    ],
)
def test_other_sizes_are_refused(tmp_path, sizes, message):
    path = str(tmp_path / "train_ims_size.npy")
    np.save(path, sizes, allow_pickle=True)
    with pytest.raises(InputError, match=f"train_ims_size.npy: .*{message}"):
        read_sizes(path, 3)
