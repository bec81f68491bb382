"""GSMN's data: boxes, image sizes, word ids and dependency graphs."""

import json

import numpy as np
import pytest
import torch

from data import collate_fn
from gsmn_data import GraphDataset
from util.arrays import read_sizes
from util.cli import InputError
from vocab import deserialize_vocab


def dataset(split="train", dependencies=True, **more):
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    return GraphDataset("data/tiny_precomp", split, words, 12, dependencies, **more)


def test_items_and_batches(tiny_graphs):
    data = dataset()
    sizes = np.load("data/tiny_precomp/train_ims_size.npy")
    boxes = np.load("data/tiny_precomp/train_ims_bbx.npy")
    batch = collate_fn([data[7], data[60]])
    w, h = sizes["image_w"][[1, 12]], sizes["image_h"][[1, 12]]
    scale = np.stack([w, h, w, h], 1)[:, None]
    np.testing.assert_allclose(batch["boxes"], boxes[[1, 12]] / scale, rtol=1e-6)
    assert batch["boxes"].max() <= 1
    for row, length in zip(batch["adjacency"], batch["lengths"].tolist(), strict=True):
        # The chain 1 - 2 - ... of the words; <start> and <end> stand alone.
        want = torch.eye(length)
        for i in range(1, length - 2):
            want[i, i + 1] = want[i + 1, i] = 1
        torch.testing.assert_close(row[:length, :length], want)
        assert not row[length:].any() and not row[:, length:].any()


def test_word_ids_come_from_the_precomputed_file_if_there_is_one(tiny_graphs):
    path = tiny_graphs / "data" / "tiny_precomp" / "train_precaps_stan.txt"
    lines = path.read_text().splitlines()
    lines[3] = "1,5,4,2"
    path.write_text("\n".join(lines))
    assert dataset()[3]["captions"].tolist() == [1, 5, 4, 2]
    path.unlink()
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    caption = (path.parent / "train_caps.txt").read_text().splitlines()[3]
    assert dataset()[3]["captions"].tolist() == words.encode(caption)


def test_damaged_sizes(tiny_graphs):
    path = "data/tiny_precomp/train_ims_size.npy"
    np.save(path, np.array([{"image_w": 1, "image_h": 2}] * 20, dtype=object), allow_pickle=True)
    whole = open(path, "rb").read()
    for cut in (3, 60, len(whole) - 20):
        open(path, "wb").write(whole[:cut])
        with pytest.raises(InputError, match="train_ims_size.npy: (not a whole|refused)"):
            read_sizes(path, 20)
    for rows, message in (
        ([{"image_w": 1}] * 20, "expected rows with numbers image_w and image_h"),
        ([3] * 20, "expected rows with numbers image_w and image_h"),
        ([{"image_w": 0, "image_h": 4}] * 20, r"row 0 \(from 0\): an image of \(0.0, 4.0\) pixels"),
        ([{"image_w": 1, "image_h": 4}] * 19, "sizes of shape .19,., expected 20"),
        ({"image_w": 1, "image_h": 4}, r"sizes of shape \(\), expected 20"),
        ([{"image_w": 10**400, "image_h": 4}] * 20, "expected rows with numbers image_w"),
    ):
        np.save(path, np.array(rows, dtype=object), allow_pickle=True)
        with pytest.raises(InputError, match=message):
            read_sizes(path, 20)


def edit_json(path, edit):
    lists = json.loads(path.read_text())
    edit(lists)
    path.write_text(json.dumps(lists))


def test_bad_graph_files(tiny_graphs):
    folder = tiny_graphs / "data" / "tiny_precomp"
    path = folder / "train_caps.json"
    whole = path.read_text()
    for edit, message in (
        (lambda x: x.pop(), "train_caps.json: 99 captions, expected 100"),
        (lambda x: x[4].append([1, -2]), "caption 5: expected a list of .governor, dependent"),
        (lambda x: x[4].append([1, 2, 3]), "caption 5: expected a list of .governor, dependent"),
        (lambda x: x[4].append([1, True]), "caption 5: expected a list of .governor, dependent"),
        (lambda x: x.__setitem__(4, "words"), "caption 5: expected a list of .governor"),
    ):
        edit_json(path, edit)
        with pytest.raises(InputError, match=message):
            dataset()
        path.write_text(whole)
    path.write_text("{}")
    with pytest.raises(InputError, match="no list of captions, expected 100"):
        dataset()
    path.write_text("[[[0, 1")
    with pytest.raises(InputError, match="not a JSON file"):
        dataset()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no dependencies, which --is_sparse needs"):
        dataset()
    assert dataset(dependencies=False).pairs is None


