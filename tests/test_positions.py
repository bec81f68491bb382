"""Boxes to blocks: compared with a plain loop, and the messages about bad input."""

import numpy as np
import pytest

from tests.conftest import GOLDEN
from util import positions
from util.positions import find_blocks


def one_by_one(box, size, grid, n_blocks):
    """Ids and weights of one box, block after block."""
    x0, y0, x1, y1 = (v / s for v, s in zip(box, (*size, *size), strict=True))
    found = []
    for column in range(grid):
        for row in range(grid):
            width = min(x1, (column + 1) / grid) - max(x0, column / grid)
            height = min(y1, (row + 1) / grid) - max(y0, row / grid)
            overlap = round(width * height * grid**2, 9)
            if width > 0 and height > 0 and overlap > 0:
                found.append((-overlap, column * grid + row))
    found = sorted(found)[:n_blocks]
    total = sum(area for area, _ in found)
    ids = [block for _, block in found] + [grid**2] * (n_blocks - len(found))
    weights = [area / total for area, _ in found] + [0.0] * (n_blocks - len(found))
    return ids, weights


@pytest.mark.parametrize(("grid", "n_blocks"), [(16, 15), (4, 15), (3, 20), (1, 2), (32, 6)])
def test_blocks_are_those_of_a_plain_loop(grid, n_blocks):
    rng = np.random.default_rng(grid)
    sizes = rng.integers(50, 700, (5, 2)).astype(np.float32)
    boxes = np.sort(rng.uniform(-0.1, 1.1, (5, 7, 2, 2)), 2) * sizes[:, None, None]
    boxes = boxes.reshape(5, 7, 4)
    boxes[0, 0] = (0, 0, *sizes[0])  # the whole image: all blocks tie
    boxes[1, 1] = np.round(boxes[1, 1] / np.tile(sizes[1], 2) * grid) / grid * np.tile(sizes[1], 2)
    got = find_blocks(boxes, sizes, grid, n_blocks)
    assert got.shape == (5, 7, 2 * n_blocks) and got.dtype == np.float32
    for i in range(5):
        for r in range(7):
            ids, weights = one_by_one(boxes[i, r].tolist(), sizes[i].tolist(), grid, n_blocks)
            assert got[i, r, :n_blocks].tolist() == ids
            np.testing.assert_allclose(got[i, r, n_blocks:], weights, rtol=1e-6, atol=1e-7)


def test_ids_count_columns_first_and_ties_the_lower_first():
    got = find_blocks([[[40, 0, 60, 10]]], [(160, 160)])[0, 0]
    assert got[:3].tolist() == [4 * 16, 5 * 16, 256] and got[15:18].tolist() == [0.5, 0.5, 0]


def test_a_box_without_area_has_no_block():
    boxes = [[[0, 0, 0, 0], [9, 9, 9, 20], [20, 5, 10, 9], [170, 0, 190, 9]]]
    got = find_blocks(boxes, [(160, 160)])[0]
    assert (got[:, :15] == 256).all() and (got[:, 15:] == 0).all()


def test_the_area_is_in_parts_of_the_image():
    got = find_blocks([[[0, 0, 80, 40]]], [(160, 160)], with_area=True)
    assert got.shape == (1, 1, 31) and got[0, 0, 30] == 0.125


@pytest.mark.parametrize("case", [c for c in GOLDEN if "pfan" in c.name], ids=lambda c: c.name)
def test_published_blocks_keep_the_same_rules(case):
    """The published arrays and ours have these in common: the largest block comes first, of equal
    blocks the one with the lower id; no block follows an empty place; the weights add up to 1.
    """
    for path in case.glob("data/*/*_boxes.npy"):
        ids, weights = np.split(np.load(path)[..., :30], 2, axis=2)
        assert (np.diff(weights) <= 1e-12).all()
        np.testing.assert_allclose(weights.sum(2), 1)
        tied = np.isclose(weights[..., 1:], weights[..., :-1], rtol=1e-12) & (weights[..., 1:] > 0)
        assert tied.any() and (np.diff(ids)[tied] > 0).all()
        assert ((ids == 256) == (weights == 0)).all()


def test_the_tool_writes_what_the_function_finds(tiny_graphs, capsys):
    positions.main(["--data_name", "tiny_precomp"])
    folder = tiny_graphs / "data" / "tiny_precomp"
    boxes = np.load(folder / "dev_ims_bbx.npy")
    sizes = np.array([tuple(x) for x in np.load(folder / "dev_ims_size.npy")])
    np.testing.assert_array_equal(np.load(folder / "dev_boxes.npy"), find_blocks(boxes, sizes))
    assert "dev_boxes.npy: 10 images\n" in capsys.readouterr().out
    (folder / "test_boxes.npy").unlink()
    before = (folder / "dev_boxes.npy").read_bytes()
    positions.main(["--data_name", "tiny_precomp"])  # it makes the missing files
    assert "kept: train_boxes.npy, dev_boxes.npy\n" in capsys.readouterr().out
    assert (folder / "test_boxes.npy").exists()
    with pytest.raises(ValueError, match="train_boxes.npy: exists already; --overwrite"):
        positions.main(["--data_name", "tiny_precomp", "--split_size", "4"])
    assert (folder / "dev_boxes.npy").read_bytes() == before
    positions.main(
        "--data_name tiny_precomp --splits dev --split_size 4 --with_area --overwrite".split()
    )
    assert np.load(folder / "dev_boxes.npy").shape == (10, 4, 31)


