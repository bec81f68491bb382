"""Ranks and metrics compared with counting, the published lines, five folds, ensembles."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import train
from data import PrecompDataset
from evaluation import encode_data, i2t, retrieval_metrics, score_matrix, t2i
from tests import reference
from tests.conftest import train_args, write_split
from util import tencent


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_equal_counting(k, ties):
    rng = np.random.default_rng(k)
    scores = rng.normal(size=(9, 9 * k)).astype(np.float32)
    if ties:
        scores = scores.round()  # many equal scores, right and wrong candidates alike
    want_i2t, want_t2i = reference.ranks(scores)
    metrics, (ranks, top1) = i2t(scores, return_ranks=True)
    assert ranks.tolist() == want_i2t
    assert (scores[np.arange(9), top1] == scores.max(1)).all()
    assert metrics["r1"] == pytest.approx(100 * np.mean(np.array(want_i2t) < 1))
    assert metrics["r5"] == pytest.approx(100 * np.mean(np.array(want_i2t) < 5))
    assert metrics["r10"] == pytest.approx(100 * np.mean(np.array(want_i2t) < 10))
    assert metrics["medr"] == np.floor(np.median(want_i2t)) + 1
    assert metrics["meanr"] == pytest.approx(np.mean(want_i2t) + 1)
    metrics, (ranks, top1) = t2i(scores, return_ranks=True)
    assert ranks.tolist() == want_t2i
    assert (scores[top1, np.arange(9 * k)] == scores.max(0)).all()


def test_ties_cost_the_model():
    """A model that gives every pair the same score has found nothing."""
    metrics = retrieval_metrics(np.zeros((20, 100), np.float32))
    assert metrics["rsum"] == 0
    assert metrics["i2t"]["medr"] == 96 and metrics["t2i"]["medr"] == 20


def test_sums():
    metrics = retrieval_metrics(np.kron(np.eye(6), np.ones(5)))
    assert metrics["rsum"] == 600 and metrics["ar"] == metrics["ari"] == 100
    assert metrics["i2t"] == {"r1": 100, "r5": 100, "r10": 100, "medr": 1, "meanr": 1}
    scores = np.random.default_rng(0).normal(size=(30, 150))
    m = retrieval_metrics(scores)
    assert m["rsum"] == pytest.approx(3 * m["ar"] + 3 * m["ari"])
    assert m["ar"] == pytest.approx(np.mean([m["i2t"][r] for r in ("r1", "r5", "r10")]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_without_rank_are_refused(bad):
    scores = np.zeros((3, 6), np.float32)
    scores[1, 4] = bad
    with pytest.raises(ValueError, match="image 1 and caption 4 is NaN or infinite"):
        retrieval_metrics(scores)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"scores of shape \(3, 7\)"):
        i2t(np.zeros((3, 7)))


@pytest.fixture
def trained(tiny):
    """The tiny directory, with a run of one epoch in run/."""
    train.main(train_args(num_epochs=1))
    return tiny


def test_evalrank_prints_the_published_lines(trained, capsys):
    capsys.readouterr()
    metrics = evaluation.evalrank("run/model_best.pth.tar", data_path="data", split="test")
    lines = capsys.readouterr().out.splitlines()
    assert "Images: 15, Captions: 75" in lines
    r, ri = metrics["i2t"], metrics["t2i"]
    assert lines[-5:] == [
        f"rsum: {metrics['rsum']:.1f}",
        f"Average i2t Recall: {metrics['ar']:.1f}",
        "Image to text: " + " ".join(f"{r[n]:.1f}" for n in ("r1", "r5", "r10", "medr", "meanr")),
        f"Average t2i Recall: {metrics['ari']:.1f}",
        "Text to image: " + " ".join(f"{ri[n]:.1f}" for n in ("r1", "r5", "r10", "medr", "meanr")),
    ]


def test_evalrank_from_any_directory(trained, monkeypatch):
    """Our checkpoints hold their vocabulary; nothing else is read from the training folder."""
    want = evaluation.evalrank("run/model_best.pth.tar", split="test")
    (trained / "vocab" / "tiny_precomp_vocab.json").unlink()
    elsewhere = trained / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = trained / "run" / "model_best.pth.tar"
    got = evaluation.evalrank(path, data_path=trained / "data", split="test")
    assert got == want
    with pytest.raises(FileNotFoundError, match="no such data folder; give --data_path"):
        evaluation.evalrank(path, split="test")


def test_save_path_holds_the_matrix(trained):
    metrics = evaluation.evalrank("run/model_best.pth.tar", split="test", save_path="sims.bin")
    scores = np.load("sims.bin", allow_pickle=False)
    assert scores.shape == (15, 75) and scores.dtype == np.float32
    assert retrieval_metrics(scores) == metrics


@pytest.mark.parametrize("n", [6, 7, 12])
def test_uneven_folds_keep_captions_with_their_images(trained, n):
    write_split(trained / "data" / "tiny_precomp", "test", n)
    path = "run/model_best.pth.tar"
    metrics = evaluation.evalrank(path, split="test", fold5=True)
    evaluation.evalrank(path, split="test", save_path="whole.npy")
    whole = np.load("whole.npy")
    cuts = [f * n // 5 for f in range(6)]
    for fold, a, b in zip(metrics["folds"], cuts, cuts[1:], strict=False):
        assert fold == retrieval_metrics(whole[a:b, 5 * a : 5 * b])


@pytest.mark.parametrize("save", [True, False])
def test_five_fold(trained, capsys, save):
    path = "run/model_best.pth.tar"
    evaluation.evalrank(path, split="test", save_path="whole.npy")
    capsys.readouterr()
    metrics = evaluation.evalrank(
        path, split="test", fold5=True, save_path="sims.npy" if save else None
    )
    out = capsys.readouterr().out
    whole = np.load("whole.npy")
    if save:
        np.testing.assert_allclose(np.load("sims.npy"), whole, atol=1e-6)
    folds = [retrieval_metrics(whole[3 * i : 3 * i + 3, 15 * i : 15 * i + 15]) for i in range(5)]
    assert metrics["folds"] == folds
    for way in ("i2t", "t2i"):
        for name, value in metrics[way].items():
            assert value == pytest.approx(np.mean([fold[way][name] for fold in folds]))
    for name in ("rsum", "ar", "ari"):
        assert metrics[name] == pytest.approx(np.mean([fold[name] for fold in folds]))
    assert metrics["rsum"] == pytest.approx(3 * metrics["ar"] + 3 * metrics["ari"])
    lines = out.splitlines()
    assert lines[-7:-4] == [
        "-----------------------------------",
        "Mean metrics: ",
        f"rsum: {metrics['rsum']:.1f}",
    ]
    assert sum(line.startswith("rsum: ") and " ari: " in line for line in lines) == 5


def test_five_fold_of_repeated_storage(trained):
    """COCO's testall has one row per caption: the numbers are the same, images are encoded once."""
    want = evaluation.evalrank("run/model_best.pth.tar", split="test", fold5=True)
    shutil.copy("data/tiny_precomp/test_caps.txt", "data/tiny_precomp/testall_caps.txt")
    rows = np.repeat(np.load("data/tiny_precomp/test_ims.npy"), 5, 0)
    np.save("data/tiny_precomp/testall_ims.npy", rows)
    assert evaluation.evalrank("run/model_best.pth.tar", split="testall", fold5=True) == want


