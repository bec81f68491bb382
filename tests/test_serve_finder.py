"""What serve.py's flags for the search open, and what is said of what is missing."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")

import serve  # noqa: E402
import serve_finder  # noqa: E402
from serve_schema import AttentionOf, ImageSearch, Ranking  # noqa: E402
from tests.searching import BARE, SCAN, StandIn, make_finder, serving, write_photos  # noqa: E402
from tests.serving import write_checkpoint  # noqa: E402
from tests.tiny_backend import DIM, OUT, extract, ids, photo_folder  # noqa: E402, F401
from util.cli import InputError  # noqa: E402

STEM = Path("data/tiny_precomp/test")


def open_finder(*flags: str, path: str | None = None) -> serve_finder.Finder | None:
    data = "--data_path", "data", "--data_name", "tiny_precomp"
    opt, _ = serve.parse([path or write_checkpoint(SCAN), *data, *flags])
    return serve_finder.open_finder(opt, torch.device("cpu"))


def write_settings(**settings) -> None:
    whole = {"backend": "efficientnet_lite", "grid": 6, "weights": "/secret/w.pth"}
    whole |= {"weights_sha256": "00", "regions": None, "half": False, "photos": "/none"}
    Path(f"{STEM}_extractor.json").write_text(json.dumps(whole | settings))


def test_photos_and_extractor_are_those_of_the_data(tiny_positions, monkeypatch, capsys):
    write_photos()
    write_settings(photos=str(Path("photos").absolute()))
    opened = []
    monkeypatch.setattr(
        serve_finder, "open_extractor", lambda *given: opened.append(given) or StandIn()
    )
    finder = open_finder("--max_upload_mb", "0.5")
    try:
        assert opened[0][0]["backend"] == "efficientnet_lite"
        assert finder.info["uploads"] and finder.info["photos"] == 14
        assert finder.photos[BARE] is None
        assert finder.pictures.limits.bytes == 2**19
        found = finder.captions_of_picture(np.zeros((20, 30, 3), np.uint8), Ranking())
        assert len(found["results"]) == 10
    finally:
        finder.close()


def test_photos_of_a_flag_go_before_those_of_the_data(tiny_positions):
    write_photos()
    Path("elsewhere").mkdir()
    Image.new("RGB", (9, 9)).save("elsewhere/p3.jpg")
    write_settings(photos=str(Path("photos").absolute()), given_boxes=True)
    finder = open_finder("--images", "elsewhere")
    assert [k for k, path in enumerate(finder.photos) if path] == [3]
    with pytest.raises(InputError, match="no such folder"):
        open_finder("--images", "nowhere")


@pytest.mark.parametrize(
    ("settings", "captions", "why"),
    [
        (None, True, "extract_regions.py did not make"),
        ({"given_boxes": True}, True, "another program"),
        ({}, True, "first lines say why"),
        ({}, False, "no captions"),
    ],
)
def test_why_uploads_are_off(tiny_positions, monkeypatch, capsys, settings, captions, why):
    def fail(*_):
        raise InputError("/secret/w.pth: no such file")

    monkeypatch.setattr(serve_finder, "open_extractor", fail)
    if settings is not None:
        write_settings(**settings)
    if not captions:
        Path(f"{STEM}_caps.txt").unlink()
    finder = open_finder()
    assert not finder.info["uploads"] and why in finder.info["why_no_uploads"]
    assert "secret" not in finder.info["why_no_uploads"]  # it is not for every browser
    said = capsys.readouterr().out
    assert ("notice: pictures cannot be uploaded: /secret/w.pth" in said) == ("lines" in why)


def test_an_upload_of_a_picture_of_the_data_ranks_as_the_data(photos, tiny):
    extract()
    names = ids()
    lines = Path(f"{STEM}_caps.txt").read_text().splitlines()
    (OUT / "test_caps.txt").write_text("".join(f"{line}\n" for line in lines[: len(names)]))
    path = write_checkpoint(SCAN | {"img_dim": DIM})
    finder = open_finder("--data_name", OUT.name, path=path)

    def scores(reply) -> list[float]:
        return [x["score"] for x in sorted(reply.json["results"], key=lambda x: x["caption"])]

    with serving(finder) as page:
        stored = [page.ask(f"/api/captions?image={k}&stages=exact") for k in range(len(names))]
        stored = np.array([scores(reply) for reply in stored])  # (N, N)
        for image, name in enumerate(names):
            raw = (photos / name).read_bytes()
            reply = page.ask("/api/upload?stages=exact", raw=raw, content_type="image/x")
            off = np.abs(stored - scores(reply)).max(1)  # (N,)
            # The features of the data are float16.
            assert off.argmin() == image and off[image] < np.delete(off, image).min() / 5


@pytest.mark.parametrize("flag", ["data_name", "images", "first_stage", "cache"])
def test_flags_of_the_search_need_the_data(tiny, flag):
    opt, _ = serve.parse(["model.pth.tar", f"--{flag}", "x"])
    with pytest.raises(InputError, match=f"--{flag}: give --data_path too"):
        serve_finder.open_finder(opt, torch.device("cpu"))
    opt, _ = serve.parse(["model.pth.tar"])
    assert serve_finder.open_finder(opt, torch.device("cpu")) is None


def test_a_first_stage_of_another_model(tiny_positions):
    first = write_checkpoint({"model": "vse"}, "first.pth.tar")
    finder = open_finder("--first_stage", first)
    found = finder.find_images(ImageSearch(query="a red dog", topk=15))
    alone = make_finder(SCAN, uploads=False).find_images(ImageSearch(query="a red dog", topk=15))
    assert {x["image"] for x in found["results"]} == set(range(15))
    for a, b in zip(found["results"], alone["results"], strict=True):
        assert a["image"] == b["image"] and abs(a["score"] - b["score"]) < 1e-6
    firsts = ([x["first"] for x in one["results"]] for one in (found, alone))
    assert not np.allclose(*firsts, atol=1e-3)
    assert finder.look(AttentionOf(query="a dog", images=[0]))["words"] == ["a", "dog"]


def test_scores_that_are_not_finite_are_not_sent(tiny_positions, monkeypatch):
    finder = make_finder(uploads=False)
    found = finder.searcher.images_for("a dog")
    bad = found._replace(scores=[float("nan"), *found.scores[1:]])
    monkeypatch.setattr(finder.searcher, "images_for", lambda *_: bad)
    with pytest.raises(InputError, match="not finite"):
        finder.find_images(ImageSearch(query="a dog"))


def test_costly_requests_have_a_bound(tiny, monkeypatch):
    finder = make_finder()
    monkeypatch.setattr(serve_finder, "MOST_EXACT", 14)  # of 15 images and 75 captions
    assert not finder._info()["exact"] and finder.info["exact"]
    with serving(finder) as page:
        reply = page.ask("/api/search", {"query": "a", "stages": "exact"})
        assert reply.status == 422 and "exact scores of all 15 would take too long" in str(reply)
        reply = page.ask("/api/captions?image=0&stages=exact")
        assert reply.status == 422 and "exact scores of all 75" in reply.json["error"]
        assert page.ask("/api/search", {"query": "a"}).status == 200
        monkeypatch.setattr(serve_finder, "MOST_WEIGHTS", 20)
        asked = {"query": "a dog", "images": [0, 1, 2, 3, 4]}  # 4 words with <start> and <end>
        assert page.ask("/api/attention", asked).status == 200
        asked["images"].append(5)
        reply = page.ask("/api/attention", asked)
        assert reply.status == 422 and "expected at most 5 images" in reply.json["error"]


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", 3), ("localhost", 3), ("::1", 3), ("0.0.0.0", 0), ("box", 0)]
)
def test_a_folder_that_only_the_data_names_is_not_shown_to_others(tiny, host, shown, capsys):
    """Data of a stranger could name a folder of private photos."""
    folder = Path("private")
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9)).save(folder / f"{number}.jpg")
    stem = Path("data/tiny_precomp/test")
    Path(f"{stem}_ids.txt").write_text("".join(f"{k}.jpg\n" for k in range(15)))
    settings = {"backend": "efficientnet_lite", "weights": None, "weights_sha256": "0"}
    Path(f"{stem}_extractor.json").write_text(json.dumps(settings | {"photos": "private"}))
    searcher = make_finder(uploads=False).searcher
    opt = argparse.Namespace(images=None, host=host)
    photos = serve_finder.open_photos(opt, searcher)
    assert sum(path is not None for path in photos) == shown
    said = capsys.readouterr().out
    assert ("Photos: private" if shown else "to show it, give --images private") in said
    opt.images = "private"
    assert sum(path is not None for path in serve_finder.open_photos(opt, searcher)) == 3
