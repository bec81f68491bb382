"""Ranks and metrics against counting, the published lines, five-fold, ensembles."""

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
    """A model that scores everything alike has found nothing."""
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
    """The tiny directory with a run of one epoch in run/."""
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
    """Our checkpoints carry their vocabulary; nothing else is read from where training ran."""
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
    """COCO's testall has one row a caption: the same numbers, images encoded once."""
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
    monkeypatch.setattr(evaluation, "model_scores", None)
    with pytest.raises(ValueError, match="nodir/x.npy: not a file in a folder that exists"):
        evaluation.evalrank("run/model_best.pth.tar", save_path="nodir/x.npy")
    with pytest.raises(ValueError, match="run: not a file in a folder"):
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
