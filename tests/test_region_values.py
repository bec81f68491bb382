"""Numbers of another type than float32 in tsv files."""

import base64

import numpy as np
import pytest

from tests.extracted import b64, check, fields, made, spoiled, write_tsv
from util.convert_data import convert, main
from util.region_values import decode, likely_size

TYPES = {"<f2": 2e-3, "<f4": 0, "<f8": 0}
SHAPES = [(1, 2048), (36, 2048), (7, 12), (3, 5), (2, 33), (10, 1024), (4, 256)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("regions", "dim"), SHAPES)
def test_files_of_one_type(tmp_path, capsys, dtype, regions, dim):
    images = [made(n, max(regions - n, 1), dim, (640, 480)) for n in range(3)]
    rows = [fields(image, features=dtype, boxes=dtype) for image in images]
    convert([write_tsv(tmp_path / "x.tsv", *rows)], str(tmp_path / "out"))
    check(tmp_path / "out", *images, tolerance=TYPES[dtype])
    assert "warning" not in capsys.readouterr().out  # float16 rounds boxes


@pytest.mark.parametrize("boxes", ["<f4", "<f8", "<i2", "<i4", "<i8", "<u2"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("regions", "dim"), [(36, 2048), (12, 64), (4, 9)])
def test_boxes_of_another_type_than_features(tmp_path, capsys, dtype, boxes, regions, dim):
    images = [made(n, regions, dim, (500, 375)) for n in range(4)]
    images = [image._replace(boxes=np.ceil(image.boxes)) for image in images]
    rows = [fields(image, features=dtype, boxes=boxes) for image in images]
    convert([write_tsv(tmp_path / "x.tsv", *rows)], str(tmp_path / "out"))
    check(tmp_path / "out", *images, tolerance=TYPES[dtype])
    assert "warning" not in capsys.readouterr().out


KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "after a ReLU": lambda rng, shape: 3 * rng.normal(size=shape).clip(0),
    "between 0 and 1": lambda rng, shape: rng.uniform(size=shape),
    "of unit length": lambda rng, shape: rng.normal(size=shape) / shape[1] ** 0.5,
    "large": lambda rng, shape: rng.uniform(10, 60, size=shape),
    "once float16": lambda rng, shape: rng.normal(size=shape).astype(np.float16),
    "integers": lambda rng, shape: rng.integers(0, 99, size=shape),
    "of many magnitudes": lambda rng, shape: np.exp(2 * rng.normal(size=shape)),
    "almost all zero": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.05),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_tell_their_type(kind):
    rng = np.random.default_rng(0)
    for shape in ((36, 2048), (10, 1000), (50, 64)):
        values = KINDS[kind](rng, shape)
        for size in (2, 4, 8):
            raw = np.asarray(values).astype(f"<f{size}").tobytes()
            for like in (2, 4, 8):
                if (kind, like) != ("integers", size):
                    assert likely_size(raw, shape[0], "x", like) == size, (shape, size, like)


