"""PFAN's data: blocks of regions, vectors of whole images, captions, candidate images."""

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import systems
import train
import vocab
from data import collate_fn
from pfan_data import PositionDataset, WholeDataset
from tests.conftest import train_args, write_positions
from util import positions
from vocab import deserialize_vocab


def splits(tiny, system="pfan", split="train", **more):
    words = systems.SYSTEMS[system].vocabulary(
        deserialize_vocab("vocab/tiny_precomp_vocab.json"), options.parse(["--model", system])
    )
    opt = options.parse(["--model", system, "--img_dim", "12"])
    for name, value in more.items():
        setattr(opt, name, value)
    return systems.open_split(str(tiny / "data" / "tiny_precomp"), split, words, opt)


def test_items_and_batches(tiny_positions):
    data = splits(tiny_positions)
    assert isinstance(data, PositionDataset)
    table = np.load(tiny_positions / "data" / "tiny_precomp" / "train_boxes.npy")
    batch = collate_fn([data[i] for i in (0, 7, 99)])
    assert batch["blocks"].dtype == torch.long and batch["overlap"].dtype == torch.float32
    np.testing.assert_array_equal(batch["blocks"], table[[0, 1, 19], :, :15])
    np.testing.assert_array_equal(batch["overlap"], table[[0, 1, 19], :, 15:])
    whole = splits(tiny_positions, "pfan_whole")
    assert isinstance(whole, WholeDataset)
    batch = collate_fn([whole[i] for i in (0, 7)])
    vectors = np.load(tiny_positions / "data" / "tiny_precomp" / "train_who_ims.npy")
    np.testing.assert_array_equal(batch["whole"], vectors[[0, 1]])
    boxed = splits(tiny_positions, "pfan_whole", need_box_whole=True)
    assert boxed[0]["blocks"].shape == (3, 15) and boxed[0]["images"].shape == (4, 12)


def test_area_is_not_read_and_the_whole_box_may_be_missing(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    want = splits(tiny_positions, "pfan_whole", need_box_whole=True)[3]
    write_positions(folder, "train", with_area=True)
    table = np.load(folder / "train_boxes.npy")
    assert table.shape[2] == 31
    np.save(folder / "train_boxes.npy", table[:, :-1])
    got = splits(tiny_positions, "pfan_whole", need_box_whole=True)[3]
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    with pytest.raises(ValueError, match="train_boxes.npy: an array of shape .20, 3, 31., but"):
        splits(tiny_positions, "pfan_whole")


def change(name, row, column, value):
    def spoil(folder):
        array = np.load(folder / name)
        array[row, ..., column] = value
        np.save(folder / name, array)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "train_boxes.npy").unlink(), "no positions, which PFAN needs; make them"),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((20, 5, 30), np.float32)),
            r"shape \(20, 5, 30\), but .* holds 20 images of 4 regions; expected \(20, 4, 2 K\)",
        ),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((4, 30), np.float32)),
            "expected a float16 or float32 array of 3 axes",
        ),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((20, 4, 1), np.float32)),
            r"shape \(20, 4, 1\).* expected \(20, 4, 2 K\), K block ids and K weights",
        ),
        (
            lambda f: np.save(f / "train_boxes.npy", np.zeros((20, 4, 10), np.float32)),
            r"row 0 \(from 0\), region 0: expected 5 block ids",
        ),
        (  # boxes in pixels
            lambda f: np.save(f / "train_boxes.npy", np.full((20, 4, 4), [3, 4, 60, 70.0])),
            r"row 0 \(from 0\), region 0: expected 2 block ids .*: util/positions.py makes them",
        ),
        (
            change("train_boxes.npy", 3, 2, 257),
            r"row 3 \(from 0\), region 0: expected 15 block ids",
        ),
        (change("train_boxes.npy", 3, 2, -1), "block ids from 0 to 256"),
        (change("train_boxes.npy", 3, 2, 1.5), "expected 15 block ids"),
        (change("train_boxes.npy", 3, 2, np.nan), "expected 15 block ids"),
        (change("train_boxes.npy", 3, 17, np.nan), "then 15 weights from 0 to 1"),
        (change("train_boxes.npy", 3, 17, np.inf), "then 15 weights from 0 to 1"),
        (change("train_boxes.npy", 3, 17, -0.5), "then 15 weights from 0 to 1"),
        (lambda f: (f / "train_who_ims.npy").unlink(), "train_who_ims.npy: no such file"),
        (
            lambda f: np.save(f / "train_who_ims.npy", np.zeros((20, 7), np.float32)),
            r"shape \(20, 7\), expected \(20, 12\), a vector for each image",
        ),
        (change("train_who_ims.npy", 5, 3, np.nan), r"train_who_ims.npy: row 5 \(from 0\) holds"),
    ],
)
def test_bad_files_are_named(tiny_positions, spoil, message):
    spoil(tiny_positions / "data" / "tiny_precomp")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data = splits(tiny_positions, "pfan_whole")
        for i in range(len(data)):
            data[i]


