"""Windows, pooling, boxes from elsewhere, and weights that are read safely."""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow")

from PIL import Image

from tests.tiny_backend import CELLS, DIM, OUT, SIDE, arrays, photo_folder  # noqa: F401
from util import extract_regions
from util.cli import InputError
from util.region_backends import BACKENDS, open_extractor
from util.region_backends.given_boxes import GivenBoxes
from util.region_backends.grid import inside, pool, windows
from util.region_backends.weights import read_state

# Windows and pooling


@pytest.mark.parametrize("cells", range(1, 40))
def test_windows_cover_all_cells_evenly(cells):
    for count in range(1, cells + 1):
        found = windows(cells, count)
        lengths = {end - start for start, end in found}
        assert len(found) == count == len(set(found)) and len(lengths) == 1
        assert found[0][0] == 0 and found[-1][1] == cells
        gaps = [b[0] - a[1] for a, b in pairwise(found)]
        assert max(gaps, default=0) <= 0, "no cell is left out"
        assert max(gaps, default=-1) < 0 or cells < 2 * count, "neighbours overlap"
    with pytest.raises(InputError, match=f"has {cells} cells a side; give at most {cells}"):
        windows(cells, cells + 1)


def test_pooling_is_the_mean_weighted_by_the_overlap():
    rng = np.random.default_rng(0)
    maps = torch.tensor(rng.normal(size=(3, 5, 7)))
    for _ in range(50):
        x, y = np.sort(rng.uniform(0, 7, 2)), np.sort(rng.uniform(0, 5, 2))
        total, area = np.zeros(3), 0.0
        for row in range(5):
            for column in range(7):
                part = max(0, min(x[1], column + 1) - max(x[0], column))
                part *= max(0, min(y[1], row + 1) - max(y[0], row))
                total, area = total + part * maps[:, row, column].numpy(), area + part
        found = pool(maps, torch.tensor([[x[0], y[0], x[1], y[1]]]))[0]
        np.testing.assert_allclose(found, total / area)
    whole = pool(maps, torch.tensor([[0.0, 0, 7, 5]]).double())[0]
    np.testing.assert_allclose(whole, maps.mean((1, 2)))


def test_boxes_are_cut_to_the_picture_and_have_an_area():
    boxes = torch.tensor([[-5.0, -5, 3, 3], [8, 8, 30, 30], [4, 4, 4, 4], [9.9, 9.9, 10, 10]])
    found = inside(boxes, (10, 10))
    expected = [[0, 0, 3, 3], [8, 8, 10, 10], [4, 4, 5, 5], [9, 9, 10, 10]]
    assert found.tolist() == expected
    assert inside(torch.tensor([[0.0, 0, 0.5, 0.5]]), (1, 1)).tolist() == [[0, 0, 1, 1]]


def test_a_window_reads_its_own_part_of_the_picture(monkeypatch):
    """A bright corner changes the windows over it, and no others; their boxes say the same."""
    monkeypatch.setitem(BACKENDS, "tiny", "tests.tiny_backend")
    extractor = open_extractor({"backend": "tiny", "grid": 4}, "cpu")
    dark = Image.new("RGB", (SIDE, SIDE))
    lit = dark.copy()
    lit.paste("white", (0, SIDE - 4, 8, SIDE))  # left, below
    a, b = extractor.extract([dark, lit])
    changed = np.abs(a.features - b.features).max(1) > 1e-6
    over = (b.boxes[:, 0] < 8) & (b.boxes[:, 3] > SIDE - 4)
    assert changed.tolist() == over.tolist() and 0 < over.sum() < 16
    assert extractor.cells == (CELLS, CELLS)


# Boxes from elsewhere


def boxes_of(names: list[str]) -> dict[str, np.ndarray]:
    """Some boxes within 40 x 30, other numbers for each picture."""
    rng = np.random.default_rng(3)
    some = {}
    for k, name in enumerate(names):
        corners = np.sort(rng.uniform(0, 1, (k % 3 + 1, 2, 2)), axis=1) * (40, 30)
        some[name] = corners.reshape(-1, 4).astype(np.float32)
    return some


