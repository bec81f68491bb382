"""The routes of the search page: what they answer, what they refuse, and what they never tell."""

import base64
import hashlib
import html
import http.client
import io
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
Image = pytest.importorskip("PIL.Image", reason="pip install pillow")

from explain import explain_pair, region_boxes  # noqa: E402
from system import ServedImage  # noqa: E402
from tests.searching import (  # noqa: E402
    BARE,
    HOSTILE,
    SCAN,
    StandIn,
    make_finder,
    picture,
    serving,
    write_hostile_captions,
    write_photos,
)
from tests.serving import GSMN, ROOT, WHOLE, Server, make_body, write_checkpoint  # noqa: E402

STAGES = "two", "first", "exact"
VSE = {"model": "vse"}


@pytest.fixture
def finder(tiny_positions):
    write_photos()
    write_hostile_captions()
    return make_finder(photos="photos")


@pytest.fixture
def page(finder):
    with serving(finder, hosts=("photos.example.org",)) as page:
        page.finder = finder
        yield page


@pytest.mark.parametrize("stages", STAGES)
def test_images_are_those_of_the_searcher(page, stages):
    query = "A red dog ."
    asked = {"query": query, "topk": 4, "shortlist": 6, "stages": stages}
    reply = page.ask("/api/search", asked)
    found = page.finder.searcher.images_for(query, 4, 6, stages)
    results = reply.json["results"]
    assert reply.status == 200 and [x["image"] for x in results] == found.places
    np.testing.assert_allclose([x["score"] for x in results], found.scores, atol=1e-6)
    first = [x["first"] for x in results]
    if found.first:
        np.testing.assert_allclose(first, found.first, atol=1e-6)
    else:
        assert first == [None] * 4
    done = {"two": {"first", "exact"}}.get(stages, {stages})
    assert reply.json["milliseconds"].keys() == {"encode"} | done
    assert reply.json["words"] == ["a", "red", "dog", "."]
    assert [x["id"] for x in results] == [f"p{x['image']}.jpg" for x in results]


def test_words_that_the_vocabulary_lacks_are_named(page):
    notes = page.ask("/api/search", {"query": "a zebra"}).json["notes"]
    assert len(notes) == 1 and "zebra" in notes[0]
    assert page.ask("/api/search", {"query": "a dog"}).json["notes"] == []


