"""Searches: the scores are those of evaluation.py, the stages agree, and faults are one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import first_stage as stage
import search
from system import ServedImage
from tests.conftest import write_split
from tests.two_stages import (
    FOLDER,
    GSMN,
    SYSTEMS,
    captions,
    fewer_regions,
    matrix,
    remove_captions,
    searcher,
    write_model,
)
from util.cli import InputError

CLOSE = {"abs": 2e-5, "rel": 1e-4}


def ranked(scores: np.ndarray) -> list[int]:
    return np.lexsort((np.arange(len(scores)), -scores)).tolist()


def same_order(places: list[int], scores: np.ndarray) -> bool:
    """Whether places are in the order of the scores, but for equal ones that rounding parts."""
    chosen = scores[places]
    return bool((np.diff(chosen) <= 1e-5).all()) and len(set(places)) == len(places)


@pytest.mark.parametrize("fewer", [False, True], ids=["as many regions", "fewer regions"])
@pytest.mark.parametrize("flags", SYSTEMS, ids=str)
def test_the_scores_are_those_of_evaluation(tiny_positions, flags, fewer):
    if fewer and not flags.get("need_box_whole"):  # its last region is the image
        fewer_regions()
    path = write_model(**flags)
    scores, found = matrix(path), searcher(path)
    sentences = captions()
    for caption in (0, 31, 74):
        for stages, shortlist in (("exact", 15), ("two", 15), ("two", 99)):
            got = found.images_for(sentences[caption], 15, shortlist, stages)
            assert got.scores == pytest.approx(scores[got.places, caption], **CLOSE)
            assert sorted(got.places) == list(range(15))
            assert same_order(got.places, scores[:, caption])
        few = found.images_for(sentences[caption], 3, 5)
        first = found.images_for(sentences[caption], 5, stages="first")
        assert set(few.places) <= set(first.places)
        best = sorted(first.places, key=lambda image: -scores[image, caption])[:3]
        assert few.scores == pytest.approx(scores[best, caption], **CLOSE)
        by_place = dict(zip(first.places, first.scores, strict=True))
        assert few.first == pytest.approx([by_place[image] for image in few.places])
    for image in (0, 4, 14):
        for stages, shortlist in (("exact", 75), ("two", 75)):
            got = found.captions_for(image, 75, shortlist, stages)
            assert got.scores == pytest.approx(scores[image, got.places], **CLOSE)
            assert sorted(got.places) == list(range(75))
            assert same_order(got.places, scores[image])


@pytest.mark.parametrize("flags", SYSTEMS, ids=str)
def test_the_first_stage_is_the_product_of_means(tiny_positions, flags):
    found = searcher(write_model(**flags))
    model, data = found.model, found.dataset
    with torch.no_grad():
        for caption in (3, 40):
            got = found.images_for(captions()[caption], 15, stages="first")
            for place, score in zip(got.places, got.scores, strict=True):
                item = data.image_item(place) | data.caption_item(caption)
                image, text = model(search_batch(item))
                if flags.get("model") == "vse":
                    a, b = image["image"][0], text["sentence"][0]
                else:
                    a, b = image["regions"][0].mean(0), text["words"][0].mean(0)
                assert score == pytest.approx(float(a @ b / a.norm() / b.norm()), **CLOSE)
            assert got.scores == sorted(got.scores, reverse=True) == got.first


def search_batch(item: dict) -> dict:
    return stage.collate_fn([item])


def test_bert_searches_and_says_if_a_sentence_is_too_long(tiny, little):
    import train
    from tests.small_bert import flags

    train.main(flags(num_epochs=1))
    path = "run/model_best.pth.tar"
    scores, found = matrix(path), searcher(path)
    got = found.images_for(captions()[7], 15, 15)
    assert got.scores == pytest.approx(scores[got.places, 7], abs=1e-4)
    with pytest.raises(InputError, match="a sentence of 42 pieces, but this BERT reads at most 32"):
        found.images_for("a " * 40)


def test_another_model_makes_the_shortlist(tiny):
    exact, other = write_model("a.pth.tar"), write_model("b.pth.tar", 1, model="vse")
    found, alone = searcher(exact, first_stage=other), searcher(other)
    scores = matrix(exact)
    for caption in (0, 50):
        text = captions()[caption]
        few, first = found.images_for(text, 4, 6), alone.images_for(text, 6, stages="exact")
        assert set(few.places) <= set(first.places)
        best = sorted(first.places, key=lambda image: -scores[image, caption])[:4]
        assert few.scores == pytest.approx(scores[best, caption], **CLOSE)
        assert found.images_for(text, 6, stages="first").places == first.places
    assert len(os.listdir(f"{FOLDER}/test_search")) == 2  # one model's vectors: .npy and .json
    got = found.captions_for(3, 75, 75)
    assert got.scores == pytest.approx(scores[3, got.places], **CLOSE)


def test_equal_images_stand_in_their_order(tiny):
    images = np.load(f"{FOLDER}/test_ims.npy")
    images[[9, 2, 12]] = images[5]
    np.save(f"{FOLDER}/test_ims.npy", images)
    found = searcher(write_model())
    for stages in ("exact", "two", "first"):
        got = found.images_for(captions()[11], 15, 15, stages)
        where = [got.places.index(image) for image in (2, 5, 9, 12)]
        assert where == list(range(where[0], where[0] + 4)), stages


def test_a_picture_of_ones_own_scores_like_the_same_image_of_the_split(tiny_positions):
    stem = f"{FOLDER}/test"
    images, boxes = (np.load(f"{stem}_{x}.npy") for x in ("ims", "ims_bbx"))
    size, whole = np.load(f"{stem}_ims_size.npy")[6], np.load(f"{stem}_who_ims.npy")
    for flags in SYSTEMS:
        found = searcher(write_model(**flags), cache="kept")
        arrays = (torch.from_numpy(x[6]) for x in (images, boxes))
        picture = ServedImage(*arrays, tuple(map(float, size.tolist())), torch.from_numpy(whole[6]))
        if flags.get("need_box_whole"):
            continue  # an extractor adds no such region
        got, want = (found.captions_for(x, 75, 75) for x in (picture, 6))
        by_place = dict(zip(want.places, want.scores, strict=True))
        assert got.scores == pytest.approx([by_place[k] for k in got.places], **CLOSE)
        with pytest.raises(InputError, match="regions have 11 numbers, the model .* expects 12"):
            found.captions_for(picture._replace(features=picture.features[:, :11]))


def test_images_without_captions_are_searched(tiny_positions):
    for flags in SYSTEMS:
        write_split(Path(FOLDER), "test", 15)
        path = write_model(**flags)
        scores, texts = matrix(path), captions()
        remove_captions()
        found = searcher(path, cache="kept")
        assert (found.n_images, found.n_captions, found.captions) == (15, 0, [])
        found.prepare()
        got = found.images_for(texts[20], 15, 15)
        assert got.scores == pytest.approx(scores[got.places, 20], **CLOSE)
        with pytest.raises(InputError, match="test has no captions"):
            found.captions_for(0)


def test_only_the_rows_of_the_shortlist_are_read(tiny, monkeypatch):
    found = searcher(write_model())
    found.prepare()
    read = []
    item = type(found.dataset).image_item
    monkeypatch.setattr(
        type(found.dataset), "image_item", lambda self, x: read.append(x) or item(self, x)
    )
    found.images_for(captions()[0], 2, 4)
    assert len(read) == 4
    found.images_for(captions()[0], 2, 4, "first")
    assert len(read) == 4


FAULTS = [
    (("", 10, 100, "two"), "an empty sentence"),
    ((" \t", 10, 100, "two"), "an empty sentence"),
    (("a dog", 0, 100, "two"), "topk 0: expected at least 1"),
    (("a dog", -3, 100, "first"), "topk -3: expected at least 1"),
    (("a dog", 10, 9, "two"), "shortlist 9: less than topk, 10"),
    (("a dog", 10, 100, "both"), "stages 'both': expected one of two, first, exact"),
]


@pytest.mark.parametrize(("asked", "said"), FAULTS)
def test_wrong_numbers_are_refused(tiny, asked, said):
    with pytest.raises(InputError, match=said):
        searcher(write_model()).images_for(*asked)


def test_other_faults_are_one_line(tiny_graphs):
    found = searcher(write_model())
    for image in (-1, 15):
        with pytest.raises(InputError, match=f"image {image}: test has 15 images"):
            found.captions_for(image)
    with pytest.raises(FileNotFoundError, match="tset_ims.npy: no such file; splits there: train"):
        searcher(split="tset")
    path = write_model("sparse.pth.tar", **GSMN, is_sparse=True)
    with pytest.raises(InputError, match="this model needs more of a sentence"):
        searcher(path).images_for("a dog")
    scores = matrix(path)
    got = searcher(path).captions_for(2, 75, 75)  # the captions have their dependencies
    assert got.scores == pytest.approx(scores[2, got.places], **CLOSE)
    dropped = write_model("drop.pth.tar", model="chan", img_dim=11)
    with pytest.raises(InputError, match="the model expects 11"):
        searcher(first_stage=dropped)


# The command

ARGS = ["model.pth.tar", "--data_path", "data", "--data_name", "tiny_precomp", "--device", "cpu"]


def command(capsys, *more: str) -> tuple[str, str]:
    search.main([*ARGS, *more])
    said = capsys.readouterr()
    return said.out, said.err


def test_the_command_prints_and_writes_what_it_finds(tiny, capsys):
    scores, text = matrix(write_model()), captions()[8]
    names = [f"picture{k}.jpg" for k in range(15)]
    Path(f"{FOLDER}/test_ids.txt").write_text("".join(f"{x}\n" for x in names))
    os.makedirs("photos")
    Path("photos/picture3.jpg").write_bytes(b"x")
    more = [text, "--topk", "15", "--images", "photos"]
    out, _ = command(capsys, *more, "--json", "found.json")
    record = json.loads(Path("found.json").read_text())
    assert (record["searched"], record["images"], record["captions"]) == ("images", 15, 75)
    assert (record["stages"], record["shortlist"], record["index"]) == ("two", 100, "flat")
    (query,) = record["queries"]
    assert query["query"] == text and set(query["milliseconds"]) == {"encode", "first", "exact"}
    for rank, result in enumerate(query["results"], 1):
        image = result["image"]
        assert result["rank"] == rank and result["id"] == names[image]
        assert result["score"] == pytest.approx(scores[image, 8], **CLOSE)
        assert result["photo"] == ("photos/picture3.jpg" if image == 3 else None)
        assert f"{rank:>4}  {result['score']:8.4f}  image {image}  '{names[image]}'" in out
    assert "First stage: flat index" in out and "milliseconds: query" in out
    assert "photos/picture3.jpg" in out and "Results saved to found.json" in out
    alone, err = command(capsys, *more, "--json", "-")
    again = json.loads(alone)["queries"][0]["results"]
    assert again == query["results"] and "First stage" in err


def test_the_command_finds_captions(tiny, capsys):
    scores = matrix(write_model())
    Path(f"{FOLDER}/test_ids.txt").write_text("".join(f"p{k}.jpg\n" for k in range(15)))
    for name in ("6", "p6.jpg", "p6"):
        out, _ = command(capsys, "--image", name, "--stages", "exact", "--json", "f.json")
        results = json.loads(Path("f.json").read_text())["queries"][0]["results"]
        assert len(results) == 10
        for result in results:
            assert result["text"] == captions()[result["caption"]] and "first" not in result
            assert result["image"] == result["caption"] // 5
            assert result["score"] == pytest.approx(scores[6, result["caption"]], **CLOSE)
            assert result["text"] in out
    with pytest.raises(InputError, match="--image p99: no such image"):
        search.main([*ARGS, "--image", "p99"])
    Path("mine.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="mine.jpg: there is no .*test_extractor.json"):
        search.main([*ARGS, "--image", "mine.jpg"])


def test_the_command_reads_many_sentences(tiny, capsys):
    write_model()
    Path("q.txt").write_text("a red dog\nthe zebra flies\n")
    out, _ = command(capsys, "--queries", "q.txt", "--topk", "2", "--json", "f.json")
    queries = json.loads(Path("f.json").read_text())["queries"]
    assert [query["query"] for query in queries] == ["a red dog", "the zebra flies"]
    assert all(len(query["results"]) == 2 for query in queries)
    assert 'notice: not in the vocabulary, so read as <unk>: "the", "zebra".' in out
    assert out.count("First stage:") == 1
    Path("q.txt").write_text("a red dog\n\na cat\n")
    with pytest.raises(InputError, match="q.txt: line 2 is empty"):
        search.main([*ARGS, "--queries", "q.txt"])
    Path("q.txt").write_text("")
    with pytest.raises(InputError, match="q.txt"):
        search.main([*ARGS, "--queries", "q.txt"])
    with pytest.raises(FileNotFoundError, match="no.txt: no such file"):
        search.main([*ARGS, "--queries", "no.txt"])


WRONG = [
    ([], "are required: SENTENCE"),
    (["--image", "3", "--queries", "q.txt"], "give one of a sentence, --queries FILE and --image"),
    (["--json", "a dog"], "are required: SENTENCE"),
    (["a dog", "--image", "3"], "a dog, after cpu, belongs to no flag"),
    (["a dog", "--topk", "0"], "--topk: 0: expected a number of at least 1"),
    (["a dog", "--topk", "9", "--shortlist", "8"], "--shortlist 8: less than topk, 9"),
    (["a dog", "--stages", "frist"], "did you mean first"),
    (["a dog", "--json", ""], "--json: an empty name"),
]


def test_the_sentence_stands_anywhere(tiny, capsys):
    write_model()
    search.main([ARGS[0], "a red dog", *ARGS[1:]])
    first = [x for x in capsys.readouterr().out.splitlines() if " image " in x]
    out, _ = command(capsys, "a red dog")
    assert first == [x for x in out.splitlines() if " image " in x] and len(first) == 10
    with pytest.raises(SystemExit):
        search.main([ARGS[0], "a dog", *ARGS[1:], "--image=3"])
    assert "give one of a sentence" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "said"), WRONG)
def test_a_wrong_command_line_is_one_line(tiny, capsys, more, said):
    with pytest.raises(SystemExit):
        search.main([*ARGS, *more])
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_refused_first(tiny):
    write_model()
    for path in ("no/f.json", f"{FOLDER}/test_caps.txt"):
        with pytest.raises(InputError, match=path):
            search.main([*ARGS, "a dog", "--json", path])
    assert not os.path.exists(f"{FOLDER}/test_search")


def test_a_search_does_not_change_what_others_read(tiny, capsys):
    """The folder of vectors is no split, and its removal loses nothing."""
    write_model()
    before = matrix("model.pth.tar")
    one, _ = command(capsys, "a red dog")
    assert np.array_equal(matrix("model.pth.tar"), before)
    shutil.rmtree(f"{FOLDER}/test_search")
    other, _ = command(capsys, "a red dog")
    lines = [[x for x in out.splitlines() if " image " in x] for out in (one, other)]
    assert lines[0] == lines[1] and len(lines[0]) == 10


def test_the_command_extracts_a_picture_as_the_split_was(tiny, capsys, monkeypatch):
    Image = pytest.importorskip("PIL.Image", reason="pip install pillow")
    from util import region_backends

    write_model()
    images = np.load(f"{FOLDER}/test_ims.npy")
    settings = {"backend": "x", "weights": None, "weights_sha256": "0", "photos": "photos"}
    settings |= {"grid": 2, "regions": None, "half": False, "given_boxes": False}
    Path(f"{FOLDER}/test_extractor.json").write_text(json.dumps(settings))
    Image.new("RGB", (9, 6)).save("own.png")
    asked = []

    class Extractor:
        def extract(self, pictures):
            asked.append([picture.size for picture in pictures])
            boxes, whole = np.zeros((4, 4), np.float32), np.zeros(12, np.float32)
            return [region_backends.Regions(images[6].astype(np.float32), boxes, (9, 6), whole)]

    def open_extractor(given, device):
        asked.append(given["grid"])
        return Extractor()

    monkeypatch.setattr(region_backends, "open_extractor", open_extractor)
    lines = []
    for image in ("own.png", "6"):
        out, _ = command(capsys, "--image", image)
        lines.append([x for x in out.splitlines() if " caption " in x])
    assert lines[0] == lines[1] and len(lines[0]) == 10
    assert asked == [2, [(9, 6)]]
    with pytest.raises(InputError, match="no.png: no such image"):
        search.main([*ARGS, "--image", "no.png"])
    settings["given_boxes"] = True
    Path(f"{FOLDER}/test_extractor.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="the boxes of this split came from another program"):
        search.main([*ARGS, "--image", "own.png"])


@pytest.mark.parametrize("flags", [{}, {"model": "vse"}], ids=["scan", "vse"])
@pytest.mark.parametrize("more", [[], ["--json", "-"]], ids=["printed", "json"])
def test_weights_that_are_no_numbers_are_said_in_every_stage(tiny, flags, more):
    path = write_model(**flags)
    state = torch.load(path, weights_only=False)
    state["model"][0]["fc.weight"][:] = torch.nan
    torch.save(state, path)
    for stages in ("two", "first", "exact"):
        with pytest.raises(InputError, match="NaN or Inf; are the weights"):
            search.main([path, "a dog", "--stages", stages, *more])


@pytest.mark.parametrize("flags", [{"no_imgnorm": True}, {"no_txtnorm": True, "pool": "max"}])
def test_vectors_of_a_vse_model_are_its_score(tiny, flags):
    """Also where they are not of unit length."""
    images = np.load(f"{FOLDER}/test_ims.npy")
    np.save(f"{FOLDER}/test_ims.npy", images * np.linspace(0.3, 3, len(images))[:, None, None])
    opened = searcher(write_model(model="vse", **flags))
    first = opened.images_for("a red dog", 15, stages="first")
    exact = opened.images_for("a red dog", 15, stages="exact")
    assert first.places == exact.places
    np.testing.assert_allclose(first.scores, exact.scores, rtol=1e-4, atol=1e-5)
    for image in (0, 14):
        found = [opened.captions_for(image, 75, stages=x).scores for x in ("first", "exact")]
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