@pytest.mark.parametrize("form", ["tsv", "npz", "folder", "folder, other size"])
def test_features_in_boxes_from_elsewhere(photos, tmp_path, form):
    names = sorted(x.name for x in photos.iterdir())
    boxes, path = boxes_of(names), tmp_path / "boxes"
    if form == "tsv":
        lines = [f"{x}\t" + "\t".join(map(str, b)) for x in names for b in boxes[x].tolist()]
        path.write_text("".join(f"{line}\n" for line in reversed(lines)))
        boxes = {x: b[::-1] for x, b in boxes.items()}
    elif form == "npz":
        path = tmp_path / "boxes.npz"
        table = np.zeros((len(names), 3, 4), np.float32)
        for k, name in enumerate(names):
            table[k, : len(boxes[name])] = boxes[name]
        np.savez(path, ids=names, boxes=table, num_boxes=[len(boxes[x]) for x in names])
    else:
        path.mkdir()
        for name in names:
            more, scale = {}, 1
            if form != "folder":
                width, height = Image.open(photos / name).size
                more, scale = {"image_w": 2 * width, "image_h": 2 * height}, 2
            padded = np.pad(scale * boxes[name], ((0, 2), (0, 0)))
            n = len(boxes[name])
            stem = name if form == "folder" else os.path.splitext(name)[0]
            np.savez(path / f"{stem}.npz", bbox=padded, num_bbox=n, x=np.zeros((n, 9)), **more)
    flags = ["photos", "--out", str(OUT), "--backend", "tiny", "--boxes", str(path)]
    extract_regions.main(flags)
    found = arrays()
    assert found["ims"].shape == (7, 3, DIM)
    one = open_extractor(extract_regions.read_settings(str(OUT / "test")), "cpu")
    for row, name in enumerate(names):
        n = len(boxes[name])
        assert found["num_boxes"][row] == n and not found["ims"][row, n:].any()
        np.testing.assert_allclose(found["ims_bbx"][row, :n], boxes[name], rtol=1e-5)
        picture = Image.open(photos / name).convert("RGB")
        expected = one.extract([picture], [boxes[name]])[0].features
        np.testing.assert_allclose(found["ims"][row, :n], expected, atol=2e-3)
    with pytest.raises(InputError, match="a picture needs its boxes"):
        one.extract([picture])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("b.jpg\t1\t2\t3\n", "line 1: expected file name, left, top, right, bottom"),
        ("b.jpg\t1\t2\tx\t4\n", "line 1: expected file name"),
        ("b.jpg\t5\t2\t3\t4\n", r"'b.jpg', box 0 .*: \[5.0, 2.0, 3.0, 4.0\]; expected left"),
        ("b.jpg\tnan\t2\t3\t4\n", "'b.jpg', box 0"),
        ("c.jpg\t1\t2\t3\t4\n", "no boxes for 1 of 1 pictures, the first 'b.jpg'"),
    ],
)
def test_boxes_that_are_not_whole_are_refused(tmp_path, text, said):
    (tmp_path / "boxes.tsv").write_text(text)
    with pytest.raises(InputError, match=said):
        GivenBoxes(str(tmp_path / "boxes.tsv"), ["b.jpg"])


def test_boxes_of_another_picture_are_refused(tmp_path):
    (tmp_path / "boxes.tsv").write_text("b.jpg\t1\t2\t3\t4\nb.jpg\t50\t2\t60\t4\n")
    given = GivenBoxes(str(tmp_path / "boxes.tsv"), ["b.jpg"])
    assert given.most == 2 and given.of("b.jpg", (60, 40)).shape == (2, 4)
    with pytest.raises(InputError, match="box 1 .*lies outside of the picture of 40 x 60"):
        given.of("b.jpg", (40, 60))
    assert GivenBoxes(str(tmp_path / "boxes.tsv"), ["b.jpg"], 1).of("b.jpg", (40, 60)).shape[0] == 1
    folder = tmp_path / "folder"
    folder.mkdir()
    box = np.array([[1.0, 2, 3, 4]])
    np.savez(folder / "b.npz", bbox=box, image_w=60, image_h=40)  # not turned as it is seen
    with pytest.raises(InputError, match="those of a picture of 60 x 40, but it has 40 x 60"):
        GivenBoxes(str(folder), ["b.jpg"]).of("b.jpg", (40, 60))
    np.savez(folder / "b.npz", bbox=np.array([{}], object))
    with pytest.raises(InputError, match="b.npz: not a whole .npz file"):
        GivenBoxes(str(folder), ["b.jpg"])
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="x.npz: not a whole .npz file"):
        GivenBoxes(str(tmp_path / "x.npz"), ["b.jpg"])


BOX = np.array([[1.0, 2, 30, 20], [5, 6, 7, 8]])


def digest(path, names, **arrays) -> str:
    np.savez(path, **arrays)
    return GivenBoxes(str(path if path.parent.name != "folder" else path.parent), names).digest


