"""Images with different numbers of regions: what fills up the arrays does not change a number."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import systems
import train
from batches import collate_fn
from data import PrecompDataset
from tests.conftest import train_args, write_positions
from tests.serving import make_body, make_scorer
from util.cli import InputError
from vocab import SPECIAL, Vocabulary, deserialize_vocab

FOLDER = Path("data/tiny_precomp")
PATH = "run/checkpoint_0.pth.tar"
SYSTEMS = [
    {"model": "scan", "cross_attn": "t2i"},
    {"model": "scan", "cross_attn": "i2t", "raw_feature_norm": "softmax", "agg_func": "Mean"},
    {"model": "gsmn", "feat_dim": 4, "num_block": 4, "hid_dim": 8},
    {"model": "gsmn", "feat_dim": 4, "num_block": 4, "hid_dim": 8, "neighbours": True},
    {"model": "gsmn", "feat_dim": 4, "num_block": 4, "hid_dim": 8, "is_sparse": True},
    {"model": "pfan", "cross_attn": "t2i"},
    {"model": "pfan_whole", "cross_attn": "i2t"},
    {"model": "pfan_whole", "cross_attn": "t2i", "need_box_whole": True},
    {"model": "chan", "precomp_enc_type": "selfattention", "max_violation": None},
    {"model": "chan", "precomp_enc_type": "transformer", "coding_type": "THACoding"},
    {"model": "chan", "coding_type": "VSACoding", "pooling_type": "MeanPooling"},
]
NAMES = ["-".join(map(str, x.values())) for x in SYSTEMS]


def counts_of(split: str, n: int) -> np.ndarray:
    return np.random.default_rng([*split.encode()]).integers(2, 5, n)


def fill(room: int, counts_file: bool = True) -> None:
    """Give each image of the tiny set 2 to 4 regions, in arrays with room for `room`."""
    for split in ("train", "dev", "test"):
        stem = FOLDER / split
        images, boxes = (np.load(f"{stem}_{x}.npy")[:, :4] for x in ("ims", "ims_bbx"))
        counts = counts_of(split, len(images))
        there = np.arange(room) < counts[:, None]
        for name, x in (("ims", images), ("ims_bbx", boxes)):
            filled = np.zeros((len(x), room, x.shape[2]), np.float32)
            filled[:, :4] = x
            np.save(f"{stem}_{name}.npy", filled * there[..., None])
        write_positions(FOLDER, split)
        path = f"{stem}_num_boxes.npy"
        if counts_file:
            np.save(path, counts.astype(np.int32))
        elif os.path.exists(path):
            os.remove(path)


def scores_of(system: dict, caption: int | None = None) -> np.ndarray:
    """The scores (N, M) of the test split; with a caption (N,), those of the server."""
    if caption is None:
        evaluation.evalrank(PATH, split="test", save_path="s.npy")
        return np.load("s.npy")
    scorer = make_scorer(PATH)
    query = scorer.read(json.dumps(make_body(caption=caption)).encode())
    way = "i2t" if system.get("cross_attn") == "i2t" else "t2i"
    return np.array(scorer.score([query])[0][f"sim_{way}"])


@pytest.mark.parametrize("system", SYSTEMS, ids=NAMES)
def test_filling_changes_nothing(tiny_graphs, system):
    """Neither training (--drop included), nor evaluation, nor what the server answers."""
    trained = []
    for room, counts_file in ((11, False), (4, True)):
        fill(room, counts_file)
        train.main(train_args(num_epochs=1, drop=True, **system))
        trained.append(torch.load(PATH, weights_only=False)["model"])
    for state, other in zip(*trained, strict=True):
        for key in state:
            torch.testing.assert_close(state[key], other[key], rtol=1e-3, atol=1e-3)
    want, close = scores_of(system), {"rtol": 1e-4, "atol": 1e-4}
    for room, counts_file in ((9, True), (30, False)):
        fill(room, counts_file)
        np.testing.assert_allclose(scores_of(system), want, **close)
        if not system.get("is_sparse"):  # a request would need dependencies
            np.testing.assert_allclose(scores_of(system, 7), want[:, 7], **close)
    alone(want, close)
    fill(9, False)
    kept = evaluation.evalrank(PATH, split="test", save_path="s.npy", keep_empty_regions=True)
    assert kept and not np.allclose(np.load("s.npy"), want, atol=1e-3)  # as published


def alone(want: np.ndarray, close: dict) -> None:
    """Some images by themselves, with the regions that they have and no more."""
    model, words, opt = ckpt.load_model(PATH)
    model.eval()
    data = systems.open_split(str(FOLDER), "test", words, opt)
    for image in (0, 3, 7):
        item = data.image_item(image)
        assert len(item["images"]) == counts_of("test", 15)[image]
        captions = collate_fn([data.caption_item(c) for c in range(4)])
        with torch.no_grad():
            encoded = model.encode_images(collate_fn([item])), model.encode_captions(captions)
            one = model.similarity(*encoded)[0]
        np.testing.assert_allclose(one.numpy(), want[image, :4], **close)


@pytest.mark.parametrize("system", SYSTEMS, ids=NAMES)
def test_a_batch_of_uneven_images_is_that_of_each_alone(tiny_graphs, system):
    """What fills up a batch is attended to by nothing: no region, no word, no node of a graph."""
    fill(4)
    flags = [x for x in train_args(**system) if x != "--max_violation"]
    opt = options.parse(flags)
    words = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    data = systems.open_split(str(FOLDER), "train", words, opt)
    torch.manual_seed(0)
    model = ckpt.build_model(opt, len(words)).train()
    items = [data[caption] for caption in range(0, 60, 5)]
    assert len({len(item["images"]) for item in items}) == 3
    images, captions = model(collate_fn(items))
    got = model.similarity(images, captions)
    for row, item in enumerate(items):
        one = model.similarity(model.encode_images(collate_fn([item])), captions)
        torch.testing.assert_close(got[row], one[0], rtol=1e-4, atol=1e-4)


def write_zero_rows(folder: Path, regions: list[int], room: int) -> None:
    """A split of noise with some numbers of regions; the others are zero."""
    rng = np.random.default_rng(0)
    rows = np.zeros((len(regions), room, 3), np.float32)
    for row, n in zip(rows, regions, strict=True):
        row[:n] = rng.normal(size=(n, 3))
    np.save(folder / "test_ims.npy", rows)
    (folder / "test_caps.txt").write_text("a dog\n" * 5 * len(regions))


def open_test(folder: Path, **more) -> PrecompDataset:
    words = Vocabulary("one_sentence")
    for word in SPECIAL:
        words.add_word(word)
    return PrecompDataset(str(folder), "test", words, **more)


def test_what_is_filling(tmp_path, capsys):
    write_zero_rows(tmp_path, [2, 5, 1, 0], 5)
    rows = np.load(tmp_path / "test_ims.npy")
    rows[1, 2] = 0  # a zero region among others is a region
    np.save(tmp_path / "test_ims.npy", rows)
    data = open_test(tmp_path)
    assert data.region_counts.tolist() == [2, 5, 1, 1]
    out = capsys.readouterr().out
    assert "3 of 4 images that were looked at end with regions that are all zero" in out
    assert "warning" in out and "1 of these images, the first in row 3 (from 0), hold no" in out
    assert open_test(tmp_path, keep_empty_regions=True).region_counts.tolist() == [5] * 4
    np.save(tmp_path / "test_num_boxes.npy", np.array([4, 5, 2, 3], np.int64))
    capsys.readouterr()
    assert open_test(tmp_path).region_counts.tolist() == [4, 5, 2, 3]
    assert "notice" not in capsys.readouterr().out
    batch = collate_fn([open_test(tmp_path).image_item(k) for k in range(4)])
    assert torch.equal(batch["filling"], ~batch["region_mask"])
    assert batch["region_mask"].sum(1).tolist() == [4, 5, 2, 3]
    full = collate_fn([open_test(tmp_path).image_item(1)] * 2)
    assert set(full) == {"images"}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2, 3], r"counts of shape \(3,\), expected \(4,\), one per row"),
        ([1, 6, 2, 2], r"row 1 \(from 0\) has 6 regions, expected 1 to 5"),
        ([1, 2, 2, 0], r"row 3 \(from 0\) has 0 regions"),
        ([1, 2, 2.5, 1], r"row 2 \(from 0\) has 2.5 regions"),
        ([[1, 2, 2, 1]], "an array of 1 axes"),
    ],
)
def test_counts_that_do_not_fit_are_named(tmp_path, counts, message):
    write_zero_rows(tmp_path, [2, 5, 1, 3], 5)
    np.save(tmp_path / "test_num_boxes.npy", np.array(counts))
    with pytest.raises(InputError, match=f"test_num_boxes.npy: .*{message}"):
        open_test(tmp_path)


def test_a_whole_image_may_stand_behind_the_filling(tiny_positions):
    """With --need_box_whole the last region that is there is the whole image, wherever."""
    rows = np.load(FOLDER / "test_ims.npy")
    opt = options.parse(["--model", "pfan_whole", "--need_box_whole", "--img_dim", "12"])
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    items = []
    for place in (2, 5):
        filled = np.zeros((len(rows), 6, 12), np.float32)
        filled[:, :2], filled[:, place] = rows[:, :2], rows[:, 3]
        np.save(FOLDER / "test_ims.npy", filled)
        np.save(FOLDER / "test_ims_bbx.npy", np.tile([5.0, 5, 90, 90], (15, 6, 1)))
        write_positions(FOLDER, "test")
        data = systems.of(opt).dataset(str(FOLDER), "test", words, opt)
        items.append(data.image_item(4))
    assert [len(x["images"]) for x in items] == [3, 3]
    for name, x in items[0].items():
        assert torch.equal(x, items[1][name]), name
    filled[3, :2] = 0
    np.save(FOLDER / "test_ims.npy", filled)
    with pytest.raises(InputError, match=r"row 3 \(from 0\) has one region; with --need_box_whole"):
        systems.of(opt).dataset(str(FOLDER), "test", words, opt)
