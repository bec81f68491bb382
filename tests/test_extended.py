"""ECCV Caption, CxC and PMRP: the figures of the package, by hand and on all of COCO's test set."""

import json
import sys

import numpy as np
import pytest
import torch

import evaluation
import extended
import train
from tests.conftest import train_args, write_positions, write_split
from util.cli import InputError

eccv_caption = pytest.importorskip("eccv_caption")

IMAGES, CAPTIONS = [30, 10, 20], [7, 1, 9, 4, 2, 8]  # two captions per image
OF_IMAGE = {7: [30], 1: [30], 9: [10], 4: [10], 2: [20], 8: [20]}
OF_CAPTION = {30: [7, 1], 10: [9, 4], 20: [2, 8]}
SCORES = np.array(
    [  #  7    1    9    4    2    8
        [0.9, 0.1, 0.8, 0.2, 0.7, 0.3],  # 30: 7 9 2 8 4 1
        [0.1, 0.2, 0.9, 0.3, 0.8, 0.7],  # 10: 9 2 8 4 1 7
        [0.6, 0.5, 0.1, 0.2, 0.4, 0.3],  # 20: 7 1 2 8 4 9
    ],
    np.float32,
)


class Small(eccv_caption.Metrics):
    """The package with judgements of three images instead of those of COCO."""

    def __init__(self, extra_file_dir=None):
        super().__init__()
        self.coco_gts = {"i2t": OF_CAPTION, "t2i": OF_IMAGE}
        self.eccv_gts = {"i2t": {30: [7, 2, 8], 20: [2, 8]}, "t2i": {7: [30, 20], 9: [30]}}
        self.cxc_gts = {"i2t": OF_CAPTION | {20: [2, 8, 1]}, "t2i": OF_IMAGE}
        self.pm_gts = {"i2t": {30: [7, 1]}, "t2i": {4: [10, 20]}} if extra_file_dir else {}
        self.coco_ids = np.array(CAPTIONS)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(eccv_caption, "Metrics", Small)


def test_a_ranking_by_hand(small, tmp_path, monkeypatch):
    got = extended.coco_metrics(SCORES, IMAGES, CAPTIONS)
    # 30 ranks 7+ 9- 2+ | 8: two of R = 3 are right; the precision at them is 1 and 2/3.
    # 20 ranks 7- 1- | 2 8: none of R = 2 is right. Captions: 7 ranks 30+ 20+; 9 ranks 10- | 30.
    want = {
        "eccv_map_at_r": {"i2t": 100 * (1 + 0 + 2 / 3) / 3 / 2, "t2i": 50},
        "eccv_rprecision": {"i2t": 100 * (2 / 3) / 2, "t2i": 50},
        "eccv_r1": {"i2t": 50, "t2i": 50},
        # 30 finds 7 first, 10 finds 9 first, 20 finds 1 second. Captions 7 and 9 come first.
        "cxc_r1": {"i2t": 100 * 2 / 3, "t2i": 100 * 2 / 6},
        "cxc_r5": {"i2t": 100, "t2i": 100},
        "cxc_r10": {"i2t": 100, "t2i": 100},
    }
    ranks = np.argsort(-SCORES, 0).T  # of each caption
    assert [IMAGES[row[0]] for row in ranks] == [30, 20, 10, 10, 10, 10]
    want["cxc_r1"]["t2i"] = 100 * 3 / 6  # 7, 9, 4
    want["eccv_r1"]["t2i"] = want["eccv_rprecision"]["t2i"] = want["eccv_map_at_r"]["t2i"] = 50
    of_captions = [str(x) for x in np.repeat(IMAGES, 2)]  # as testall_ids.txt has them
    assert extended.coco_metrics(SCORES, of_captions, [str(x) for x in CAPTIONS]) == got
    assert got.keys() == want.keys()
    for name, both in want.items():
        assert got[name] == pytest.approx(both), name
    for name in extended.PLAUSIBLE:
        (tmp_path / name).write_text("{}")
    got = extended.coco_metrics(SCORES, IMAGES, CAPTIONS, str(tmp_path))
    assert got["pmrp"] == pytest.approx({"i2t": 50, "t2i": 50})  # 30: 7+ 9-; 4: 10+ 30-
    monkeypatch.setattr(Small, "__init__", lambda *_: json.loads("{"))
    with pytest.raises(InputError, match=r"pm_image.*or .*pm_caption.*: expected {id: \[ids\]}"):
        extended.coco_metrics(SCORES, IMAGES, CAPTIONS, str(tmp_path))
    (tmp_path / extended.PLAUSIBLE[0]).unlink()
    with pytest.raises(InputError, match="pm_image_to_caption.json: no such file, but .*PMRP"):
        extended.coco_metrics(SCORES, IMAGES, CAPTIONS, str(tmp_path))