def test_images_and_captions_are_encoded_once(trained, monkeypatch):
    seen = []
    get = PrecompDataset.image_item
    monkeypatch.setattr(PrecompDataset, "image_item", lambda s, i: seen.append(i) or get(s, i))
    evaluation.evalrank("run/model_best.pth.tar", split="test", fold5=True)
    assert sorted(seen) == list(range(15))


def test_all_captions_are_scored_though_they_are_no_multiple_of_the_images(trained):
    model, words, _ = ckpt.load_model("run/model_best.pth.tar")
    images, captions = encode_data(model, PrecompDataset("data/tiny_precomp", "test", words, 12))
    some = {name: x[:10] for name, x in images.items()}  # 75 captions
    scores = score_matrix(model, some, captions)
    np.testing.assert_array_equal(scores, score_matrix(model, images, captions)[:10])


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_encoding_batch_does_not_matter(trained, batch_size):
    state = ckpt.load("run/model_best.pth.tar")
    words = ckpt.find_vocab(state, "run/model_best.pth.tar")
    net = ckpt.build_model(state["opt"], len(words))
    ckpt.load_weights(net, state, "run/model_best.pth.tar")
    data = PrecompDataset("data/tiny_precomp", "test", words, 12)
    images, captions = encode_data(net, data, batch_size)
    assert images["regions"].shape == (15, 4, 16)
    order = torch.cat([group["index"] for group in captions])
    assert sorted(order.tolist()) == list(range(75))
    want = score_matrix(net, *encode_data(net, data))
    np.testing.assert_allclose(score_matrix(net, images, captions), want, atol=1e-6)


def test_ensemble_is_the_mean_matrix(trained):
    train.main(train_args(num_epochs=1, cross_attn="i2t", seed=1, model_name="two"))
    paths = ["run/model_best.pth.tar", "two/model_best.pth.tar"]
    for path, name in zip(paths, "ab", strict=True):
        evaluation.evalrank(path, split="test", save_path=f"{name}.npy")
    metrics = evaluation.evalrank(paths, split="test", save_path="both.npy")
    mean = (np.load("a.npy") + np.load("b.npy")) / 2
    np.testing.assert_allclose(np.load("both.npy"), mean, atol=1e-6)
    assert metrics == retrieval_metrics(np.load("both.npy"))


