"""Which image a caption is of: uneven counts, any order, rows per image or per caption."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluation
import train
from caption_images import CaptionImages, caption_images, first_equal
from data import PrecompDataset
from metrics import i2t, retrieval_metrics, t2i
from tests.conftest import train_args, write_split
from util.cli import InputError
from vocab import Vocabulary, deserialize_vocab

FOLDER = Path("data/tiny_precomp")
COUNTS = [4, 6, 1, 10, 5, 2, 7]


@pytest.fixture
def trained(tiny):
    train.main(train_args(num_epochs=1, val_step=0))
    return tiny


def uneven(order: str, storage: str, folder: Path = FOLDER, split: str = "test") -> list[int]:
    """Write a split of images with COUNTS captions each, and return the image of each caption."""
    write_split(folder, split, len(COUNTS), k=10)
    lines = (folder / f"{split}_caps.txt").read_text().splitlines()
    rows = np.load(folder / f"{split}_ims.npy")
    image_of = [image for image, k in enumerate(COUNTS) for _ in range(k)]
    texts = [lines[10 * image + j] for image, k in enumerate(COUNTS) for j in range(k)]
    if order == "shuffled":
        order = np.random.default_rng(3).permutation(len(texts))
        image_of, texts = ([x[k] for k in order] for x in (image_of, texts))
    (folder / f"{split}_caps.txt").write_text("".join(f"{x}\n" for x in texts))
    if storage.startswith("row per caption"):
        np.save(folder / f"{split}_ims.npy", rows[image_of])
    write_names(folder, split, storage, image_of)
    return image_of


def write_names(folder: Path, split: str, storage: str, image_of: list[int]) -> None:
    """Say which image a caption is of, in one of the ways."""
    names = [f"picture {'abcdefg'[image]}" for image in range(len(COUNTS))]
    if storage in ("ids per caption", "row per caption, ids"):
        lines = [names[image] for image in image_of]
        if storage == "ids per caption":  # rows are in the order in which ids first occur
            rows = np.load(folder / f"{split}_ims.npy")
            first = list(dict.fromkeys(image_of))
            np.save(folder / f"{split}_ims.npy", rows[first])
    elif storage == "names in a table":
        lines = names
        text = "".join(f"{names[image]}\n" for image in image_of)
        (folder / f"{split}_caption_image.txt").write_text(text)
    elif storage == "rows in a table":
        text = "".join(f"{image}\n" for image in image_of)
        (folder / f"{split}_caption_image.txt").write_text(text)
        return
    else:
        return
    (folder / f"{split}_ids.txt").write_text(
        "\ufeff" + "".join(f"{x}\r\n" for x in lines) + "\n", "utf-8"
    )


STORAGE = ["row per caption", "row per caption, ids", "ids per caption", "rows in a table"]
STORAGE += ["names in a table"]


@pytest.mark.parametrize("order", ["in order", "shuffled"])
@pytest.mark.parametrize("storage", STORAGE)
def test_uneven_captions_are_ranked_with_their_images(trained, order, storage, capsys):
    """Against plain counting, over the features that stand beside each caption."""
    image_of = uneven(order, storage)
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    data = PrecompDataset(str(FOLDER), "test", words)
    assert (data.n_images, data.n_captions, data.k) == (len(COUNTS), sum(COUNTS), None)
    same = np.equal.outer(image_of, image_of)
    assert np.array_equal(same, np.equal.outer(data.image_of.numpy(), data.image_of.numpy()))
    plain = train_rows(image_of)
    for caption in range(0, len(data), 5):
        item = data[caption]
        assert item["image_index"] == data.image_of[caption]
        np.testing.assert_array_equal(item["images"], plain[caption])
    if data.ids:
        assert data.ids == [f"picture {'abcdefg'[i]}" for i in dict.fromkeys(sorted_first(data))]

    got = evaluation.evalrank("run/model_best.pth.tar", split="test", save_path="s.npy")
    scores = np.load("s.npy")
    assert scores.shape == (len(COUNTS), len(image_of))
    assert "Images: 7, Captions: 35\nCaptions per image: 1 to 10\n" in capsys.readouterr().out
    i2t_ranks, t2i_ranks = plain_ranks(scores, data.image_of.tolist())
    assert got["i2t"]["r1"] == pytest.approx(100 * np.mean(np.array(i2t_ranks) < 1))
    assert got["t2i"]["r5"] == pytest.approx(100 * np.mean(np.array(t2i_ranks) < 5))
    again = evaluation.eval_ensemble(["s.npy", "s.npy"])  # a file beside tells the images
    assert again == got
    assert evaluation.evalrank(["run/model_best.pth.tar"] * 2, split="test") == got


def train_rows(image_of: list[int]) -> np.ndarray:
    """The features of each caption's image, of the split that `uneven` writes."""
    folder = Path("plain")
    folder.mkdir(exist_ok=True)
    write_split(folder, "test", len(COUNTS), k=10)
    return np.load(folder / "test_ims.npy")[image_of]


