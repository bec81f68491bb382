"""Layouts, both storage conventions, order, and every error message about the files."""

import itertools
import os
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import vocab
from data import EpochSampler, PrecompDataset, collate_fn, get_train_loader
from tests.conftest import write_split

ROOT = Path(__file__).parent.parent


@pytest.fixture
def words():
    v = vocab.Vocabulary("one_sentence")
    for word in (*vocab.SPECIAL, "a", "red", "dog", "."):
        v.add_word(word)
    return v


def split(folder, words, name="train", dim=12):
    return PrecompDataset(str(folder), name, words, dim)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("repeated", [False, True])
def test_both_storage_conventions(tmp_path, words, k, repeated):
    write_split(tmp_path, "test", 6, k=k, repeat=k if repeated else 1)
    data = split(tmp_path, words, "test")
    assert (data.n_images, data.n_captions, data.k, len(data)) == (6, 6 * k, k, 6 * k)
    rows = np.load(tmp_path / "test_ims.npy")
    for caption in range(6 * k):
        item = data[caption]
        assert item["image_index"] == caption // k and item["index"] == caption
        want = rows[caption if repeated else caption // k]
        np.testing.assert_array_equal(item["images"].numpy(), want)


def test_equal_photos_are_one_image(tmp_path, words):
    """There is one caption per image, and two photos happen to be the same: a model cannot tell."""
    write_split(tmp_path, "test", 6, k=1)
    rows = np.load(tmp_path / "test_ims.npy")
    rows[4] = rows[0]
    np.save(tmp_path / "test_ims.npy", rows)
    data = split(tmp_path, words, "test")
    assert data.n_images == 5 and data.image_of.tolist() == [0, 1, 2, 3, 0, 4]
    (tmp_path / "test_ids.txt").write_text("".join(f"{x}\n" for x in "abcddf"))
    with pytest.raises(ValueError, match="rows 3 and 4 .* have the id 'd', but not the same feat"):
        split(tmp_path, words, "test")


def test_float16_stays_float16_and_is_mapped(tmp_path, words):
    write_split(tmp_path, "train", 6)
    np.save(tmp_path / "train_ims.npy", np.load(tmp_path / "train_ims.npy").astype(np.float16))
    data = split(tmp_path, words)
    assert isinstance(data.images, np.memmap)
    assert data[0]["images"].dtype == torch.float16


def test_dev_is_cut_at_5000(tmp_path, words):
    np.save(tmp_path / "dev_ims.npy", np.zeros((1014, 1, 2), np.float32))
    (tmp_path / "dev_caps.txt").write_text("a dog\n" * 5070)
    data = split(tmp_path, words, "dev", 2)
    assert (data.n_captions, data.n_images) == (5000, 1000)
    assert len(data.lengths) == 5000
    write_split(tmp_path, "dev", 4)
    assert len(split(tmp_path, words, "dev")) == 20


def test_ids_follow_the_images(tmp_path, words):
    write_split(tmp_path, "test", 4, k=5, repeat=5)
    for ids in (list("abcd"), [x for x in "abcd" for _ in range(5)]):
        (tmp_path / "test_ids.txt").write_text("\n".join(ids))
        assert split(tmp_path, words, "test").ids == list("abcd")
    (tmp_path / "test_ids.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="test_ids.txt: 2 ids for 4 images"):
        split(tmp_path, words, "test")


def test_empty_captions_are_kept_and_counted(tmp_path, words, capsys):
    write_split(tmp_path, "train", 2)
    (tmp_path / "train_caps.txt").write_text("a dog\n\n \n" + "a\n" * 7)
    data = split(tmp_path, words)
    assert data.caption_item(1)["captions"].tolist() == [1, 2]
    assert "2 empty captions (first at line 2)" in capsys.readouterr().out


def test_collate_pads_with_zero(tmp_path, words):
    write_split(tmp_path, "train", 4)
    data = split(tmp_path, words)
    batch = collate_fn([data[i] for i in (0, 7, 19)])
    assert batch["images"].shape == (3, 4, 12)
    assert batch["captions"].shape == (3, batch["lengths"].max())
    for row, length, i in zip(batch["captions"], batch["lengths"], (0, 7, 19), strict=True):
        assert row[:length].tolist() == data[i]["captions"].tolist()
        assert (row[length:] == 0).all()
    assert batch["image_index"].tolist() == [0, 1, 3]
    assert set(collate_fn([data.image_item(0)])) == {"images"}


def bad_float_row(folder):
    rows = np.load(folder / "train_ims.npy")
    rows[3, 2, 1] = np.nan
    np.save(folder / "train_ims.npy", rows)


def truncated(folder):
    path = folder / "train_ims.npy"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    np.save(folder / "train_ims.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "train_ims.npy").unlink(), FileNotFoundError, "no such file"),
        (lambda f: (f / "train_caps.txt").unlink(), FileNotFoundError, "no such caption file"),
        (
            lambda f: (f / "train_caps.txt").write_text("a\n" * 13),
            ValueError,
            "train_caps.txt: 13 captions for the 4 rows",
        ),
        (
            lambda f: np.save(f / "train_ims.npy", np.zeros((4, 4, 7), np.float32)),
            ValueError,
            "regions have 7 numbers, the model expects 12; give --img_dim 7",
        ),
        (
            lambda f: np.save(f / "train_ims.npy", np.zeros((4, 7), np.float32)),
            ValueError,
            r"expected a float16 or float32 array of 3 axes, found float32 of shape \(4, 7\)",
        ),
        (
            lambda f: np.save(f / "train_ims.npy", np.zeros((4, 4, 12), np.int64)),
            ValueError,
            "found int64",
        ),
        (
            lambda f: np.savez(open(f / "train_ims.npy", "wb"), a=np.zeros(3)),
            ValueError,
            "an archive of arrays",
        ),
        (truncated, ValueError, "not a whole .npy array"),
        (pickled, ValueError, "not a whole .npy array"),
        (lambda f: (f / "train_ims.npy").write_bytes(b""), ValueError, "not a whole .npy array"),
        (bad_float_row, ValueError, r"row 3 \(from 0\), region 2 holds NaN or Inf"),
        (
            lambda f: (f / "train_caps.txt").write_bytes(b"a\n" * 7 + b"\xff\n" * 13),
            ValueError,
            "line 8 is not UTF-8",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, words, spoil, error, message):
    write_split(tmp_path, "train", 4)
    spoil(tmp_path)
    with pytest.raises(error, match=message) as raised:
        data = split(tmp_path, words)
        for i in range(len(data)):
            data[i]
    assert "train_" in str(raised.value)


def test_order_follows_from_seed_and_epoch():
    sampler = EpochSampler(50, 8, seed=3)
    first = list(sampler)
    assert len(sampler) == len(first) == 7
    assert sorted(i for batch in first for i in batch) == list(range(50))
    assert list(sampler) == first
    sampler.epoch = 1
    assert list(sampler) != first
    assert list(EpochSampler(50, 8, seed=4)) != first
    again = EpochSampler(50, 8, seed=3)
    again.first = 3
    assert list(again) == first[3:] and len(again) == 4


def test_a_short_last_batch_can_be_left_out():
    whole, cut = EpochSampler(50, 8, seed=3), EpochSampler(50, 8, seed=3, drop_last=True)
    assert list(cut) == list(whole)[:6] and len(cut) == 6
    cut.first = 6  # stopped after the last step
    assert list(cut) == [] and len(cut) == 0
    even = EpochSampler(48, 8, seed=3, drop_last=True)
    assert len(even) == len(list(even)) == 6
    only = EpochSampler(5, 8, seed=3, drop_last=True)  # else nothing would be learned
    assert len(only) == 1 and len(next(iter(only))) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_honours_workers_and_leaves_the_random_state(tmp_path, words, workers):
    write_split(tmp_path, "train", 8)
    loader = get_train_loader(split(tmp_path, words), 16, workers, seed=1)
    assert loader.num_workers == min(workers, os.cpu_count())
    before = torch.get_rng_state()
    batches = [batch["index"].tolist() for batch in loader]
    assert torch.equal(before, torch.get_rng_state())
    assert batches == list(EpochSampler(40, 16, seed=1))


def test_features_larger_than_memory(tmp_path, warm):
    """A sparse file has twice the memory of the machine, and a run may hold 4 GB."""
    folder = tmp_path / "data" / "tiny_precomp"
    folder.mkdir(parents=True)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    regions, dim = 500, 2048
    n = 2 * memory // (4 * regions * dim)
    head = {"descr": "<f4", "fortran_order": False, "shape": (n, regions, dim)}
    with open(folder / "train_ims.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        file.write(np.ones(dim, np.float32).tobytes())  # the first image differs from the second
        file.truncate(file.tell() + 4 * dim * (n * regions - 1))
    assert os.path.getsize(folder / "train_ims.npy") > 1.99 * memory
    np.save(folder / "dev_ims.npy", np.ones((2, regions, dim), np.float32))
    (folder / "train_caps.txt").write_text("a dog\n" * n)
    (folder / "dev_caps.txt").write_text("a dog\na cat\n")
    vocab.main(
        ["--data_path", str(tmp_path / "data"), "--data_name", "tiny_precomp"]
        + ["--out", str(tmp_path / "vocab" / "tiny_precomp_vocab.json")]
    )
    command = (
        f"{ROOT}/train.py --data_path data --data_name tiny_precomp --vocab_path vocab --workers 1 "
    )
    command += "--embed_size 16 --word_dim 8 --batch_size 16 --log_step 1 --device cpu "
    command += "--model_name run --logger_name run --keep_empty_regions"  # else many ends are read
    process = subprocess.Popen(
        [warm, *command.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30)),
    )
    out = list(itertools.takewhile(lambda line: "][5/" not in line, process.stdout))
    process.terminate()
    rest = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, "".join(out) + rest
    assert "saved epoch 0" in rest