def test_ensemble_needs_one_dataset(trained):
    folder = trained / "data" / "other_precomp"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        write_split(folder, split, 10)
    shutil.copy("vocab/tiny_precomp_vocab.json", "vocab/other_precomp_vocab.json")
    train.main(train_args(num_epochs=1, data_name="other_precomp", model_name="two"))
    with pytest.raises(ValueError, match="an ensemble needs one dataset"):
        evaluation.evalrank(["run/model_best.pth.tar", "two/model_best.pth.tar"], split="test")


def test_command_line(trained, capsys):
    paper = [61.1, 85.4, 91.5, 43.3, 71.9, 80.9]
    evaluation.main(["run/model_best.pth.tar", "--split", "test", "--paper", *map(str, paper)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["paper", *map(str, paper)]
    assert lines[-1].startswith("ours") and len(lines[-1].split()) == 7


def test_bad_arguments_are_named_before_scoring(trained, monkeypatch):
    monkeypatch.setattr(ckpt, "load_model", None)
    with pytest.raises(ValueError, match="nodir/x.npy: expected a file in an existing folder"):
        evaluation.evalrank("run/model_best.pth.tar", save_path="nodir/x.npy")
    with pytest.raises(ValueError, match="run: expected a file in an existing folder"):
        evaluation.evalrank("run/model_best.pth.tar", save_path="run")
    with pytest.raises(ValueError, match="no checkpoint to evaluate"):
        evaluation.evalrank([])
    with pytest.raises(ValueError, match="batch_size 0: expected at least 1"):
        evaluation.evalrank("run/model_best.pth.tar", batch_size=0)


def test_unknown_device_and_split_are_named(trained):
    with pytest.raises(ValueError, match="--device gpu"):
        evaluation.evalrank("run/model_best.pth.tar", split="test", device="gpu")
    with pytest.raises(FileNotFoundError, match="testall_caps.txt: no such caption file"):
        evaluation.evalrank("run/model_best.pth.tar", split="testall")


def slow_map(scores, relevant, k):
    """MAP@k and A@k of Tencent-News, query by query."""
    total, n, hits, judged = 0.0, 0, 0, 0
    for x, flags in zip(scores, relevant, strict=True):
        if sum(flags) < k:
            continue
        ranked = [
            flag for _, flag in sorted(zip(x, flags, strict=True), key=lambda p: (-p[0], p[1]))
        ]
        m, ap, right = min(k, len(ranked)), 0.0, 0
        for i in range(m):
            right += ranked[i]
            ap += right / (i + 1)
        total, n = total + ap / m, n + 1
        hits, judged = hits + right, judged + m
    return total / n, hits / judged, n


def test_average_precision_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 6, n).tolist() for n in rng.integers(1, 9, 200)]  # with ties
    relevant = [rng.integers(0, 2, len(x)).tolist() for x in scores]
    scores.append([])  # a query without candidates
    relevant.append([])
    metrics = tencent.average_precision(scores, relevant, (1, 2, 3, 5))
    for k in (1, 2, 3, 5):
        got = metrics[f"map@{k}"], metrics[f"a@{k}"], metrics[f"queries@{k}"]
        assert got == pytest.approx(slow_map(scores, relevant, k))
    usual = []
    for x, flags in zip(scores, relevant, strict=True):
        order = sorted(range(len(x)), key=lambda j: (-x[j], flags[j]))
        found = [sum(flags[j] for j in order[: i + 1]) / (i + 1) for i in range(len(x))]
        if any(flags):
            usual.append(np.mean([found[i] for i, j in enumerate(order) if flags[j]]))
    assert metrics["map"] == pytest.approx(np.mean(usual))