@pytest.mark.parametrize("stages", STAGES)
def test_captions_are_those_of_the_searcher(page, stages):
    reply = page.ask(f"/api/captions?image=3&topk=40&stages={stages}")
    searcher = page.finder.searcher
    found = searcher.captions_for(3, 40, 100, stages)
    results = reply.json["results"]
    assert [x["caption"] for x in results] == found.places
    assert all(x["text"] == searcher.captions[x["caption"]] for x in results)
    assert all(x["own"] == (x["caption"] // 5 == 3) for x in results)
    assert any(x["own"] for x in results) and not all(x["own"] for x in results)


@pytest.mark.parametrize("image", [-1, 15, 10**9])
def test_an_unknown_image_is_404(page, image):
    replies = [
        page.ask(f"/api/captions?image={image}"),
        page.ask("/api/attention", {"query": "a dog", "images": [0, image]}),
        page.ask(f"/photos/{image}"),
    ]
    for reply in replies:
        assert reply.status == 404 and "image" in reply.json["error"]


SYSTEMS = [
    SCAN,
    {"model": "scan", "cross_attn": "i2t"},
    GSMN,
    {"model": "pfan"},
    WHOLE,
    {"model": "chan", "precomp_enc_type": "selfattention"},
]


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_attention_is_that_of_the_score(tiny_positions, system):
    finder = make_finder(system, uploads=False)
    with serving(finder) as page:
        assert page.ask("/api/info").json["attention"]
        reply = page.ask("/api/attention", {"query": "a red dog", "images": [2, 0]}).json
    s = finder.searcher
    assert reply["words"] == ["a", "red", "dog"]
    for image, found in zip((2, 0), reply["images"], strict=True):
        want = explain_pair(s.model, s.dataset, None, s.vocab, image, "a red dog").t2i[1:-1]
        np.testing.assert_allclose(found["weights"], want, atol=1e-4)
        boxes, size = region_boxes(s.dataset, image)
        assert found["image"] == image and found["placed"]
        np.testing.assert_allclose(found["boxes"], boxes, atol=0.1)
        np.testing.assert_allclose(found["size"], size, atol=0.1)


def test_a_model_without_attention_still_searches(tiny_positions):
    with serving(make_finder(VSE, uploads=False)) as page:
        info = page.ask("/api/info").json
        assert not info["attention"] and "attention" in info["why_no_attention"]
        assert page.ask("/api/attention", {"query": "a", "images": [0]}).status == 422
        for stages in STAGES:
            asked = {"query": "a red dog", "stages": stages}
            assert len(page.ask("/api/search", asked).json["results"]) == 10


def test_data_without_boxes_sizes_captions_or_photos(tiny):
    Path("data/tiny_precomp/test_caps.txt").unlink()
    with serving(make_finder(uploads=False)) as page:
        info = page.ask("/api/info").json
        assert (info["captions"], info["photos"], info["examples"]) == (0, 0, [])
        assert info["images"] == 15 and not info["uploads"]
        shown = page.ask("/api/search", {"query": "a red dog"}).json["results"][0]
        assert not shown["photo"] and not shown["placed"] and len(shown["boxes"]) == 4
        found = page.ask("/api/attention", {"query": "a dog", "images": [1]}).json["images"][0]
        assert not found["placed"] and np.shape(found["weights"]) == (2, 4)
        assert page.ask("/api/captions?image=1").json["results"] == []
        assert page.ask("/photos/1").status == 404


def test_photos_come_by_number_as_small_jpegs(tiny_positions):
    write_photos()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    width, height = np.load("data/tiny_precomp/test_ims_size.npy")[1].tolist()
    Image.new("RGB", (10 * height, 10 * width)).save("photos/p1.jpg", exif=turned)
    Path("photos/p2.jpg").write_text("no picture")
    Path("photos/p3.jpg").unlink()  # after the start, below
    Image.new("RGB", (50, 50)).save("photos/p3.jpg")
    with serving(make_finder(uploads=False, photos="photos")) as page:
        Path("photos/p3.jpg").unlink()
        reply = page.ask("/photos/1")
        found = Image.open(io.BytesIO(reply.body))
        assert reply.headers["content-type"] == "image/jpeg" and found.format == "JPEG"
        assert max(found.size) <= 1000 and (found.width < found.height) == (width < height)
        for number in (2, 3, BARE):
            reply = page.ask(f"/photos/{number}")
            assert reply.status == 404 and "photos/p" not in reply.json["error"]
        assert page.ask("/photos/0").status == 200


PLACES = [
    "/photos/../model.pth.tar",
    "/photos/..%2fmodel.pth.tar",
    "/photos/%2e%2e/model.pth.tar",
    "/photos//etc/passwd",
    "/photos/%2fetc%2fpasswd",
    "/photos/p0.jpg",
    "/photos/0.jpg",
    "/photos/0%00",
    "/photos/+0",
    "/photos/%20" + "0",
    "/photos/%D9%A1",  # a digit of another script
    "/photos/" + "1" * 5000,
    "/icon.svg/../page.js",
    "/nothing",
]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path[:24])
def test_no_path_comes_from_a_request(page, path):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    connection.request("GET", path)  # urllib would tidy the path
    reply = connection.getresponse()
    said = reply.read()
    assert reply.status == 404 and said.startswith(b'{"error":') and said.count(b"\n") == 0


def test_an_upload_finds_the_captions_of_its_regions(page):
    raw = picture()
    reply = page.ask("/api/upload?topk=7&stages=exact", raw=raw, content_type="image/png")
    regions = StandIn().extract([Image.open(io.BytesIO(raw)).convert("RGB")])[0]
    arrays = (torch.from_numpy(x) for x in (regions.features, regions.boxes))
    image = ServedImage(*arrays, regions.size, torch.from_numpy(regions.whole))
    found = page.finder.searcher.captions_for(image, 7, 100, "exact")
    assert [x["caption"] for x in reply.json["results"]] == found.places
    assert not any(x["own"] for x in reply.json["results"])
    other = page.ask("/api/upload?topk=7", raw=picture((0, 250, 0)), content_type="image/png")
    assert other.json["results"] != reply.json["results"]


def test_without_an_extractor_uploads_are_off_and_it_is_said(tiny_positions):
    with serving(make_finder(uploads=False)) as page:
        info = page.ask("/api/info").json
        assert not info["uploads"] and "extractor" in info["why_no_uploads"]
        reply = page.ask("/api/upload", raw=picture(), content_type="image/png")
        assert (reply.status, reply.json["error"]) == (404, info["why_no_uploads"])


def test_the_page_may_load_only_itself(page):
    reply = page.ask("/")
    text, policy = reply.body.decode(), reply.headers["content-security-policy"]
    assert reply.headers["content-type"].startswith("text/html")
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "{{" not in text
    addresses = set(re.findall(r"""(?:https?:)?//[\w.]+\.\w+[^\s"'<]*""", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\son\w+=|style=", text)
    for path in ("/", "/icon.svg", "/api/info", "/photos/0", "/photos/99"):
        headers = page.ask(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_captions_travel_as_json_only(page):
    reply = page.ask("/api/captions?image=0&topk=75")
    assert HOSTILE in [found["text"] for found in reply.json["results"]]
    assert reply.headers["content-type"] == "application/json"


def test_scores_are_served_beside_the_search_and_the_same(tiny_positions):
    path = write_checkpoint(WHOLE)
    body = make_body()
    with serving(None, path=path) as page:
        alone = page.ask("/scan_sentence_image_score", body)
    with serving(make_finder(WHOLE, uploads=False)) as page, ThreadPoolExecutor(4) as pool:
        searches = [pool.submit(page.ask, "/api/search", {"query": "a dog"}) for _ in range(8)]
        beside = page.ask("/scan_sentence_image_score", body)
        assert {search.result().status for search in searches} == {200}
    assert alone.status == beside.status == 200
    for way, scores in alone.json.items():
        np.testing.assert_allclose(beside.json[way], scores, atol=1e-6)


def test_without_data_the_page_says_how_to_start(tiny_positions):
    path = write_checkpoint(SCAN, "<b>&model.pth.tar")
    with serving(None, path=path) as page:
        reply = page.ask("/")
        text = reply.body.decode()
        assert "python serve.py FOLDER/&lt;b&gt;&amp;model.pth.tar" in text
        assert "<b>&model" not in text
        said = html.unescape(re.sub(r"<[^>]+>", "", text))
        assert "--data_path data --data_name tiny_precomp" in said
        assert "script-src" in reply.headers["content-security-policy"]
        assert page.ask("/api/info").status == 404


def test_the_program_with_a_data_set(tiny_positions, starts_at_once):
    write_photos(Path("data/tiny_precomp/pictures"))
    path = write_checkpoint(SCAN)
    server = Server(path, "--data_path", "data", "--data_name", "tiny_precomp")
    status, found = server.ask({"query": "a red dog"}, path="/api/search")
    assert status == 200 and len(found["results"]) == 10
    assert server.ask(path="/api/info")[1]["photos"] == 14
    assert server.ask(make_body())[0] == 200
    code, out = server.stop()
    assert code == 0 and "Traceback" not in out

    flags = ["--images", "data"]
    done = subprocess.run(
        [sys.executable, ROOT / "serve.py", path, *flags], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: --images: give --data_path")