def sorted_first(data: PrecompDataset) -> list[int]:
    """The images, as `uneven` numbers them, in the order of the data set's."""
    rows = np.load(Path("plain") / "test_ims.npy")
    images = [data.image_item(k)["images"].numpy() for k in range(data.n_images)]
    return [int(np.argmax([np.array_equal(x, row) for row in rows])) for x in images]


def plain_ranks(scores: np.ndarray, image_of: list[int]) -> tuple[list[int], list[int]]:
    """Ranks from 0 by counting; a wrong candidate with an equal score ranks first."""
    n, m = scores.shape
    i2t_ranks = []
    for i in range(n):
        best = max(scores[i, c] for c in range(m) if image_of[c] == i)
        i2t_ranks.append(sum(scores[i, c] >= best for c in range(m) if image_of[c] != i))
    t2i_ranks = [
        sum(scores[i, c] >= scores[image_of[c], c] for i in range(n) if i != image_of[c])
        for c in range(m)
    ]
    return i2t_ranks, t2i_ranks


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_equal_counting(ties):
    rng = np.random.default_rng(5)
    image_of = rng.permutation(np.repeat(np.arange(9), rng.integers(1, 8, 9)))
    scores = rng.normal(size=(9, len(image_of))).astype(np.float32)
    scores = scores.round() if ties else scores
    want = plain_ranks(scores, image_of.tolist())
    for rank, ranks in zip((i2t, t2i), want, strict=True):
        assert rank(scores, True, image_of)[1][0].tolist() == ranks
    perfect = (np.arange(9)[:, None] == image_of).astype(np.float32)
    assert retrieval_metrics(perfect, image_of=image_of)["rsum"] == 600
    for bad in (image_of[1:], image_of + 1, np.zeros_like(image_of)):
        with pytest.raises(InputError, match="expected the image, from 0, of each caption"):
            i2t(scores, image_of=bad)


