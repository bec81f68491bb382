"""Boxes that are not left, top, right, bottom in pixels are noticed, with the likely cause."""

import numpy as np
import pytest

from gsmn_data import GraphDataset
from tests.extracted import Made, fields, made, write_tsv
from util import positions
from util.boxes import BoxCheck
from util.convert_data import convert
from vocab import deserialize_vocab


def draw(rows: int = 40, regions: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right boxes (N, R, 4) in pictures of some sizes (N, 2)."""
    rng = np.random.default_rng(seed)
    sizes = np.where(rng.random((rows, 1)) < 0.7, [(640, 427)], [(480, 640)])
    sizes = sizes + rng.integers(-50, 1, (rows, 2))
    corners = np.sort(rng.random((rows, regions, 2, 2)), axis=2) * sizes[:, None, None]
    return corners.reshape(rows, regions, 4), sizes


def as_sides(boxes, sizes):
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1), sizes


CAUSES = {
    "x, y, width, height": (as_sides, "are they left, top, width, height"),
    "exchanged": (lambda b, s: (b, s[:, ::-1]), "are height and width exchanged"),
    "top, left, bottom, right": (lambda b, s: (b[..., [1, 0, 3, 2]], s), "top, left, bottom, righ"),
    "fractions": (lambda b, s: (b / np.tile(s, 2)[:, None], s), "parts of the picture"),
    "float16 fractions": (
        lambda b, s: ((b / np.tile(s, 2)[:, None] * 1.001).astype(np.float16), s),
        "are they fractions of the image already",
    ),
    "a larger picture": (lambda b, s: (b * 1.6, s), "another scale"),
    "sizes after scaling": (lambda b, s: (b, s / 2), "times as far as the picture"),
    "in parts of 1,000": (lambda b, s: (b / np.tile(s, 2)[:, None] * 1000, s), "another scale"),
    "other order": (lambda b, s: (b[..., [2, 1, 0, 3]], s), "in another order"),
}


def warning(boxes, sizes, capsys, chunk: int = 7, **more) -> str:
    check = BoxCheck()
    for start in range(0, len(boxes), chunk):
        check.add(boxes[start : start + chunk], sizes[start : start + chunk], **more)
    check.warn("x.npy")
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", CAUSES)
def test_the_likely_cause(capsys, kind):
    change, cause = CAUSES[kind]
    said = warning(*change(*draw()), capsys)
    assert said.startswith("warning: x.npy: expected left, top, right, bottom in pixels, but")
    assert cause in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda b, s: b,
        lambda b, s: b.astype(np.float16),
        lambda b, s: np.round(b).astype(int),
        lambda b, s: b + 1,  # counted from 1
        lambda b, s: np.tile([-0.6, -1.2, 0, 0], (*b.shape[:2], 1)) + [0, 0, *s.min(0)],
        lambda b, s: np.zeros_like(b),
    ],
)
def test_right_boxes_and_rounded_ones_are_not_warned_of(capsys, change):
    boxes, sizes = draw()
    assert not warning(change(boxes, sizes), sizes, capsys)


def test_filling_does_not_count(capsys):
    boxes, sizes = draw(regions=4)
    padded = np.pad(boxes, ((0, 0), (0, 96), (0, 0)))
    assert not warning(padded, sizes, capsys)
    fractions = padded / 1000
    assert "no number is above 1" in warning(fractions, sizes, capsys)
    padded[:, 4:] = 1e4  # not zero, but not a region either
    assert not warning(padded, sizes, capsys, chunk=len(boxes), regions=np.full(len(boxes), 4))
    assert "another scale" in warning(padded, sizes, capsys)


def test_the_share_and_the_first_box_are_named(capsys):
    boxes, sizes = draw(rows=25, regions=8)
    sizes[9] = (500, 400)
    boxes[9] = np.minimum(boxes[9], (500, 400, 500, 400))
    boxes[9, 3] = (20, 30, 700, 380.5)
    boxes[20, 1] = (-90, 30, 100, 380)
    said = warning(boxes, sizes, capsys)
    assert "2 of 200 boxes (1.0%) go beyond the picture, the first at row 9 (from 0), re" in said
    assert "region 3: [20.0, 30.0, 700.0, 380.5] in a picture of 500 x 400: did the ext" in said
    check = BoxCheck()
    check.add(boxes[9], sizes[9], name="image 77")
    check.warn("x.tsv")
    assert "the first at image 77, region 3" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["exchanged", "x, y, width, height", "fractions"])
def test_the_converter_warns(tmp_path, capsys, kind):
    boxes, sizes = draw(rows=12)
    right = [made(n, 9, 5) for n in range(12)]
    for change, cause in ((lambda b, s: (b, s), None), CAUSES[kind]):
        images = [
            Made(image.name, image.features, box, tuple(size))
            for image, box, size in zip(right, *change(boxes, sizes), strict=True)
        ]
        tsv = write_tsv(tmp_path / "x.tsv", *map(fields, images))
        convert([tsv], str(tmp_path / "out"))
        said = capsys.readouterr().out
        assert cause in said if cause else not said
    assert "x.tsv: expected left, top, right, bottom" in said


@pytest.mark.parametrize("kind", CAUSES)
def test_positions_and_gsmn_warn(tiny_graphs, capsys, kind):
    folder = tiny_graphs / "data" / "tiny_precomp"
    stem, vocab = str(folder / "dev"), deserialize_vocab("vocab/tiny_precomp_vocab.json")
    capsys.readouterr()
    for change, cause in ((lambda b, s: (b, s), None), CAUSES[kind]):
        boxes, sizes = change(*draw(rows=10, regions=4))
        np.save(f"{stem}_ims_bbx.npy", boxes)
        np.save(f"{stem}_ims_size.npy", sizes)
        positions.convert(stem)
        first = capsys.readouterr().out
        GraphDataset(str(folder), "dev", vocab, 12)
        for said in (first, capsys.readouterr().out):
            assert (cause in said if cause else "expected left" not in said) and "Nan" not in said