@pytest.mark.parametrize("split_size", [4, 32])
def test_blocks_of_another_grid_are_named(tiny_positions, split_size):
    with pytest.raises(ValueError, match=f"it is not made for --split_size {split_size}"):
        data = splits(tiny_positions, split_size=split_size)
        for i in range(len(data)):
            data[i]


def test_other_grids_and_numbers_of_blocks(tiny_positions):
    positions.main(
        "--data_name tiny_precomp --split_size 4 --n_blocks 6 --with_area --overwrite".split()
    )
    # The file says how many blocks there are.
    train.main(train_args(num_epochs=1, model="pfan", position="only", split_size=4))
    opt = ckpt.load("run/checkpoint_0.pth.tar")["opt"]
    assert (opt.split_size, opt.n_blocks) == (4, 6)
    metrics = evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", save_path="x.npy")
    # So does the file that a checkpoint is tested on. Here it has more blocks, which add nothing.
    for split in ("test", "dev"):
        path = f"data/tiny_precomp/{split}_boxes.npy"
        ids, weights, _ = np.split(np.load(path), [6, 12], axis=2)
        more = np.full_like(ids[..., :3], 16), np.zeros_like(ids[..., :3])
        np.save(path, np.concatenate([ids, more[0], weights, more[1]], 2))
    evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", save_path="y.npy")
    np.testing.assert_allclose(np.load("y.npy"), np.load("x.npy"), rtol=1e-5)
    assert metrics["rsum"] > 0


def test_a_vocabulary_of_other_captions_is_warned_of(tiny_positions, capsys):
    splits(tiny_positions)
    assert "not in the vocabulary" not in capsys.readouterr().out
    (tiny_positions / "data" / "tiny_precomp" / "train_caps.txt").write_text(
        "zebra wolf red\n" * 100
    )
    for system in ("pfan", "pfan_whole"):
        splits(tiny_positions, system)
        said = "train_caps.txt: 200 of its 300 words are not in the vocabulary"
        assert said in capsys.readouterr().out