def test_boxes_in_parts_of_the_image_are_warned_of(tiny_graphs, capsys):
    stem = tiny_graphs / "data" / "tiny_precomp" / "dev"
    np.save(f"{stem}_ims_bbx.npy", np.full((10, 4, 4), 0.5, np.float32))
    positions.convert(str(stem))
    assert "no number is above 1" in capsys.readouterr().out


def test_chunks_do_not_matter(tiny_graphs):
    stem = str(tiny_graphs / "data" / "tiny_precomp" / "train")
    positions.convert(stem)
    whole = np.load(f"{stem}_boxes.npy")
    positions.convert(stem, chunk=7)
    np.testing.assert_array_equal(np.load(f"{stem}_boxes.npy"), whole)


def spoil(path, row, value):
    array = np.load(path)
    array[row] = value
    np.save(path, array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: spoil(f / "dev_ims_bbx.npy", 3, np.nan), r"dev_ims_bbx.npy: row 3 \(from 0\)"),
        (lambda f: np.save(f / "dev_ims_bbx.npy", np.zeros((10, 4, 5))), "expected .N, R, 4."),
        (lambda f: spoil(f / "dev_ims_size.npy", 2, (0, 9)), r"dev_ims_size.npy: row 2 \(from 0\)"),
        (lambda f: (f / "dev_ims_size.npy").unlink(), "dev_ims_size.npy: no such file"),
        (lambda f: [p.unlink() for p in f.glob("*_bbx.npy")], "no boxes .{split}_ims_bbx.npy."),
    ],
)
def test_bad_input_is_named_and_leaves_no_half_file(tiny_graphs, change, message):
    folder = tiny_graphs / "data" / "tiny_precomp"
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        positions.main(["--data_name", "tiny_precomp"])
    assert not list(folder.glob("dev_boxes*")) and not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data_name", "other"], "no such data folder"),
        (["--data_name", "tiny_precomp", "--n_blocks", "0"], "expected at least 1"),
    ],
)
def test_bad_flags_are_named(tiny_graphs, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        positions.main(flags)


def test_the_area_is_that_within_the_image():
    boxes = [[[-40, 80, 200, 240], [-9, -9, -1, -1], [90, 90, 50, 50], [8, 8, 24, 40]]]
    got = find_blocks(boxes, [(160, 160)], with_area=True)[0, :, 30]
    np.testing.assert_allclose(got, [0.5, 0, 0, 16 * 32 / 160**2], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint16, np.float16])
def test_boxes_of_other_types(tiny_graphs, dtype, capsys):
    stem = str(tiny_graphs / "data" / "tiny_precomp" / "dev")
    boxes = np.load(f"{stem}_ims_bbx.npy").astype(dtype)
    np.save(f"{stem}_ims_bbx.npy", boxes)
    sizes = np.array([tuple(x) for x in np.load(f"{stem}_ims_size.npy")])
    positions.convert(stem)
    np.testing.assert_array_equal(np.load(f"{stem}_boxes.npy"), find_blocks(boxes, sizes))
    assert "warning" not in capsys.readouterr().out


def test_out_is_for_read_only_data(tiny_graphs, capsys, monkeypatch):
    folder = tiny_graphs / "data" / "tiny_precomp"
    before = sorted(folder.iterdir())
    monkeypatch.setenv("HOME", str(tiny_graphs))
    out = tiny_graphs / "new" / "blocks"
    args = ["--data_path", "~/data/", "--data_name", "tiny_precomp/"]
    positions.main([*args, "--out", "~/new/blocks/"])
    said = capsys.readouterr().out
    assert sorted(folder.iterdir()) == before
    assert f"{out}/dev_boxes.npy: 10 images" in said
    assert f"notice: training reads one folder: ln -s {folder}/* {out}" in said
    with pytest.raises(ValueError, match="blocks/train_boxes.npy: exists already; --overwrite"):
        positions.main([*args, "--out", str(out)])
    for path in before:
        (out / path.name).symlink_to(path)
    positions.main([*args])  # the folder of the data has none yet
    for split in ("train", "dev", "test"):
        want = (folder / f"{split}_boxes.npy").read_bytes()
        assert (out / f"{split}_boxes.npy").read_bytes() == want