def test_other_boxes_have_another_digest(tmp_path):
    names = ["a.jpg", "b.jpg"]
    path = tmp_path / "x.npz"
    boxes = np.stack([np.concatenate([BOX, BOX[:1]])] * 2)
    found = [digest(path, names, ids=names, boxes=boxes, num_boxes=n) for n in ([1, 3], [3, 1])]
    boxes[:] = BOX[0]
    found += [digest(path, names, ids=names, boxes=boxes, num_boxes=n) for n in ([1, 2], [2, 1])]
    found.append(digest(path, ["a.jpg", "c.jpg"], ids=["a", "c"], boxes=boxes, num_boxes=[2, 1]))
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "a.npz"
    found.append(digest(path, ["a.jpg"], bbox=BOX))
    for size in ({"image_w": 60, "image_h": 40}, {"image_w": 120, "image_h": 80}):
        found.append(digest(path, ["a.jpg"], bbox=BOX, **size))
    assert len(set(found)) == len(found)
    assert digest(path, ["a.jpg"], bbox=BOX) in found


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image_w": 0}, "image_w is '0'; expected a number of pixels"),
        ({"image_h": []}, "image_h is "),
        ({"image_h": np.nan}, "image_h is "),
        ({"image_w": np.inf}, "image_w is "),
        ({"image_w": -60}, "image_w is "),
        ({"image_w": "60"}, "image_w is "),
        ({"num_bbox": []}, "num_bbox: expected a number for each of 1 pictures"),
        ({"num_bbox": "2"}, "num_bbox: expected"),
        ({"num_bbox": -1}, "num_bbox: -1 of picture 0"),
        ({"num_bbox": 3}, "num_bbox: 3 of picture 0 .*; there are 2 boxes"),
        ({"num_bbox": np.nan}, "num_bbox: nan of"),
        ({"num_bbox": 1.5}, "num_bbox: 1.5 of"),
        ({"bbox": BOX.astype(str)}, r"expected bbox or boxes \(R, 4\) of numbers"),
        ({"bbox": BOX[0]}, "expected bbox or boxes"),
        ({"bbox": np.float64(3)}, "expected bbox or boxes"),
    ],
)
def test_a_file_of_boxes_of_a_picture_that_is_wrong(tmp_path, wrong, said):
    good = {"bbox": BOX, "image_w": 60, "image_h": 40, "num_bbox": 2}
    np.savez(tmp_path / "b.npz", **good | wrong)
    with pytest.raises(InputError, match=f"b.npz: {said}") as error:
        GivenBoxes(str(tmp_path), ["b.jpg"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"boxes": BOX[None].astype(str)}, r"expected bbox or boxes \(N, R, 4\) of numbers"),
        ({"boxes": BOX}, "expected bbox or boxes"),
        ({"ids": "b.jpg"}, r"expected ids \(N,\)"),
        ({"ids": [["b.jpg"]]}, r"expected ids \(N,\)"),
        ({"ids": ["b.jpg", "c.jpg"]}, "2 ids, 1 rows of boxes"),
        ({"num_boxes": [1, 1]}, "num_boxes: expected a number for each of 1 pictures"),
        ({"num_boxes": np.array(["x"])}, "num_boxes: expected"),
        ({"num_boxes": -1}, "num_boxes: -1 of picture 0"),
        ({"num_boxes": [9]}, "num_boxes: 9 of picture 0"),
    ],
)
def test_a_file_of_boxes_that_is_wrong(tmp_path, wrong, said):
    path = tmp_path / "x.npz"
    np.savez(path, **{"ids": ["b.jpg"], "boxes": BOX[None], "num_boxes": [2]} | wrong)
    with pytest.raises(InputError, match=f"x.npz: {said}"):
        GivenBoxes(str(path), ["b.jpg"])
    np.save(tmp_path / "y.npy", BOX)
    (tmp_path / "y.npy").rename(path)
    with pytest.raises(InputError, match="x.npz: not a whole .npz file"):
        GivenBoxes(str(path), ["b.jpg"])


def test_boxes_are_given_out_cut_to_the_picture(tmp_path):
    lines = ["-50\t-50\t1e30\t1e30", "10\t-1\t70\t20", "1\t2\t3\t4"]
    (tmp_path / "boxes.tsv").write_text("".join(f"b.jpg\t{x}\n" for x in lines))
    found = GivenBoxes(str(tmp_path / "boxes.tsv"), ["b.jpg"]).of("b.jpg", (60, 40))
    assert found.tolist() == [[0, 0, 60, 40], [10, 0, 60, 20], [1, 2, 3, 4]]
    assert found.dtype == np.float32


# Weights


class Evil:
    def __reduce__(self):
        return os.mkdir, ("run",)


def test_nothing_in_weights_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pth")
    with pytest.raises(InputError, match="evil.pth: .*nothing in it is run"):
        read_state("evil.pth")
    assert not os.path.exists("run")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:100])
    with pytest.raises(InputError, match="cut.pth: not a file of weights"):
        read_state("cut.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(InputError, match="list.pth: expected a state dict"):
        read_state("list.pth")
    with pytest.raises(FileNotFoundError, match="none.pth: no such file of weights"):
        read_state("none.pth")


def test_unknown_names(monkeypatch):
    with pytest.raises(InputError, match="unknown backend 'tim': .*did you mean timm?"):
        open_extractor({"backend": "tim"}, "cpu")
    monkeypatch.setitem(BACKENDS, "tiny", "tests.tiny_backend")
    settings = open_extractor({"backend": "tiny"}, "cpu").settings
    with pytest.raises(InputError, match="other weights than those .* 00000000, expected 11111111"):
        open_extractor(settings | {"weights_sha256": "1" * 64}, "cpu")


@pytest.mark.parametrize("key", ["grid", "regions"])
@pytest.mark.parametrize("count", [-1, -3, 0, True, 2.5, "6"])
def test_counts_that_a_file_of_settings_may_hold(key, count):
    with pytest.raises(InputError, match=f"{key} .*: expected a whole number, at least 1"):
        open_extractor({"backend": "efficientnet_lite", key: count}, "cpu")