def test_average_precision_by_hand():
    metrics = tencent.average_precision([[3, 2, 1], [1, 1]], [[1, 0, 1], [0, 1]], (1, 2))
    # The ranks are 1 0 1 and (a tie costs the model) 0 1; only the first has two relevant ones.
    assert (metrics["map@1"], metrics["a@1"], metrics["queries@1"]) == (0.5, 0.5, 2)
    assert (metrics["map@2"], metrics["a@2"], metrics["queries@2"]) == (0.75, 0.5, 1)
    assert metrics["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    nothing = tencent.average_precision([[1.0]], [[0]], (1,))
    assert np.isnan(nothing["map@1"]) and np.isnan(nothing["map"]) and nothing["queries@1"] == 0


@pytest.mark.parametrize(
    ("scores", "flags"), [([1, np.nan], [0, 1]), ([1, 2], [0, 2]), ([1, 2], [1]), ([1], [[1]])]
)
def test_average_precision_refuses(scores, flags):
    with pytest.raises(ValueError, match="query 1 .from 0.: expected as many finite scores"):
        tencent.average_precision([[1], scores], [[1], flags])


def test_weighted_scores_are_means_of_the_models_that_have_one():
    models = [[{"a": 1.0, "b": 2.0}, {}], [{"a": 4.0}, {"c": 3.0}], [{"b": 5.0, "d": 1.0}, {}]]
    got = tencent.weighted_scores(models, [1.0, 1.0, 1.5])
    assert got == [{"a": 2.5, "b": pytest.approx(9.5 / 2.5), "d": 1.0}, {"c": 3.0}]
    assert tencent.weighted_scores(models[:2])[0] == {"a": 2.5, "b": 2.0}
    assert tencent.weighted_scores(models, np.array([1.0, 1.0, 1.5])) == got
    for bad in ([1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, np.nan], [1.0, 1.0, np.inf], []):
        with pytest.raises(ValueError, match="expected one weight above 0 per model"):
            tencent.weighted_scores(models, bad)
    with pytest.raises(ValueError, match=r"score \[2, 1\] queries"):
        tencent.weighted_scores([models[0], models[1][:1]])


def test_several_images_a_caption_are_ranked_the_other_way_round():
    scores = np.random.default_rng(1).normal(size=(12, 4)).round(1)
    other = retrieval_metrics(scores.T)
    got = retrieval_metrics(scores, candidates=True)
    assert (got["t2i"], got["i2t"], got["rsum"]) == (other["i2t"], other["t2i"], other["rsum"])
    with pytest.raises(ValueError, match="same number of captions for each image"):
        retrieval_metrics(scores)  # candidates is not set, so it may be transposed
    assert [evaluation.fold_slices(12, 4, fold, 2) for fold in (0, 1)] == [
        (slice(0, 6), slice(0, 2)),
        (slice(6, 12), slice(2, 4)),
    ]


def test_an_ensemble_of_saved_matrices(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=(10, 50)).astype(t) for t in (np.float32, np.float64))
    np.save("a.npy", a)
    b.dump("b.npy")  # as the published programs wrote it
    for fold5 in (False, True):
        got = evaluation.eval_ensemble(["a.npy", "b.npy"], fold5)
        mean = (a + b) / 2
        want = retrieval_metrics(mean)
        if fold5:
            parts = [mean[2 * f : 2 * f + 2, 10 * f : 10 * f + 10] for f in range(5)]
            want = evaluation.mean_metrics([retrieval_metrics(part) for part in parts])
            assert len(got.pop("folds")) == 5
        assert got == want
    capsys.readouterr()
    evaluation.main(["a.npy", "b.npy", "--paper", *"123456"])
    out = capsys.readouterr().out
    assert f"rsum: {retrieval_metrics(mean)['rsum']:.1f}" in out and "paper" in out
    np.save("p.npy", {"npts": 10, "sims": a})  # as the published program of CHAN writes it
    assert evaluation.eval_ensemble("p.npy") == evaluation.eval_ensemble(["a.npy"])
    for flags in (["a.npy", "x.pth.tar"], ["a.npy", "--save_path", "o.npy"]):
        with pytest.raises(SystemExit):
            evaluation.main(flags)
        assert "cannot be mixed with checkpoints" in capsys.readouterr().err
    np.save("c.npy", a[:5])
    np.save("d.npy", a.astype(np.int64))
    np.save("e.npy", a[0])
    np.save("n.npy", {"npts": 10})
    np.save("t.npy", a.T)  # transposed: right only with candidates
    assert evaluation.eval_ensemble(["t.npy"], candidates=True)["rsum"] > 0
    for paths, message in (
        (["a.npy", "c.npy"], r"c.npy: scores \(5, 50\) images x captions, the files before"),
        (["d.npy"], "d.npy: int64 of shape"),
        (["n.npy"], "n.npy: object of shape .., expected scores"),
        (["e.npy"], "expected scores .images, captions."),
        (["t.npy"], "t.npy: .*with the same number.*; is the matrix transposed"),
        ([], "no score matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.eval_ensemble(paths)
    with pytest.raises(ValueError, match="too few for five folds"):
        np.save("f.npy", a[:4, :20])
        evaluation.eval_ensemble(["f.npy"], fold5=True)
    with pytest.raises(FileNotFoundError):
        evaluation.eval_ensemble(["no.npy"])


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_dump_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Evil(), [1, 2], np.array([Evil()], dtype=object)):
        with open("x.npy", "wb") as file:
            pickle.dump(content, file, protocol=2)
        with pytest.raises(ValueError, match="x.npy: (refused|not a whole)"):
            evaluation.eval_ensemble(["x.npy"])
        assert not os.path.exists("pwned")