def test_the_whole_test_set_against_the_package_itself():
    """The scores have the size of COCO; the package gets whole rankings, not the first few."""
    judge = eccv_caption.Metrics()
    captions = [int(x) for x in judge.coco_ids]
    images = list(dict.fromkeys(judge.coco_gts["t2i"][x][0] for x in captions))
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 32)).astype(np.float32) for n in (5000, 25000))
    b += 2 * np.repeat(a, 5, 0)
    scores = a @ b.T
    got = extended.coco_metrics(scores, images, captions)

    def ranked(ids, of, row):
        return np.array(of)[np.argsort(-row(ids), kind="stable")]

    way = judge.eccv_gts
    i2t = {x: ranked(images.index(x), captions, lambda i: scores[i]) for x in way["i2t"]}
    t2i = {x: ranked(captions.index(x), images, lambda i: scores[:, i]) for x in way["t2i"]}
    want = judge.eccv_metrics({"i2t": i2t, "t2i": t2i}, "all")
    assert set(want) == {name for name in got if "eccv" in name}
    for name, both in want.items():
        assert got[name] == pytest.approx({way: 100 * x for way, x in both.items()}), name
        assert all(0 < x < 100 for x in got[name].values())
    # CxC by its first rank; it lacks some pairs of COCO, so Recall@1 may be higher.
    first = {x: captions[i] for x, i in zip(images, scores.argmax(1), strict=True)}
    hits = [first[x] in right for x, right in judge.cxc_gts["i2t"].items()]
    assert got["cxc_r1"]["i2t"] == pytest.approx(100 * np.mean(hits)) and 0 < np.mean(hits) < 1
    first = {x: images[i] for x, i in zip(captions, scores.argmax(0), strict=True)}
    hits = [first[x] in right for x, right in judge.cxc_gts["t2i"].items()]
    assert got["cxc_r1"]["t2i"] == pytest.approx(100 * np.mean(hits))


def write(folder, name, ids):
    (folder / name).write_text("".join(f"{x}\n" for x in ids))


def test_ids_from_files(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="testall_ids.txt: no such file.*--write_ids"):
        extended.read_pair_of_ids(folder, "testall")
    write(tmp_path, "testall_ids.txt", IMAGES)
    write(tmp_path, "testall_capids.txt", CAPTIONS)
    assert extended.read_pair_of_ids(folder, "testall") == (IMAGES, CAPTIONS)
    write(tmp_path, "testall_ids.txt", np.repeat(IMAGES, 2))  # one line per caption
    assert extended.read_pair_of_ids(folder, "testall") == (IMAGES, CAPTIONS)
    write(tmp_path, "testall_ids.txt", ["30", "x7"])
    with pytest.raises(InputError, match="line 2 is 'x7', expected an id of COCO"):
        extended.read_pair_of_ids(folder, "testall")


def test_ids_of_karpathys_order(tmp_path, capsys):
    """The first image of COCO's test set and its captions; anyone can look them up."""
    extended.main(["--write_ids", str(tmp_path)])
    images, captions = extended.read_pair_of_ids(tmp_path, "testall")
    assert len(images) == 5000 and len(captions) == 25000
    assert images[0] == 391895 and captions[:5] == [770337, 771687, 772707, 776154, 781998]
    assert images[1] == 60623 and "25000 ids" in capsys.readouterr().out
    extended.main(["--write_ids", str(tmp_path)])  # the same again
    write(tmp_path, "testall_capids.txt", [1])
    with pytest.raises(InputError, match="testall_capids.txt: exists with other content"):
        extended.main(["--write_ids", str(tmp_path)])


