"""The drawn demo set is reproducible and well formed, and a bag of words does not solve it."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vocab
from data import PrecompDataset
from util import demo_data
from util.cli import InputError

ROOT = Path(demo_data.__file__).parent.parent
SMALL = ["--train", "12", "--dev", "6", "--test", "6"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_layout_and_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo_data.main(["--out", str(tmp_path / name), "--seed", str(seed), *SMALL])
    first, again, other = (contents(tmp_path / name / "demo_precomp") for name in "abc")
    assert first == again
    assert first["train_caps.txt"] != other["train_caps.txt"]
    assert first["train_ims.npy"] != other["train_ims.npy"]
    folder = tmp_path / "a" / "demo_precomp"
    for split, n in (("train", 12), ("dev", 6), ("test", 6)):
        images = np.load(folder / f"{split}_ims.npy")
        assert images.shape == (n, demo_data.REGIONS, demo_data.DIM) and images.dtype == np.float16
        assert np.isfinite(images).all() and (images.std((1, 2)) > 0).all()
        boxes = np.load(folder / f"{split}_ims_bbx.npy")
        assert boxes.shape == (n, demo_data.REGIONS, 4)
        assert (boxes >= 0).all() and (boxes <= demo_data.CANVAS).all()
        assert (boxes[..., 2:] > boxes[..., :2]).all()
        assert np.load(folder / f"{split}_ims_size.npy")["image_w"].tolist() == [128] * n
        ids = (folder / f"{split}_ids.txt").read_text().split()
        with Image.open(folder / "pictures" / split / f"{ids[-1]}.png") as picture:
            assert picture.size == (128, 128)
    words = vocab.build_vocab(str(tmp_path / "a"), "demo_precomp", 1)
    data = PrecompDataset(str(folder), "test", words, demo_data.DIM)
    assert (data.n_images, data.k, data.ids[0]) == (6, 5, "test_00000")


def test_the_default_set_stays_as_it_is(tmp_path):
    """Its captions and boxes do not depend on the machine, so their hashes are known."""
    demo_data.main(["--out", str(tmp_path), *SMALL])
    folder = tmp_path / "demo_precomp"
    expected = {
        "train_caps.txt": "6cdd9605540c61a9",
        "train_ims_bbx.npy": "0db11e035fef735c",
        "dev_caps.txt": "6922d60f927f121c",
        "test_caps.txt": "61709b028f03750b",
        "test_ims_bbx.npy": "840ef4b9e56f2625",
        "test_ims_size.npy": "15c1f17a2843bdd4",
    }
    for name, start in expected.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] == start, name
    assert not list(folder.glob("*_num_boxes.npy"))


@pytest.mark.parametrize(("low", "high"), [(4, 36), (1, 3), (9, 9), (30, 50)])
def test_adaptive_boxes(tmp_path, low, high):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        args = ["--out", str(tmp_path), "--name", name, "--seed", str(seed), *SMALL]
        demo_data.main([*args, "--regions", str(low), str(high)])
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again != other
    drawn = set()
    for split, n in (("train", 12), ("dev", 6), ("test", 6)):
        stem = f"{tmp_path}/a/{split}"
        counts = np.load(f"{stem}_num_boxes.npy")
        assert counts.shape == (n,) and counts.dtype == np.int32
        assert (counts >= low).all() and (counts <= high).all()
        drawn |= set(counts.tolist())
        there = np.arange(high) < counts[:, None]  # (n, high)
        images, boxes = np.load(f"{stem}_ims.npy"), np.load(f"{stem}_ims_bbx.npy")
        assert images.shape == (n, high, demo_data.DIM) and images.dtype == np.float16
        assert boxes.shape == (n, high, 4)
        np.testing.assert_array_equal(images.any(2), there)
        np.testing.assert_array_equal(boxes.any(2), there)
        assert (boxes[..., 2:] > boxes[..., :2])[there].all()
        assert len(np.load(f"{stem}_ims_size.npy")) == n
    assert len(drawn) > 1 or low == high


def test_few_boxes_are_those_of_the_shapes_first():
    rng = random.Random(0)
    for _ in range(20):
        shapes = demo_data.draw_shapes(rng)
        pairs = len(shapes) * (len(shapes) - 1) // 2
        for count in (1, len(shapes), len(shapes) + pairs, len(shapes) + pairs + 1):
            boxes = demo_data.boxes_of(shapes, rng, count)
            assert len(boxes) == count
            shown = sum(
                any(abs(x1 + x2 - 2 * s["x"]) + abs(y1 + y2 - 2 * s["y"]) < 1e-6 for s in shapes)
                for x1, y1, x2, y2 in boxes
                if x2 - x1 < 40
            )
            assert shown >= min(count, len(shapes))
            assert ((0, 0, 128, 128) in boxes) == (count == len(shapes) + pairs + 1)


def test_another_set_in_its_folder_leaves_no_counts(tmp_path):
    demo_data.main(["--out", str(tmp_path), *SMALL, "--regions", "4", "6"])
    assert len(list(tmp_path.glob("demo_precomp/*_num_boxes.npy"))) == 3
    demo_data.main(["--out", str(tmp_path), *SMALL])
    assert not list(tmp_path.glob("demo_precomp/*_num_boxes.npy"))


@pytest.mark.parametrize(("low", "high"), [(9, 3), (0, 5), (-2, 4)])
def test_impossible_numbers_of_regions(tmp_path, low, high):
    with pytest.raises(InputError, match=f"--regions {low} {high}: expected"):
        demo_data.main(["--out", str(tmp_path), "--regions", str(low), str(high)])


def test_twins_need_more_than_a_bag_of_words():
    """A twin has the same kinds, colours and sizes, but two of them are exchanged."""
    rng = random.Random(0)
    for _ in range(100):
        shapes, other = demo_data.draw_twins(rng)
        assert shapes != other
        assert demo_data.is_clear(shapes) and demo_data.is_clear(other)
        for name in ("kind", "colour", "size", "x", "y"):
            assert sorted(s[name] for s in shapes) == sorted(s[name] for s in other)


def test_captions_tell_the_truth():
    rng = random.Random(1)
    a = {"kind": "box", "colour": "red", "size": "small", "x": 20, "y": 60}
    b = {"kind": "moon", "colour": "blue", "size": "large", "x": 100, "y": 64}
    for _ in range(50):
        assert "left" in demo_data.relation(a, b, rng) and "right" in demo_data.relation(b, a, rng)
        text = demo_data.caption([a, b], rng).lower()
        red, blue = text.index("red"), text.index("blue")
        assert ("left" in text) == (red < blue) and ("right" in text) == (blue < red)
        assert "large red" not in text and "small blue" not in text
    a["x"], a["y"] = 100, 10
    assert demo_data.relation(a, b, rng) in ("above", "over", "higher than")
    assert demo_data.relation(b, a, rng) in ("below", "under", "beneath")


@pytest.mark.parametrize("kind", demo_data.KINDS)
def test_every_kind_is_drawn_in_its_colour(kind):
    shape = {"kind": kind, "colour": "green", "size": "large", "x": 64, "y": 64}
    pixels = np.asarray(demo_data.draw_scene([shape], (240, 240, 240))).astype(int)
    n_green = (np.abs(pixels - demo_data.COLOURS["green"]).sum(2) < 30).sum()
    assert 150 < n_green < 35**2


def test_views_tell_sizes_apart():
    weights = demo_data.encoder()
    features = []
    for size in ("small", "large"):
        r = demo_data.SIZES[size][1]
        shape = {"kind": "ball", "colour": "red", "size": size, "x": 64, "y": 64}
        picture = demo_data.draw_scene([shape], (240, 240, 240))
        features.append(
            demo_data.encode_regions(picture, [(64 - r, 64 - r, 64 + r, 64 + r)], weights)
        )
    assert np.abs(features[0] - features[1]).max() > 0.1


def test_runs_by_its_path(tmp_path):
    script = ROOT / "util" / "demo_data.py"
    done = subprocess.run(
        [sys.executable, script, *SMALL], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "demo_precomp" / "train_ims.npy").exists()
