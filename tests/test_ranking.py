"""ranking.py: the rank of each query compared with counting; recalls of ranks are those printed."""

import numpy as np
import pytest
import torch

import ranking
import score_files
import train
from evaluation import eval_ensemble, rank_files, rank_models
from metrics import METRICS
from ranking import FOLDS, Ranking, rank_scores
from score_files import save_scores
from tests.conftest import train_args

# Pairs of 11 images: the image of each caption, or None with captions per image.
PAIRS = {
    "five": (None, 55),
    "one": (None, 11),
    "uneven": (np.repeat(np.arange(11), [1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1]), 36),
    "shuffled": (np.random.default_rng(3).permutation(np.arange(44) % 11), 44),
}
PAIRS["both"] = (np.random.default_rng(4).permutation(PAIRS["uneven"][0]), 36)


def made(kind: str, ties: bool, fold5: bool, dtype=np.float32) -> Ranking:
    image_of, m = PAIRS[kind]
    scores = np.random.default_rng(m).normal(size=(11, m)).astype(dtype)
    scores = scores.round(0) if ties else scores
    return rank_scores(["a"], scores, image_of, fold5)


def parts(n: int, fold5: bool) -> list[range]:
    """The images of each fold."""
    folds = FOLDS if fold5 else 1
    return [range(k * n // folds, (k + 1) * n // folds) for k in range(folds)]


def counted(scores, right, queries, items) -> dict[int, tuple[int, set]]:
    """By query: how many wrong items score at least as the best right one; who may be first."""
    found = {}
    for q in queries:
        best = max(scores[q][i] for i in items if right(q, i))
        wrong = [i for i in items if not right(q, i) and scores[q][i] >= best]
        top = max(scores[q][i] for i in items)
        found[q] = len(wrong), {i for i in items if scores[q][i] == top}
    return found


@pytest.mark.parametrize("fold5", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_ranks_are_those_of_a_plain_loop(kind, ties, fold5):
    found = made(kind, ties, fold5)
    ranks, of = found.ranks, found.own_image.tolist()
    n, m = found.scores.shape
    if PAIRS[kind][0] is None:
        assert of == [caption // (m // n) for caption in range(m)]
    for images in parts(n, fold5):
        captions = [caption for caption in range(m) if of[caption] in images]
        want = counted(found.scores, lambda i, c: of[c] == i, images, captions)
        for image, (rank, first) in want.items():
            assert ranks.i2t[image] == rank and ranks.first_caption[image] in first
        want = counted(found.scores.T, lambda c, i: of[c] == i, captions, images)
        for caption, (rank, first) in want.items():
            assert ranks.t2i[caption] == rank and ranks.first_image[caption] in first
    assert ranks.unit["i2t"].tolist() == list(range(n)) and ranks.unit["t2i"].tolist() == of


def of_ranks(ranks: np.ndarray) -> dict:
    found = {f"r{k}": 100 * np.mean(ranks < k) for k in (1, 5, 10)}
    return found | {"medr": np.floor(np.median(ranks)) + 1, "meanr": ranks.mean() + 1}


@pytest.mark.parametrize("fold5", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_recalls_of_the_ranks_are_the_printed_ones(kind, fold5, capsys):
    found = made(kind, True, fold5)
    folds = found.metrics["folds"] if fold5 else [found.metrics]
    assert len(folds) == len(list(found.folds()))
    for metrics, (images, captions) in zip(folds, found.folds(), strict=True):
        assert metrics["i2t"] == pytest.approx(of_ranks(found.ranks.i2t[images]))
        assert metrics["t2i"] == pytest.approx(of_ranks(found.ranks.t2i[captions]))
    mean = {name: np.mean([fold["t2i"][name] for fold in folds]) for name in METRICS}
    line = " ".join(f"{mean[name]:.1f}" for name in METRICS)
    assert f"Text to image: {line}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("fold5", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_folds_and_pairs_hold_each_once(kind, fold5):
    found = made(kind, False, fold5)
    n, m = found.scores.shape
    images, captions = (np.concatenate(x) for x in zip(*found.folds(), strict=True))
    assert images.tolist() == list(range(n)) and sorted(captions) == list(range(m))
    for rows, columns in found.folds():
        assert set(found.own_image[columns]) == set(rows)
    image, caption = found.right_pairs
    assert image.tolist() == found.own_image.tolist() and caption.tolist() == list(range(m))


@pytest.mark.parametrize("fold5", [False, True])
def test_several_images_a_caption(fold5):
    """Three images for each of ten captions: a caption's rank is that of its best image."""
    scores = np.random.default_rng(0).normal(size=(30, 10)).round(0)
    found = rank_scores(["a"], scores, None, fold5, True)
    for captions in parts(10, fold5):
        images = [image for image in range(30) if image // 3 in captions]
        want = counted(scores, lambda i, c: i // 3 == c, images, captions)
        assert all(found.ranks.i2t[i] == rank for i, (rank, _) in want.items())
        assert all(found.ranks.first_caption[i] in first for i, (_, first) in want.items())
        want = counted(scores.T, lambda c, i: i // 3 == c, captions, images)
        assert all(found.ranks.t2i[c] == rank for c, (rank, _) in want.items())
        assert all(found.ranks.first_image[c] in first for c, (_, first) in want.items())
    if not fold5:
        assert found.metrics["t2i"] == pytest.approx(of_ranks(found.ranks.t2i))
        assert found.metrics["i2t"] == pytest.approx(of_ranks(found.ranks.i2t))
    assert [x.tolist() for x in found.right_pairs] == [list(range(30)), [i // 3 for i in range(30)]]
    assert found.own_image.tolist() == [3 * c for c in range(10)]
    assert found.ranks.unit["i2t"].tolist() == [i // 3 for i in range(30)]
    assert found.ranks.unit["t2i"].tolist() == list(range(10))


def test_parts_are_ranked_as_the_whole(tmp_path):
    """The ranks of each of several matrices, and of their mean, by the same pairs."""
    image_of, m = PAIRS["both"]
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=(11, m)).astype(np.float32) for _ in range(2)]
    paths = [str(tmp_path / f"{k}.npy") for k in range(2)]
    for path, x in zip(paths, scores, strict=True):
        save_scores(path, x, image_of)
    both = rank_files(paths, True, keep_parts=True)
    assert both.sources == paths and both.metrics == eval_ensemble(paths, True)
    alone = [rank_files([path], True) for path in paths]
    for part, one in zip(both.parts, alone, strict=True):
        assert both.ranks_of(part).t2i.tolist() == one.ranks.t2i.tolist()
        assert both.ranks_of(part).i2t.tolist() == one.ranks.i2t.tolist()
    assert both.ranks.t2i.tolist() != alone[0].ranks.t2i.tolist()
    assert (
        not rank_files(paths, False).parts
        and not rank_files(paths[:1], True, keep_parts=True).parts
    )


def test_matrices_that_are_compared_are_read_once(tmp_path, monkeypatch):
    paths, read = [str(tmp_path / name) for name in ("a.npy", "b.npy")], []
    for k, path in enumerate(paths):
        save_scores(path, np.random.default_rng(k).normal(size=(11, 55)).astype("f4"), None)
    load = score_files.load_objects
    monkeypatch.setattr(score_files, "load_objects", lambda path: read.append(path) or load(path))
    assert len(rank_files(paths, False, keep_parts=True).parts) == 2 and read == paths


def test_the_size_of_folds_is_said(capsys):
    made("five", False, True)
    said = capsys.readouterr().out
    assert "Five folds of 2 or 3 images each" in said
    assert f"{ranking.PUBLISHED_FOLD:,} images of testall" in said


def test_captions_are_sentences_also_where_word_ids_are_in_a_file(tiny_graphs):
    """GSMN reads `{split}_precaps_stan.txt`; a report shows the sentences."""
    train.main(train_args(model="gsmn", num_epochs=1))
    where = {"data_path": None, "split": "test", "vocab_path": None, "batch_size": None}
    where["device"] = torch.device("cpu")
    lines = tiny_graphs / "data/tiny_precomp/test_caps.txt"
    sentences = lines.read_text().splitlines()
    found = rank_models(["run/model_best.pth.tar"], False, None, False, **where)
    assert found.captions == sentences
    lines.unlink()
    found = rank_models(["run/model_best.pth.tar"], False, None, False, **where)
    assert found.captions is None