def test_a_dependency_past_its_caption(tiny_graphs, capsys):
    """With published word ids it is left out, as in the published code; otherwise it is refused."""
    folder = tiny_graphs / "data" / "tiny_precomp"
    want = dataset()[4]["adjacency"]
    edit_json(folder / "train_caps.json", lambda x: x[4].append([99, 1]))
    capsys.readouterr()
    torch.testing.assert_close(dataset()[4]["adjacency"], want)
    out = capsys.readouterr().out
    assert f"caption 5: dependency [99, 1] is past its {len(want)} words; 1 such pairs" in out
    (folder / "train_precaps_stan.txt").unlink()
    edit_json(folder / "train_caps.json", lambda x: x[4].pop(1))
    with pytest.raises(InputError, match=r"caption 5: dependency \[99, 1\] is past its"):
        dataset()
    edit_json(folder / "train_caps.json", lambda x: x[4].pop())
    with pytest.raises(InputError, match="caption 5: . dependencies for its . words; they were"):
        dataset()


def test_boxes_in_another_form_are_noticed(tiny_graphs, capsys):
    path = "data/tiny_precomp/train_ims_bbx.npy"
    boxes = np.load(path)
    dataset()
    assert "warning" not in capsys.readouterr().out
    np.save(path, np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1))
    dataset()
    assert "are they left, top, width, height?" in capsys.readouterr().out
    np.save(path, boxes / 1000)
    dataset()
    assert "are they fractions of the image already?" in capsys.readouterr().out


def test_dependencies_of_other_captions(tiny_graphs):
    """Each caption has the dependencies of a longer one: most are past its end."""
    folder = tiny_graphs / "data" / "tiny_precomp"
    chain = [[i, i + 1] for i in range(20)]
    edit_json(folder / "train_caps.json", lambda x: x.__setitem__(slice(None), [chain] * 100))
    with pytest.raises(InputError, match="past its .* words, and so are .* those of other capt"):
        dataset()


def test_word_ids_of_another_vocabulary(tiny_graphs, capsys):
    """Ids that are all one too high come from a vocabulary with one more word in front."""
    path = tiny_graphs / "data" / "tiny_precomp" / "train_precaps_stan.txt"
    lines = [line.split(",") for line in path.read_text().splitlines()]

    def write(shifted):
        rows = [
            [a, *(str(4 + (int(x) - 3) % 16) if shifted(x) else x for x in inner), b]
            for a, *inner, b in lines
        ]
        path.write_text("".join(",".join(row) + "\n" for row in rows))

    write(lambda x: True)
    with pytest.raises(InputError, match="word ids are those of .*made with another vocabulary"):
        dataset()
    write(lambda x: int(x) > 14)
    capsys.readouterr()
    dataset()
    assert "were they made with another vocabulary, or captions?" in capsys.readouterr().out
    path.write_text("".join(",".join(row) + "\n" for row in lines))
    captions = path.parent / "train_caps.txt"
    captions.write_text("\n".join(captions.read_text().splitlines()[:80]))
    with pytest.raises(InputError, match="word ids of 100 captions, but .* holds 80"):
        dataset()


def test_bad_word_ids(tiny_graphs):
    path = tiny_graphs / "data" / "tiny_precomp" / "train_precaps_stan.txt"
    lines = path.read_text().splitlines()
    for line, message in (
        ("1,99,2", "line 3 has word ids from 1 to 99, expected from 0 to 19"),
        ("1,-4,2", "line 3 has word ids from -4 to 2"),
        ("a dog", "line 3 is 'a dog', expected word ids such as"),
        ("", "line 3 is '', expected word ids such as"),
    ):
        path.write_text("\n".join([*lines[:2], line, *lines[3:]]))
        with pytest.raises(InputError, match=message):
            dataset()


def test_bad_boxes(tiny_graphs):
    path = tiny_graphs / "data" / "tiny_precomp" / "train_ims_bbx.npy"
    boxes = np.load(path)
    for wrong in (boxes[:-1], boxes[:, :2], boxes[:, :, :3]):
        np.save(path, wrong)
        with pytest.raises(InputError, match=r"boxes of shape .*expected \(20, 4, 4\)"):
            dataset()
    boxes[3, 1, 2] = np.nan
    np.save(path, boxes)
    with pytest.raises(InputError, match=r"train_ims_bbx.npy: row 3 \(from 0\) holds NaN"):
        dataset()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train_ims_bbx.npy: no boxes, which GSMN needs"):
        dataset()
    boxes[3, 1, 2] = 400
    np.save(path, boxes)
    (path.parent / "train_ims_size.npy").unlink()
    with pytest.raises(FileNotFoundError, match="it holds the images' sizes"):
        dataset()


def test_published_boxes_where_images_straddle_batches(tiny_graphs):
    """Compare with the published loop: in place on the array, two passes, batches of 8."""
    sizes = np.load("data/tiny_precomp/test_ims_size.npy")
    boxes = np.load("data/tiny_precomp/test_ims_bbx.npy")
    seen = []
    for _ in range(2):
        seen.clear()
        for first in range(0, 75, 8):
            batch = range(first, min(first + 8, 75))
            for n in batch:
                w, h = sizes[n // 5]
                boxes[n // 5] /= np.array([w, h, w, h], np.float32)
            seen += [boxes[n // 5].copy() for n in batch]
    for folds in (False, True):  # the five folds take the boxes of each image itself
        data = dataset("test", published_batch=8, published_folds=folds)
        for image in range(15):
            want = seen[5 * image if folds else image]
            np.testing.assert_allclose(data.image_item(image)["boxes"], want, rtol=1e-5)