def test_one_damaged_row_at_the_start_does_not_decide_the_width(tmp_path, capsys):
    images = [made(n, 4, 12) for n in range(5)]
    half = fields(images[0])
    half[5] = half[5][: len(half[5]) // 2]  # 4 x 6 numbers
    tsv = write_tsv(tmp_path / "x.tsv", half, *map(fields, images))
    convert([tsv], str(tmp_path / "out"))
    check(tmp_path / "out", *images)
    assert "row 1: features holds 96 bytes; expected 4 boxes x 12" in capsys.readouterr().out


def test_files_of_several_types_together(tmp_path):
    images = [made(n, 4, 64) for n in range(6)]
    paths = [
        write_tsv(tmp_path / f"{n}.tsv", fields(image, features=dtype, boxes=dtype))
        for n, (image, dtype) in enumerate(zip(images, [*TYPES, *TYPES], strict=True))
    ]
    convert(paths, str(tmp_path / "out"))
    check(tmp_path / "out", *images, tolerance=2e-3)


def constant(name, dtype: str) -> list[str]:
    """Features that are all 1, of which the values do not tell the type."""
    return spoiled(made(name, 3, 8), 5, b64(np.ones((3, 8)), dtype))


def test_an_unclear_type_is_one_error_and_img_dim_decides(tmp_path, capsys):
    rows = [constant(n, "<f4") for n in range(3)]
    for row in rows:
        row[4] = b64(made(0, 3, 8).boxes, "<f2")
    tsv = write_tsv(tmp_path / "x.tsv", *rows)
    with pytest.raises(ValueError, match="8 float32 or 4 float64.* give --img_dim"):
        convert([tsv], str(tmp_path / "out"))
    main([tsv, "--out", str(tmp_path / "out"), "--img_dim", "8"])
    assert (np.load(tmp_path / "out_ims.npy")[:, :3] == 1).all()
    tsv = write_tsv(tmp_path / "y.tsv", *(fields(made(n, 3, 8)) for n in range(3)))
    for dim in (4, 16):
        with pytest.raises(ValueError, match=f"--img_dim {dim}: the values look like 8 numbers"):
            main([tsv, "--out", str(tmp_path / "out"), "--img_dim", str(dim)])
    with pytest.raises(ValueError, match="row 1: features holds 96 bytes; expected 3 boxes x 9"):
        main([tsv, "--out", str(tmp_path / "out"), "--img_dim", "9"])


@pytest.mark.parametrize("kind", ["constant", "one-hot", "signs"])
@pytest.mark.parametrize(("dtype", "boxes"), [("<f2", "<f4"), ("<f4", "<f8"), ("<f2", "<f8")])
@pytest.mark.parametrize("dim", [64, 2048])
def test_few_different_values_do_not_pass_for_another_type(tmp_path, kind, dtype, boxes, dim):
    values = np.full((3, dim), 0.5)
    if kind == "one-hot":
        values = np.eye(dim)[[1, 5, 9]]
    if kind == "signs":
        values[:, ::2] = -0.5
    images = [made(n, 3, dim)._replace(features=values) for n in range(3)]
    tsv = write_tsv(tmp_path / "x.tsv", *(fields(image, dtype, boxes) for image in images))
    try:
        convert([tsv], str(tmp_path / "out"))
    except ValueError as error:
        assert "the type is not clear; give --img_dim" in str(error)
    else:
        check(tmp_path / "out", *images)
    convert([tsv], str(tmp_path / "out"), img_dim=dim)
    check(tmp_path / "out", *images)


def test_a_usual_width_decides_between_types():
    for like in (2, 4, 8):
        for width in (2048, 1024):
            raw = np.eye(width)[[1, 5, 9]].astype("<f2").tobytes()
            if width == 1024:
                assert likely_size(raw, 3, "x", like) == 2
            elif like > 2:
                with pytest.raises(ValueError, match="1024 float32.*the type is not clear"):
                    likely_size(raw, 3, "x", like)


@pytest.mark.parametrize("n", ["1", "2", "8"])
def test_a_wrong_number_of_boxes_is_no_other_type(tmp_path, n):
    """Half as many boxes of float32 are as long as float64."""
    rows = [spoiled(made(k, 4, 16, (640, 480)), 3, n) for k in range(3)]
    tsv = write_tsv(tmp_path / "x.tsv", *rows)
    with pytest.raises(ValueError, match="'0': .*row 1: .*not in pixels|NaN or Inf|holds"):
        convert([tsv], str(tmp_path / "out"))
    tsv = write_tsv(tmp_path / "x.tsv", *rows[:1], *(fields(made(k, 4, 16)) for k in range(3)))
    convert([tsv], str(tmp_path / "out"))
    check(tmp_path / "out", *(made(k, 4, 16) for k in range(3)))


@pytest.mark.parametrize("index", [4, 5])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_half_of_a_row_is_no_float16(tmp_path, capsys, index, place):
    images = [made(n, 3, 8) for n in range(4)]
    rows = [fields(image) for image in images]
    half = fields(images[1])
    half[index] = half[index][: len(half[index]) // 2]
    rows.insert(place, half)
    convert([write_tsv(tmp_path / "x.tsv", *rows)], str(tmp_path / "out"))
    check(tmp_path / "out", *images)
    said = "boxes holds 24 bytes" if index == 4 else "features holds 48 bytes"
    assert f"row {place + 1}: {said}; expected 3 boxes x" in capsys.readouterr().out


def test_requests_of_the_server_stay_float32():
    values = np.arange(12, dtype="<f4")
    text = base64.b64encode(values.tobytes()).decode()
    np.testing.assert_array_equal(decode(text, 4, 3, "x", "boxes"), values.reshape(3, 4))
    assert decode(text, None, 6, "x", "features").shape == (6, 2)
    for dtype in ("<f2", "<f8"):
        with pytest.raises(
            ValueError, match="boxes holds .* bytes; expected 3 boxes x 4 float32, 48"
        ):
            decode(b64(values, dtype), 4, 3, "x", "boxes")
