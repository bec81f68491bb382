"""Embeddings of two-tower models: cosines, which image a text is of, and what is refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import embeddings
import evaluation
from embeddings import rank_embeddings
from metrics import retrieval_metrics
from tests import reference
from util.cli import InputError

ORDER = np.repeat(np.arange(12), 5)
SHUFFLED = np.random.default_rng(1).permutation(ORDER)
UNEVEN = np.random.default_rng(2).permutation(np.repeat(np.arange(12), [1, 2, 3, 9, 4, 6] * 2))


def made(image_of=ORDER, d=9, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of images and texts that are near each other, of any length."""
    rng = np.random.default_rng(len(image_of))
    images = rng.normal(size=(max(image_of) + 1, d))
    texts = images[image_of] + rng.normal(size=(len(image_of), d))
    lengths = rng.uniform(0.1, 9, (len(texts), 1))
    return images.astype(dtype), (texts * lengths).astype(dtype)


def cosine(x, y) -> float:
    x, y = ([float(number) for number in row] for row in (x, y))
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5


def plain(images, texts, image_of) -> tuple[np.ndarray, dict]:
    scores = np.array([[cosine(x, y) for y in texts] for x in images])
    return scores, retrieval_metrics(scores, image_of=image_of)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(images, texts) -> list[str]:
    np.save("i.npy", images)
    np.save("t.npy", texts)
    return ["--embeddings", "i.npy", "t.npy"]


def write(path: str, lines) -> str:
    Path(path).write_text("".join(f"{line}\n" for line in lines))
    return path


# Cosines


@pytest.mark.parametrize("block", [1, 5, 1024])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cosines_are_those_of_a_plain_loop(here, monkeypatch, dtype, block):
    monkeypatch.setattr(embeddings, "BLOCK", block)
    images, texts = made(dtype=dtype)
    scores, metrics = plain(images, texts, None)
    save(images, texts)
    found = rank_embeddings("i.npy", "t.npy")
    assert found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert found.metrics == metrics and found.sources == ["i.npy", "t.npy"]
    want = reference.ranks(scores)
    assert (found.ranks.i2t.tolist(), found.ranks.t2i.tolist()) == tuple(want)
    assert rank_embeddings(torch.from_numpy(images).bfloat16().requires_grad_(), texts).metrics
    again = rank_embeddings(images, torch.from_numpy(texts))
    assert np.array_equal(again.scores, found.scores) and again.sources == ["images", "texts"]


@pytest.mark.parametrize(("dtype", "scale"), [("f2", 2.0**12), ("f4", 1e30), ("f8", 1e250)])
def test_lengths_make_no_difference(dtype, scale):
    """Nor do squares that are too large or too small for the dtype."""
    images, texts = made(dtype=dtype)
    want = rank_embeddings(images, texts).scores
    np.testing.assert_allclose(rank_embeddings(images * scale, texts).scores, want, atol=1e-6)
    if dtype != "f2":
        small = rank_embeddings(images, texts / scale).scores
        np.testing.assert_allclose(small, want, atol=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(1025, 2049, 100), (3, 5, 512), (2, 9, 300), (9, 90, 7)])