@pytest.mark.parametrize(
    ("images", "captions", "scores", "message"),
    [
        (IMAGES, [7, 1, 9, 4, 2, 3], SCORES, "5 of COCO's 6 test captions among 6"),
        ([*IMAGES, 5], CAPTIONS, SCORES, "ids of 4 images and 6 captions"),
        (IMAGES[::-1], CAPTIONS, SCORES, "caption 0 .* has id 7, which COCO wrote for image 30, b"),
        (IMAGES, CAPTIONS, SCORES[:2], r"scores of shape \(2, 6\), but ids of 3 images and 6 capt"),
        (IMAGES, CAPTIONS, SCORES * np.nan, "a score is NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_said(small, images, captions, scores, message):
    with pytest.raises(InputError, match=message):
        extended.coco_metrics(scores, images, captions)


@pytest.fixture
def coco(tiny, monkeypatch):
    """A data set of 15 images with five captions each, testall, and judgements of it."""
    folder = tiny / "data" / "tiny_precomp"
    write_split(folder, "testall", 15, repeat=5)
    images, captions = [100 + 7 * i for i in range(15)], [900 - 3 * i for i in range(75)]
    of_caption = {x: captions[5 * i : 5 * i + 5] for i, x in enumerate(images)}
    of_image = {x: [images[j // 5]] for j, x in enumerate(captions)}

    class Judge(eccv_caption.Metrics):
        def __init__(self, extra_file_dir=None):
            super().__init__()
            self.coco_gts = self.cxc_gts = {"i2t": of_caption, "t2i": of_image}
            self.eccv_gts = self.coco_gts

    monkeypatch.setattr(eccv_caption, "Metrics", Judge)
    write(folder, "testall_ids.txt", np.repeat(images, 5))
    write(folder, "testall_capids.txt", captions)
    return folder, images, captions


@pytest.mark.parametrize("system", ["scan", "chan"])
def test_a_checkpoint_from_end_to_end(coco, system, capsys):
    folder, images, captions = coco
    train.main(train_args(model=system, num_epochs=3))
    alike = {
        str(x): [[images[(i + 1) % 15], 2.5], [images[(i + 2) % 15], 2.4]]
        for i, x in enumerate(images)
    }
    del alike[str(images[3])]
    (folder / "cxc_i2i.json").write_text(json.dumps(alike))
    marks = {str(captions[0]): [[captions[8], 3.0], [captions[9], 2.9], [123, 5]]}
    (folder / "cxc_t2t.json").write_text(json.dumps(marks))
    got = extended.evaluate("run/model_best.pth.tar")
    said = capsys.readouterr().out
    want = evaluation.evalrank("run/model_best.pth.tar", split="testall", save_path="s.npy")
    assert got["coco_5k"] == want
    # With COCO's own judgements CxC's R@K is Recall@K.
    for k in (1, 5, 10):
        ways = {way: want[way][f"r{k}"] for way in ("i2t", "t2i")}
        assert got[f"cxc_r{k}"] == pytest.approx(ways)
    assert got["eccv_r1"] == pytest.approx(got["cxc_r1"])
    assert got["coco_1k"]["folds"] and "ECCV Caption mAP@R: i2t " in said and "PMRP" not in said
    i2i = " / ".join(f"{x:.1f}" for x in got["cxc"]["i2i"].values())
    assert f"CxC i2i R@1 / 5 / 10: {i2i}" in said

    model, _, regions, groups = evaluation.encode_split(
        "run/model_best.pth.tar", None, "testall", None, torch.device("cpu"), None
    )
    regions = regions["regions"]
    words = [None] * 75
    for group in groups:
        for n, row in zip(group["index"].tolist(), group["words"], strict=True):
            words[n] = row

    def pair(a, b):
        one = {"words": b[None], "lengths": torch.tensor([len(b)])}
        with torch.no_grad():
            return float(model.similarity({"regions": a[None]}, one))

    def recalls(items, positives):
        ranks = []
        for n, alike in positives.items():
            scores = {m: pair(items[n], items[m]) for m in range(len(items)) if m != n}
            order = sorted(scores, key=scores.get, reverse=True)
            ranks.append(min(order.index(m) for m in alike))
        return {f"r{k}": 100 * np.mean(np.array(ranks) < k) for k in (1, 5, 10)}

    want = recalls(regions, {i: [(i + 1) % 15] for i in range(15) if i != 3})
    assert got["cxc"]["i2i"] == pytest.approx(want)
    own = {n: [m for m in range(n // 5 * 5, n // 5 * 5 + 5) if m != n] for n in range(75)}
    own[0].append(8)
    assert got["cxc"]["t2t"] == pytest.approx(recalls(words, own))

    again = extended.evaluate(["s.npy", "s.npy"], ids_path=str(folder))
    assert again == {name: x for name, x in got.items() if name != "cxc"}
    two = extended.evaluate(["run/model_best.pth.tar"] * 2)
    assert two["coco_5k"] == got["coco_5k"] and "cxc" not in two


def test_shuffled_captions_give_the_same_figures(coco):
    """A row per caption, captions of an image in no order: all follows from the ids."""
    folder, images, captions = coco
    train.main(train_args(num_epochs=1))
    write(folder, "cxc_t2t.json", [])
    (folder / "cxc_t2t.json").write_text(json.dumps({str(captions[0]): [[captions[8], 3.5]]}))
    want = extended.evaluate("run/model_best.pth.tar")
    order = np.random.default_rng(4).permutation(75)
    rows = np.load(folder / "testall_ims.npy")[order]
    np.save(folder / "testall_ims.npy", rows)
    lines = (folder / "testall_caps.txt").read_text().splitlines()
    write(folder, "testall_caps.txt", [lines[k] for k in order])
    write(folder, "testall_ids.txt", [f"COCO_val2014_{images[k // 5]:012}.jpg" for k in order])
    write(folder, "testall_capids.txt", [captions[k] for k in order])
    got = extended.evaluate("run/model_best.pth.tar")
    del want["coco_1k"], got["coco_1k"]  # other folds
    assert got == want and "t2t" in got["cxc"]
    evaluation.evalrank("run/model_best.pth.tar", split="testall", save_path="s.npy")
    again = extended.evaluate("s.npy", ids_path=str(folder))
    assert {name: again[name] for name in got if name != "cxc"} == {
        name: got[name] for name in got if name != "cxc"
    }


@pytest.mark.parametrize("per_caption", [False, True])
def test_a_table_says_which_image_a_caption_is_of(coco, per_caption):
    """A row per image, shuffled captions; an id per image or per caption.

    Ids per caption first occur in another order than the rows. A saved matrix has a table beside
    it.
    """
    folder, images, captions = coco
    train.main(train_args(num_epochs=1))
    want = extended.evaluate("run/model_best.pth.tar")
    rng = np.random.default_rng(5)
    rows, order = rng.permutation(15), rng.permutation(75)
    np.save(folder / "testall_ims.npy", np.load(folder / "testall_ims.npy")[::5][rows])
    lines = (folder / "testall_caps.txt").read_text().splitlines()
    write(folder, "testall_caps.txt", [lines[k] for k in order])
    named = [k // 5 for k in order] if per_caption else rows
    write(folder, "testall_ids.txt", [images[k] for k in named])
    write(folder, "testall_capids.txt", [captions[k] for k in order])
    write(folder, "testall_caption_image.txt", [rows.tolist().index(k // 5) for k in order])
    got = extended.evaluate("run/model_best.pth.tar")
    del want["coco_1k"], got["coco_1k"]  # other folds
    assert got == want
    if not per_caption:  # of a matrix, the ids must stand in the order of its rows
        evaluation.evalrank("run/model_best.pth.tar", split="testall", save_path="s.npy")
        again = extended.evaluate("s.npy", ids_path=str(folder))
        assert again["coco_5k"] == got["coco_5k"] and again["cxc_r1"] == got["cxc_r1"]
    write(folder, "testall_capids.txt", [captions[k] for k in order[::-1]])
    with pytest.raises(InputError, match="the ids are in another order than the captions"):
        extended.evaluate("run/model_best.pth.tar")


@pytest.mark.parametrize("files", ["data set", "ids", "ids beside captions"])
@pytest.mark.parametrize("rows", ["per image", "per caption"])
def test_embeddings(coco, tiny, capsys, files, rows):
    """Shuffled texts; their images are said by the ids of COCO, with or without the data set."""
    folder, images, captions = coco
    rng = np.random.default_rng(6)
    a = rng.normal(size=(15, 8)).astype(np.float32)
    b = np.repeat(a, 5, 0) + rng.normal(size=(75, 8)).astype(np.float32)
    found = evaluation.rank_embeddings(a, b, data_path=str(folder), split="testall")
    np.save("s.npy", found.scores)
    want = extended.evaluate("s.npy", ids_path=str(folder))
    assert want["coco_5k"] == found.metrics
    order = rng.permutation(75)
    first = list(dict.fromkeys((order // 5).tolist()))
    np.save("a.npy", a[first] if rows == "per image" else a[order // 5])
    np.save("b.npy", b[order])
    place = folder if files == "data set" else tiny
    write(place, "testall_ids.txt", [f"COCO_val2014_{images[k // 5]:012}.jpg" for k in order])
    write(place, "testall_capids.txt", [captions[k] for k in order])
    if files != "ids":
        lines = (folder / "testall_caps.txt").read_text().splitlines()
        write(place, "testall_caps.txt", [lines[k] for k in order])
    if files == "data set":
        np.save(place / "testall_ims.npy", np.load(place / "testall_ims.npy")[order])
    where = ["--ids", "."]
    if files == "data set":
        where = ["--data_path", "data", "--data_name", "tiny_precomp"]
    capsys.readouterr()
    extended.main(["--embeddings", "a.npy", "b.npy", *where])
    assert f"rsum: {want['coco_5k']['rsum']:.1f}" in capsys.readouterr().out.splitlines()
    given = {"data_path": "data/tiny_precomp"} if files == "data set" else {"ids_path": "."}
    got = extended.evaluate_embeddings("a.npy", "b.npy", **given)
    del want["coco_1k"], got["coco_1k"]  # other folds
    assert got == want


def test_wrong_calls_for_embeddings(coco, capsys):
    folder, _, _ = coco
    np.save("a.npy", np.ones((15, 8), np.float32))
    np.save("b.npy", np.ones((75, 8), np.float32))
    with pytest.raises(InputError, match="embeddings need the folder of COCO's ids: --ids"):
        extended.main(["--embeddings", "a.npy", "b.npy"])
    with pytest.raises(InputError, match="Then: --embeddings a.npy b.npy"):
        extended.main(["a.npy", "b.npy", "--ids", str(folder)])
    for more in (["a.npy"], ["--batch_size", "3"], ["--write_ids", "x"]):
        with pytest.raises(SystemExit):
            extended.main([*more, "--embeddings", "a.npy", "b.npy"])
        assert "embeddings" in capsys.readouterr().err


def test_a_model_whose_score_needs_more_has_no_intra_recalls(coco, capsys):
    folder, _, _ = coco
    for split in ("train", "dev", "testall"):
        n, regions, _ = np.load(folder / f"{split}_ims.npy").shape
        boxes = np.sort(np.random.default_rng(0).random((n, regions, 2, 2)), 2) * 100
        np.save(folder / f"{split}_ims_bbx.npy", boxes.reshape(n, regions, 4).astype("f4"))
        kind = [("image_w", "<i8"), ("image_h", "<i8")]
        np.save(folder / f"{split}_ims_size.npy", np.array([(100, 100)] * n, kind))
        write_positions(folder, split)
    train.main(train_args(model="pfan_whole", num_epochs=1))
    (folder / "cxc_i2i.json").write_text('{"100": [[107, 3.0]]}')
    got = extended.evaluate("run/model_best.pth.tar")
    assert (
        "cxc" not in got and "CxC i2i, t2t: not available for this model" in capsys.readouterr().out
    )


def test_wrong_calls(coco, tiny, monkeypatch, capsys):
    folder, images, captions = coco
    train.main(train_args(num_epochs=1))
    best = "run/model_best.pth.tar"
    with pytest.raises(InputError, match="not both"):
        extended.evaluate([best, "a.npy"])
    with pytest.raises(InputError, match="batch_size -1: expected at least 1"):
        extended.evaluate(best, batch_size=-1)
    with pytest.raises(InputError, match="needs the folder of its ids"):
        extended.evaluate("a.npy")
    write_split(folder, "test", 14)
    write(tiny, "test_ids.txt", images)
    write(tiny, "test_capids.txt", captions)
    with pytest.raises(InputError, match="14 images and 70 captions for .*, but ids of 15 and 75"):
        extended.evaluate(best, split="test", ids_path=".")
    (folder / "cxc_i2i.json").write_text('{"5": 3}')
    with pytest.raises(InputError, match="cxc_i2i.json: expected {id: "):
        extended.evaluate(best)
    (folder / "cxc_i2i.json").write_text('{"5": [[3, 5.0]]}')
    with pytest.raises(InputError, match="none of its ids is among the 15 of the split"):
        extended.evaluate(best)
    for args in ([], ["--write_ids", "x", "a.npy"]):
        with pytest.raises(SystemExit):
            extended.main(args)
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(InputError, match="pip install eccv_caption"):
        extended.main([best])