@pytest.mark.parametrize("storage", ["row per caption", "rows in a table"])
def test_five_folds_are_folds_of_images(trained, storage):
    uneven("shuffled", storage)
    path = "run/model_best.pth.tar"
    got = evaluation.evalrank(path, split="test", fold5=True)
    saved = evaluation.evalrank(path, split="test", fold5=True, save_path="s.npy")
    assert got == saved == evaluation.eval_ensemble("s.npy", fold5=True)
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    image_of = PrecompDataset(str(FOLDER), "test", words).image_of.numpy()
    scores = np.load("s.npy")
    for fold, metrics in enumerate(got["folds"]):
        images = np.arange(fold * 7 // 5, (fold + 1) * 7 // 5)
        mine = np.isin(image_of, images)
        part, of = scores[images][:, mine], image_of[mine] - images[0]
        assert metrics == retrieval_metrics(part, image_of=of)


def test_no_false_negatives_follows_the_captions(tiny):
    """In a shuffled set two captions of one image are no negatives, wherever they stand."""
    image_of = uneven("shuffled", "row per caption", split="train")
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    data = PrecompDataset(str(FOLDER), "train", words)
    index = torch.tensor([data[k]["image_index"] for k in range(len(data))])
    same = torch.tensor(image_of)
    assert torch.equal(index[:, None] == index, same[:, None] == same)
    train.main(train_args(num_epochs=1, no_false_negatives=True))


def test_dev_is_cut_between_images(tmp_path):
    found = CaptionImages(torch.tensor([2, 5, 9]), torch.tensor([0, 0, 0, 1, 1, 2, 2]), None)
    for most, captions in ((7, 7), (6, 5), (5, 5), (4, 3), (3, 3), (2, 3), (1, 3)):
        cut = found.first(most)
        assert len(cut.image_of) == captions
        assert len(cut.rows) == int(found.image_of[captions - 1]) + 1
    one = CaptionImages(torch.tensor([4]), torch.zeros(9, dtype=torch.long), None)
    assert len(one.first(3).image_of) == 9
    mixed = CaptionImages(torch.tensor([2, 5, 9]), torch.tensor([2, 0, 2, 1, 0]), list("abc"))
    cut = mixed.first(3)
    assert (cut.rows.tolist(), cut.image_of.tolist(), cut.ids) == ([2, 9], [1, 0, 1], ["a", "c"])


def test_rows_are_compared_whole(tmp_path):
    """Images that differ in their last number only are two."""
    rows = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
    rows[3] = rows[1]
    rows[5] = rows[1]
    rows[5, -1, -1] += 1
    rows[4] = rows[0]
    assert first_equal(rows).tolist() == [0, 1, 2, 1, 0, 5]


def find(folder: Path, captions: int) -> CaptionImages:
    stem = str(folder / "test")
    return caption_images(stem, np.load(f"{stem}_ims.npy"), f"{stem}_caps.txt", captions)


def test_ids_of_other_rows_are_refused(tmp_path):
    write_split(tmp_path, "test", 4, k=3, repeat=3)
    (tmp_path / "test_ids.txt").write_text("a\na\na\na\nb\nb\nb\nb\nc\nc\nc\nc\n")
    with pytest.raises(InputError, match=r"rows 0 and 3 \(from 0\) have the id 'a', but not the"):
        find(tmp_path, 12)
    write_split(tmp_path, "test", 4, k=3)
    with pytest.raises(InputError, match=r"name 3 images, but there are 4 rows.*row 3 .*no capti"):
        find(tmp_path, 12)
    (tmp_path / "test_ids.txt").write_text("".join(f"{x}\n" for x in "aabbccdddeee"))
    with pytest.raises(InputError, match="line 10 names an image that has no row"):
        find(tmp_path, 12)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (41, r"41 captions for the 8 rows.*with 5 per image, line 41 has no row"),
        (39, r"39 captions for the 8 rows.*row 7 \(from 0\) gets only 4"),
        (33, r"row 6 \(from 0\) gets only 3"),
        (7, r"7 captions for the 8 rows.*with 1 per image, row 7 \(from 0\) gets only 0"),
    ],
)
def test_counts_that_do_not_fit_name_the_first_row(tmp_path, captions, message):
    write_split(tmp_path, "test", 8)
    with pytest.raises(InputError, match=f"{message}.*test_caption_image.txt"):
        find(tmp_path, captions)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0\n1\n", "2 lines, expected 4, one per caption"),
        ("0\n1\n1\n2\n", "line 4 is '2', expected a row from 0 to 1, or an id"),
        ("0\n1\n-1\n0\n", "line 3 is '-1'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, lines, message):
    write_split(tmp_path, "test", 2)
    (tmp_path / "test_caption_image.txt").write_text(lines)
    with pytest.raises(InputError, match=f"test_caption_image.txt: {message}"):
        find(tmp_path, 4)


@pytest.mark.parametrize("order", [[2, 0, 1, 3], [2, 2, 0, 3]])
def test_a_table_of_rows_beside_as_many_captions(tmp_path, order):
    """As many captions as rows, but a row is not that of the caption at its place."""
    write_split(tmp_path, "test", 4, k=1)
    (tmp_path / "test_caption_image.txt").write_text("".join(f"{row}\n" for row in order))
    found = find(tmp_path, 4)
    assert found.rows[found.image_of].tolist() == order


def test_a_table_of_images_beside_rows_per_caption(tmp_path):
    """Images are numbered from 0, as beside a saved matrix; each caption has a copy."""
    write_split(tmp_path, "test", 3, k=2, repeat=2)
    (tmp_path / "test_caption_image.txt").write_text("0\n0\n1\n1\n2\n2\n")
    found = find(tmp_path, 6)
    assert found.rows.tolist() == [0, 2, 4] and found.image_of.tolist() == [0, 0, 1, 1, 2, 2]


def test_ids_are_compared_as_numbers(tmp_path):
    write_split(tmp_path, "test", 3, k=2)
    (tmp_path / "test_ids.txt").write_text("391895\n60623\n483108\n")
    (tmp_path / "test_caption_image.txt").write_text(
        "000000483108\n60623.0\n 60623\n391895\n483108\n391895\n"
    )
    found = find(tmp_path, 6)
    assert found.image_of.tolist() == [2, 1, 1, 0, 2, 0]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_features_are_named(tmp_path, shape):
    np.save(tmp_path / "test_ims.npy", np.zeros(shape, np.float32))
    (tmp_path / "test_caps.txt").write_text("a dog\n" * 10)
    words = Vocabulary("one_sentence")
    with pytest.raises(InputError, match="test_ims.npy: an array of shape .*, which is empty"):
        PrecompDataset(str(tmp_path), "test", words)


def test_a_damaged_split_does_not_block_another(tmp_path):
    write_split(tmp_path, "test", 4)
    write_split(tmp_path, "train", 4)
    (tmp_path / "train_ims.npy").write_text("version https://git-lfs.github.com/spec/v1")
    assert find(tmp_path, 20).image_of.tolist() == [k // 5 for k in range(20)]


def test_images_without_caption_are_left_out(tmp_path, capsys):
    write_split(tmp_path, "test", 5)
    (tmp_path / "test_caption_image.txt").write_text("3\n1\n3\n")
    found = find(tmp_path, 3)
    assert (found.rows.tolist(), found.image_of.tolist()) == ([1, 3], [1, 0, 1])
    assert "3 of its 5 images have no caption and are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"train": 5, "dev": 5}, None),
        ({"train": 4, "dev": 5}, "12 captions for 3 images are taken as 4 per image.*but 5 in dev"),
        ({"train": 5, "dev": 3}, "15 captions for 3 images are taken as 5 per image.*but 3 in dev"),
        ({"train": 2}, r"6 captions for 3 images are taken as 2 per image.*\(usually 5\)"),
        ({"train": 1}, None),
        ({"train": 1, "dev": 5}, "3 captions for 3 images are taken as 1 per image.*but 5 in dev"),
    ],
)
def test_unusual_counts_are_warned_of(tmp_path, capsys, counts, said):
    for split, k in counts.items():
        write_split(tmp_path, split, 3, k=k)
    stem = str(tmp_path / "train")
    rows = np.load(f"{stem}_ims.npy")
    caption_images(stem, rows, f"{stem}_caps.txt", 3 * counts["train"])
    out = capsys.readouterr().out
    assert bool(out) == bool(said)
    if not said:
        return
    assert re.search(f"warning: .*{said}.*train_caption_image.txt", out)
    text = "".join(f"{c // counts['train']}\n" for c in range(3 * counts["train"]))
    (tmp_path / "train_caption_image.txt").write_text(text)
    caption_images(stem, rows, f"{stem}_caps.txt", 3 * counts["train"])
    assert not capsys.readouterr().out  # it was meant