def test_equal_embeddings_tie(n, m, d):
    """In whatever place they stand: a product of matrices alone rounds some of them differently."""
    images, texts = made(np.arange(m) * n // m, d)
    assert (np.ptp(embeddings.cosines(np.repeat(images[:1], n, 0), texts), 0) == 0).all()
    assert (np.ptp(embeddings.cosines(images, np.repeat(texts[:1], m, 0)), 1) == 0).all()
    found = rank_embeddings(np.ones((20, d)), np.ones((100, d)))
    assert found.metrics["rsum"] == 0 and found.metrics["i2t"]["medr"] == 96


@pytest.mark.parametrize("name", ["i.npy", "t.npy"])
@pytest.mark.parametrize(
    ("value", "said"), [(0, "is all zero"), (np.nan, "NaN or Inf"), (-np.inf, "NaN or Inf")]
)
@pytest.mark.parametrize("block", [4, 1024])
def test_rows_without_a_cosine(here, monkeypatch, name, value, said, block):
    monkeypatch.setattr(embeddings, "BLOCK", block)
    images, texts = made()
    (images if name == "i.npy" else texts)[7] = value
    flags = save(images, texts)
    with pytest.raises(InputError) as error:
        evaluation.main(flags)
    assert f"{name}: row 7 (from 0)" in str(error.value) and said in str(error.value)


# Which image a text is of


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_texts_in_order(here, capsys, k):
    images, texts = made(np.repeat(np.arange(12), k))
    evaluation.main(save(images, texts))
    said = capsys.readouterr().out
    _, metrics = plain(images, texts, None)
    assert f"rsum: {metrics['rsum']:.1f}" in said and f"Captions per image: {k}" in said
    warned = f"warning: t.npy: {12 * k} texts for 12 images are taken as {k} per image" in said
    assert warned == (k not in (1, 5)) and ("--ids FILE" in said) == warned


def wrong_shapes() -> list:
    images, texts = made()
    return [
        (images, texts[:-1], "t.npy: 59 texts for the 12 rows of i.npy: with 5 per image, row 11 "),
        (
            images[:-1],
            texts,
            "t.npy: 60 texts for the 11 rows of i.npy: with 5 per image, text 55 ",
        ),
        (images, texts[:, :-1], "i.npy: 9 numbers per row, but t.npy: 8; images and texts need"),
        (texts, images, "i.npy: 60 rows, but t.npy: 12; .* --embeddings t.npy i.npy"),
        (images[0], texts, "i.npy: expected a float16 or float32 array of 2 axes, found float32"),
        (images[None], texts, "i.npy: expected .* of 2 axes"),
        (images, texts.astype(int), "t.npy: expected .* found int64"),
        (images[:0], texts, r"i.npy: float32 of shape \(0, 9\), expected embeddings"),
        (images[:, :0], texts[:, :0], r"i.npy: float32 of shape \(12, 0\), expected embeddings"),
    ]


@pytest.mark.parametrize(("images", "texts", "said"), wrong_shapes())
def test_shapes_that_do_not_fit(here, images, texts, said):
    with pytest.raises(InputError, match=said) as error:
        evaluation.main(save(images, texts))
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_other_files_are_refused(here):
    images, texts = made()
    save(images, texts)
    with open("p.npy", "wb") as file:
        pickle.dump(Evil(), file)
    np.save("o.npy", np.array([Evil()], dtype=object))
    np.savez("z.npz", images)
    torch.save(images, "x.pt")
    for name in ("p.npy", "o.npy", "z.npz", "x.pt"):
        with pytest.raises(InputError, match=f"{name}: not a whole .npy array"):
            rank_embeddings(name, "t.npy")
    with pytest.raises(FileNotFoundError, match="no.npy: no such file of embeddings"):
        rank_embeddings("i.npy", "no.npy")
    assert not os.path.exists("pwned")


@pytest.mark.parametrize("of", [ORDER, SHUFFLED, UNEVEN], ids=["order", "shuffled", "uneven"])
@pytest.mark.parametrize("told", ["names", "rows", "copies", "copies and names", "dirty copies"])
def test_a_file_of_ids_says_which_image(here, capsys, of, told):
    """A row per image and a line per text; or a row per text, and equal rows or ids are one."""
    images, texts = made(of)
    scores, metrics = plain(images, texts, of)
    first = list(dict.fromkeys(of.tolist()))  # the images in the order of their first texts
    flags, rows = [], images[of]
    if "dirty" in told:  # a copy was computed in another batch
        rows = rows * (1 + 1e-4 * np.random.default_rng(0).normal(size=rows.shape))
    if told in ("names", "rows"):
        rows = images[first] if told == "names" else images
    if told != "copies":
        names = of if told == "rows" else [f"{x:05}.jpg" for x in of]
        flags = ["--ids", write("ids.txt", names)]
    evaluation.main([*save(rows.astype("f4"), texts), *flags, "--save_path", "s.npy"])
    said = capsys.readouterr().out
    assert f"Images: 12, Captions: {len(of)}" in said and "warning" not in said
    assert f"rsum: {metrics['rsum']:.1f}" in said
    got = np.load("s.npy")[np.argsort(first)] if told != "rows" else np.load("s.npy")
    np.testing.assert_allclose(got, scores, atol=1e-3)
    found = rank_embeddings("i.npy", "t.npy", *flags[1:])
    if told not in ("rows", "copies"):
        assert found.ids == [f"{x:05}.jpg" for x in first]
    assert evaluation.eval_ensemble("s.npy") == found.metrics


def test_a_line_per_image_names_the_images(here):
    images, texts = made()
    save(images, texts)
    ids = [f"photo {k}.jpg" for k in range(12)]
    found = rank_embeddings("i.npy", "t.npy", write("ids.txt", [*ids, "", ""]))
    assert found.ids == ids and found.metrics == plain(images, texts, None)[1]
    twice = np.repeat(images, 2, 0), np.repeat(texts, 2, 0)  # rows with one id are one image
    found = rank_embeddings(*twice, write("ids.txt", np.repeat(ids, 2)))
    assert found.ids == ids and found.own_image.tolist() == np.repeat(np.arange(12), 10).tolist()


def test_files_of_ids_that_do_not_fit(here):
    images, texts = made(UNEVEN)
    save(images, texts)
    m = len(UNEVEN)
    for lines, said in (
        (range(13), f"ids.txt: 13 lines, expected {m}, one per text of t.npy, or 12, one per row"),
        (["a"] * m, "ids.txt: a line per caption, which name 1 images, but there are 12 rows"),
        ([f"x{k}" for k in range(m)], f"ids.txt: a line per caption, which name {m} images"),
        ([*UNEVEN[:-1], 12], "ids.txt: a line per caption, which name 13 images"),
        ([f"x{k}" for k in range(12)], f"t.npy: {m} texts for the 12 rows of i.npy: with 5 per"),
    ):
        with pytest.raises(InputError, match=said):
            rank_embeddings("i.npy", "t.npy", write("ids.txt", lines))
    np.save("i.npy", images[UNEVEN])
    wrong = write("ids.txt", np.roll(UNEVEN, 1))
    with pytest.raises(InputError, match=r"rows \d+ and \d+ .from 0. of i.npy have the id '\d+', "):
        rank_embeddings("i.npy", "t.npy", wrong)
    with pytest.raises(FileNotFoundError, match="no.txt: no such image id file"):
        rank_embeddings("i.npy", "t.npy", "no.txt")
    np.save("i.npy", images)  # of one image there is no text
    keep = np.flatnonzero(UNEVEN != 4)
    np.save("t.npy", texts[keep])
    found = rank_embeddings("i.npy", "t.npy", write("ids.txt", UNEVEN[keep]))
    assert found.scores.shape == (11, len(keep))
    assert rank_embeddings(images, texts[:3], write("ids.txt", "171")).scores.shape == (2, 3)


def test_rows_that_are_almost_copies_are_named(here, capsys):
    images, texts = made()
    rows = np.repeat(images, 5, 0)
    rows[2] *= 1 + 1e-5 * np.arange(9, dtype=np.float32)
    evaluation.main(save(rows, texts))
    said = capsys.readouterr().out
    assert "Images: 13, Captions: 60" in said
    assert (
        "warning: i.npy: 1 rows are almost those before them, the first is row 2 (from 0)" in said
    )


# A data set


@pytest.fixture
def data(here):
    """A data set of photos without features: captions of 12 images, in no order."""
    folder = here / "data" / "x"
    folder.mkdir(parents=True)
    write(folder / "test_caps.txt", [f"caption {k}" for k in range(len(UNEVEN))])
    write(folder / "test_caption_image.txt", UNEVEN)
    write(folder / "test_ids.txt", [f"{k}.jpg" for k in range(12)])
    return folder


@pytest.mark.parametrize("features", [None, "row per image", "row per caption"])
@pytest.mark.parametrize(
    "where", [{"data_path": "data", "data_name": "x"}, {"data_path": "data/x"}]
)
def test_a_data_set_says_which_image(data, features, where):
    images, texts = made(UNEVEN)
    _, metrics = plain(images, texts, UNEVEN)
    given, ids = [images], [f"{k}.jpg" for k in range(12)]
    if features:
        np.save(data / "test_ims.npy", np.arange(12.0)[:, None, None] * np.ones((12, 4, 3)) + 1)
    if features == "row per caption":
        np.save(data / "test_ims.npy", np.load(data / "test_ims.npy")[UNEVEN])
        os.remove(data / "test_ids.txt")
        first = list(dict.fromkeys(UNEVEN.tolist()))  # images in the order of their first captions
        given, ids = [images[first], images[UNEVEN]], None
    for rows in given:
        found = rank_embeddings(rows, texts, **where)
        assert (found.metrics["rsum"], found.split, found.ids) == (metrics["rsum"], "test", ids)
        assert Path(found.folder).resolve() == data.resolve()
        assert found.captions == [f"caption {k}" for k in range(len(UNEVEN))]


def test_dev_is_its_first_captions(data, monkeypatch):
    """All of dev is given, or only what is ranked."""
    monkeypatch.setattr(embeddings, "DEV_CAPTIONS", 20)
    images, texts = made()
    write(data / "dev_caps.txt", [f"caption {k}" for k in range(60)])
    _, metrics = plain(images[:4], texts[:20], None)
    np.save(data / "dev_ims.npy", np.ones((12, 2, 3), np.float32))
    for some in (12, 4):
        for texts_given in (60, 20):
            given = images[:some], texts[:texts_given]
            found = rank_embeddings(*given, data_path=str(data), split="dev")
            assert found.metrics == metrics and len(found.captions) == 20


def test_data_sets_that_do_not_fit(data):
    images, texts = made(UNEVEN)
    m = len(UNEVEN)
    for i, t, more, said in (
        (images, texts[:-1], {}, f"texts: {m - 1} texts, but .*test_caps.txt holds {m} captions"),
        (images, texts, {"split": "dev"}, "data/x: no dev_caps.txt in it; give --data_path and"),
        (images, texts, {"data_name": "y"}, "data/y: no such data folder"),
        (images, texts, {"data_name": "x", "split": "dev"}, "dev_caps.txt: no such caption file"),
        (images, texts, {"ids": "a"}, "--ids or a data set .* says which image"),
    ):
        place = {"data_path": "data" if "data_name" in more else "data/x"} | more
        with pytest.raises((InputError, FileNotFoundError), match=said):
            rank_embeddings(i, t, **place)
    os.remove(data / "test_caption_image.txt")
    with pytest.raises(InputError, match="test_caps.txt: .* for the 11 rows of images: "):
        rank_embeddings(images[:11], texts, data_path="data/x")
    write(data / "test_caption_image.txt", UNEVEN)
    np.save(data / "test_ims.npy", np.ones((12, 2, 3), np.float32))
    with pytest.raises(InputError, match="images: 11 rows, but the split test of data/x has 12 im"):
        rank_embeddings(images[:11], texts, data_path="data/x")


def test_five_folds_paper_and_saved_scores(here, capsys):
    images, texts = made(np.repeat(np.arange(15), 5))
    flags = save(images, texts)
    scores, _ = plain(images, texts, None)
    evaluation.main([*flags, "--fold5", "--save_path", "s.npy", "--paper", *"123456"])
    said = capsys.readouterr().out
    folds = [retrieval_metrics(scores[3 * k : 3 * k + 3, 15 * k : 15 * k + 15]) for k in range(5)]
    assert f"rsum: {np.mean([fold['rsum'] for fold in folds]):.1f}" in said.splitlines()
    assert "Five folds of 3 images each" in said and said.splitlines()[-2].startswith("paper")
    assert evaluation.eval_ensemble("s.npy", True)["folds"] == folds
    with pytest.raises(InputError, match="i.npy: 4 images, too few for five folds"):
        evaluation.main([*save(images[:4], texts[:20]), "--fold5"])
    with pytest.raises(InputError, match="no/s.npy: expected a file in an existing folder"):
        evaluation.main([*flags, "--save_path", "no/s.npy"])


def test_flags_that_do_not_go_with_embeddings(here, capsys):
    flags = save(*made())
    for more in (["a.pth.tar"], ["--batch_size", "3"], ["--device", "cpu"], ["--published_boxes"]):
        with pytest.raises(SystemExit):
            evaluation.main([*more, *flags])
        said = capsys.readouterr().err
        assert "--embeddings takes no checkpoints beside it, and only --csv, " in said
    for more, said in (
        ([], "name a checkpoint"),
        (["a.npy", "--ids", "x"], "are for --embeddings"),
        ([*flags, "--split", "dev"], "--split: of which data set?"),
    ):
        with pytest.raises(SystemExit):
            evaluation.main(more)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("m", [60, 12])
@pytest.mark.parametrize("turned", [False, True])
def test_embeddings_in_place_of_score_matrices(here, m, turned):
    """Their shapes tell, also if there is one text per image."""
    images, texts = made(ORDER[:: 60 // m])
    save(images, texts)
    names = ["t.npy", "i.npy"] if turned else ["i.npy", "t.npy"]
    hinted = ["i.npy", "t.npy"] if m > 12 else names
    with pytest.raises(InputError, match=f"Then: --embeddings {' '.join(hinted)}$"):
        evaluation.main(names)
    np.save("s.npy", np.zeros((12, 55), np.float32))
    with pytest.raises(InputError) as error:
        evaluation.main(["i.npy", "s.npy"])
    assert "--embeddings" not in str(error.value)


def test_other_outputs(here, torchrun):
    pytest.importorskip("scipy")
    images, texts = made(UNEVEN)
    flags = save(images[UNEVEN], texts)  # a row per text
    write("ids.txt", [f"{x}.jpg" for x in UNEVEN])
    more = ["--json", "a.json", "--csv", "a.csv", "--trec", "a"]
    done = torchrun(evaluation.__file__, *flags, "--ids", "ids.txt", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rsum: ") == 1
    assert '"i.npy"' in Path("a.json").read_text()
    lines = Path("a.t2i.qrels").read_text().splitlines()
    assert lines == [f"caption_{k} 0 {x}.jpg 1" for k, x in enumerate(UNEVEN)]