def test_whole_images_have_captions_and_words_of_their_own(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    assert splits(tiny_positions, "pfan_whole")[0]["captions"].tolist()[1] == 4  # of _caps.txt
    (folder / "train_sent_caps.txt").write_text("red zebra\n" * 100)
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    red = words("red")
    assert splits(tiny_positions, "pfan_whole")[0]["captions"].tolist() == [1, red, 0, 2]
    assert splits(tiny_positions, "pfan")[0]["captions"].tolist()[1] == 4
    (folder / "train_caps.txt").write_text("red zebra\n" * 100)
    assert splits(tiny_positions, "pfan")[0]["captions"].tolist() == [1, red, 3, 2]  # <unk>


def test_splits_must_have_one_kind_of_captions(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    (folder / "train_sent_caps.txt").write_text("red dog\n" * 100)
    with pytest.raises(
        FileNotFoundError, match="dev_sent_caps.txt: no such file, but there is .*tra"
    ):
        splits(tiny_positions, "pfan_whole", "dev")
    assert len(splits(tiny_positions, "pfan", "dev")) == 50


def test_the_vocabulary_of_whole_images_has_its_own_name(tiny_positions):
    folder = tiny_positions / "data" / "tiny_precomp"
    for split in ("train", "dev"):
        captions = (folder / f"{split}_caps.txt").read_text()
        (folder / f"{split}_sent_caps.txt").write_text(captions.replace("red", "crimson"))
    vocab.main(["--data_path", "data", "--data_name", "tiny_precomp", "--sent"])
    opt = options.parse(["--model", "pfan_whole", "--data_name", "tiny_precomp"])
    path = systems.of(opt).vocab_file("vocab", opt.data_name)
    assert path == "vocab/tiny_precomp_sent_vocab.json"
    words = deserialize_vocab(path)
    assert "crimson" in words.word2idx and "red" not in words.word2idx
    train.main(train_args(num_epochs=1, model="pfan_whole"))
    state = ckpt.load("run/checkpoint_0.pth.tar")
    stored = ckpt.find_vocab(state, "run/checkpoint_0.pth.tar")
    assert stored.word2idx == words.word2idx and stored("zebra") == 0
    opt.model = "scan"
    assert systems.of(opt).vocab_file("vocab", opt.data_name) == "vocab/tiny_precomp_vocab.json"


def test_one_caption_an_image(tiny_positions):
    """Tencent-News has one caption per image; the training split may have one, too."""
    folder = tiny_positions / "data" / "tiny_precomp"
    for split in ("train", "dev"):
        captions = (folder / f"{split}_caps.txt").read_text().splitlines()[::5]
        (folder / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    train.main(train_args(num_epochs=1, model="pfan_whole"))
    assert splits(tiny_positions, "pfan_whole", "dev").k == 1


def test_a_table_counts_before_candidate_images(tiny_positions):
    """15 rows and 5 captions could be three images per caption, but a table names two images."""
    folder = tiny_positions / "data" / "tiny_precomp"
    captions = (folder / "test_caps.txt").read_text().splitlines()[:5]
    (folder / "test_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    (folder / "test_caption_image.txt").write_text("7\n2\n7\n7\n2\n")
    data = splits(tiny_positions, "pfan_whole", "test")
    assert (data.n_images, data.candidates) == (2, 1)
    assert data.rows[data.image_of].tolist() == [7, 2, 7, 7, 2]


def test_a_test_split_may_have_candidate_images(tiny_positions, capsys):
    folder = tiny_positions / "data" / "tiny_precomp"
    train.main(train_args(num_epochs=1, model="pfan_whole"))
    captions = (folder / "test_caps.txt").read_text().splitlines()[:5]
    (folder / "test_caps.txt").write_text("".join(f"{c}\n" for c in captions))
    (folder / "test_ids.txt").write_text("".join(f"{k}\n" for k in range(15)))
    data = splits(tiny_positions, "pfan_whole", "test")
    assert (data.n_images, data.n_captions, data.candidates) == (15, 5, 3)
    assert [data[i]["image_index"] for i in range(5)] == [0, 3, 6, 9, 12] and len(data.ids) == 15
    assert "5 captions for 15 images, so 3 candidate images per caption" in capsys.readouterr().out
    metrics = evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", save_path="s.npy")
    scores = np.load("s.npy")
    assert scores.shape == (15, 5)
    # The rank of a caption is that of the best of its images; an image has one caption.
    ranks = [int((scores[:, c] > scores[3 * c : 3 * c + 3, c].max()).sum()) for c in range(5)]
    assert metrics["t2i"]["r1"] == 100 * np.mean([r < 1 for r in ranks])
    ranks = [int((scores[i] > scores[i, i // 3]).sum()) for i in range(15)]
    assert metrics["i2t"]["r1"] == pytest.approx(100 * np.mean([r < 1 for r in ranks]))
    folds = evaluation.evalrank("run/checkpoint_0.pth.tar", split="test", fold5=True)
    assert folds["t2i"]["r1"] == 100.0 and folds["i2t"]["meanr"] == 1.0  # one caption per fold
    with pytest.raises(ValueError, match="train_caps.txt: 5 captions for the 20 rows"):
        (folder / "train_caps.txt").write_text("a\n" * 5)
        splits(tiny_positions, "pfan_whole")
    with pytest.raises(ValueError, match="test_caps.txt: 5 captions for the 15 rows"):
        splits(tiny_positions, "pfan", "test")  # for other systems it is half a file
    (folder / "test_ids.txt").write_text("".join(f"{k}\n" for k in range(5)))
    with pytest.raises(ValueError, match="5 ids for 15 images"):
        splits(tiny_positions, "pfan_whole", "test")
