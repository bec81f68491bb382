"""scripts/compare_data.py: a dev split that is cut off the training images."""

import numpy as np
import pytest

from caption_images import caption_images
from scripts import compare_data
from util.arrays import read_sizes
from util.cli import InputError


def write_uneven(folder, rng, split, counts, per_caption, shuffle):
    """A split whose images have so many captions; says which is whose, and gives all pairs."""
    n = len(counts)
    images = rng.normal(size=(n, 4, 6)).astype(np.float16)
    of = np.repeat(np.arange(n), counts)
    of = rng.permutation(of) if shuffle else of
    captions = [f"a caption {k} of {image}" for k, image in enumerate(of.tolist())]
    rows = of if per_caption else np.arange(n)
    arrays = {"ims": images, "boxes": rng.random((n, 4, 7)), "num_boxes": rng.integers(1, 5, n)}
    arrays["ims_bbx"] = rng.integers(0, 90, (n, 4, 4))
    arrays["ims_size"] = rng.integers(90, 99, (n, 2))
    for name, array in arrays.items():
        np.save(folder / f"{split}_{name}.npy", array[rows])
    (folder / f"{split}_caps.txt").write_text("".join(f"{x}\n" for x in captions))
    if not per_caption:
        (folder / f"{split}_caption_image.txt").write_text("".join(f"{x}\n" for x in of))


def read_pairs(folder, split):
    """All that belongs to each caption of a split, in the order of images; how many images."""
    captions = (folder / f"{split}_caps.txt").read_text().splitlines()
    images = np.load(folder / f"{split}_ims.npy")
    names = "ims", "ims_bbx", "boxes", "num_boxes"
    arrays = [np.load(folder / f"{split}_{name}.npy") for name in names]
    arrays.append(read_sizes(f"{folder}/{split}_ims_size.npy", len(images)))
    stem = str(folder / split)
    found = caption_images(stem, images, f"{stem}_caps.txt", len(captions))
    pairs = [
        (captions[k], *(array[row].tobytes() for array in arrays))
        for k, row in enumerate(found.rows[found.image_of].tolist())
    ]
    return [pairs[k] for k in found.image_of.argsort(stable=True)], len(found.rows)


@pytest.mark.parametrize("per_caption", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("counts", ["uneven", "one", "some_none", "one_at_the_end"])
def test_cut_data_are_the_pairs_of_the_whole(tmp_path, per_caption, shuffle, counts):
    rng = np.random.default_rng(3)
    for split, n in (("train", 37), ("dev", 11)):
        many = {"one": np.ones(n, int), "some_none": rng.integers(0, 3, n)}
        many = many.get(counts, rng.integers(1, 8, n))
        if counts == "one_at_the_end":
            many[-9:] = 1
        write_uneven(tmp_path, rng, split, many, per_caption, shuffle)
    (tmp_path / "cut").mkdir()
    compare_data.hold_out(tmp_path, tmp_path / "cut")
    (train, n), (old_dev, old_n) = read_pairs(tmp_path, "train"), read_pairs(tmp_path, "dev")
    (kept, n_kept), (dev, n_dev) = (read_pairs(tmp_path / "cut", s) for s in ("train", "dev"))
    assert kept + dev == train and n_kept + n_dev == n and n_dev == n // 10
    assert read_pairs(tmp_path / "cut", "test") == (old_dev, old_n)
    assert len(np.load(tmp_path / "cut/train_ims.npy")) == n_kept  # a row per image
    for name in ("ims", "ims_bbx", "boxes", "num_boxes"):
        new, old = (np.load(x / f"train_{name}.npy") for x in (tmp_path / "cut", tmp_path))
        assert new.dtype == old.dtype


def test_so_many_images_are_held_out_and_test_stays_test(tmp_path):
    rng = np.random.default_rng(3)
    for split, n in (("train", 37), ("dev", 11), ("test", 9)):
        write_uneven(tmp_path, rng, split, rng.integers(1, 8, n), False, True)
    (tmp_path / "cut").mkdir()
    compare_data.hold_out(tmp_path, tmp_path / "cut", 30)
    (kept, n_kept), (dev, n_dev) = (read_pairs(tmp_path / "cut", s) for s in ("train", "dev"))
    assert kept + dev == read_pairs(tmp_path, "train")[0] and (n_kept, n_dev) == (7, 30)
    assert read_pairs(tmp_path / "cut", "test") == read_pairs(tmp_path, "test")
    with pytest.raises(InputError, match="37 training images, too few to cut 37 off"):
        compare_data.hold_out(tmp_path, tmp_path / "cut", 37)


def test_arrays_with_other_rows_than_the_features_are_not_cut(tmp_path):
    rng = np.random.default_rng(3)
    for split in ("train", "dev"):
        write_uneven(tmp_path, rng, split, [5] * 20, True, False)
    (tmp_path / "cut").mkdir()
    for name in ("num_boxes", "boxes", "ims_bbx", "ims_size"):  # a row per image
        whole = np.load(tmp_path / f"train_{name}.npy")
        np.save(tmp_path / f"train_{name}.npy", whole[::5])
        with pytest.raises(InputError, match=f"train_{name}.npy: .*20.* 100|expected 100, one"):
            compare_data.hold_out(tmp_path, tmp_path / "cut")
        np.save(tmp_path / f"train_{name}.npy", whole)
